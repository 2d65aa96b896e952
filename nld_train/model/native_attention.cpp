// Attention of rows that each see two ranges of keys, forward and backward: block-masked attention on a CPU.
//
// What the mask keeps is computed tile by tile, as FlashAttention-2 does it (Dao, arXiv 2307.08691): a tile is some rows
// of one key-value head with all the query heads that share it, and meets the keys that any of its rows sees. Scores,
// softmax and sums are fp32. In half precision probabilities and the scores' gradients are rounded to bf16 before they
// are multiplied again, where the processor multiplies pairs of bf16 (AVX512-BF16); elsewhere everything is fp32.
//
// All matrix products are one function, multiply: sums of R rows and V vectors stay in registers while a column of
// R numbers meets a row of V vectors, over and over. What it reads is packed once for each key-value head.
//
// Plain C++17 with GCC's vector extensions; compiled for the machine that it runs on (nld_train.platform.native).
//
// Dimensions: B sequences, H query heads, K key-value heads, G = H / K, S rows, N keys, D head dimension, M rows of a
// tile (of all its heads).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include <omp.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

// ---------------------------------------------------------------------------------------------------------- vectors

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4, ROWS = 6;  // 24 of 32 registers hold sums
#elif defined(__AVX__)
constexpr int LANES = 8, VECTORS = 2, ROWS = 6;  // 12 of 16
#else
constexpr int LANES = 4, VECTORS = 4, ROWS = 6;  // 24 of 32 (aarch64)
#endif
constexpr int PANEL = LANES * VECTORS;  // keys that multiply meets at once

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));

template <class Vector, class Scalar>
inline Vector load(const Scalar* from) {
    Vector x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

template <class Vector, class Scalar>
inline void store(Scalar* to, Vector x) {
    std::memcpy(to, &x, sizeof x);
}

inline Floats select(Ints mask, Floats yes, Floats no) {
    return (Floats)(((Ints)yes & mask) | ((Ints)no & ~mask));
}

// A product that is not to be fused with what is added to it.
inline Floats rounded(Floats x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#else
    asm("" : "+m"(x));
#endif
    return x;
}

inline Floats larger(Floats a, Floats b) { return select((Ints)(a > b), a, b); }

inline Ints counted_from(int first) {
    Ints x;
    for (int lane = 0; lane < LANES; ++lane) x[lane] = first + lane;
    return x;
}

inline float sum_of(Floats x) {
    float total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += x[lane];
    return total;
}

inline float largest_of(Floats x) {
    float found = x[0];
    for (int lane = 1; lane < LANES; ++lane) found = std::max(found, x[lane]);
    return found;
}

// 2^x for x <= 0 or little above; below 2^-126 it is 0. With x = n + f, |f| <= 1/2: the Taylor series of 2^f, whose
// remainder after the seventh power is 5e-9.
inline Floats exp2_of(Floats x) {
    const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2^23: to add it is to round to a whole number
    const Ints is_zero = (Ints)(x <= -126.0f);  // false for NaN, which goes through
    Floats shifted = x + magic;
    Floats f = x - (shifted - magic);
    Floats p = Floats{} + 1.5252733804e-5f;
    p = p * f + 1.5403530394e-4f;
    p = p * f + 1.3333558146e-3f;
    p = p * f + 9.6181291076e-3f;
    p = p * f + 5.5504108665e-2f;
    p = p * f + 2.4022650696e-1f;
    p = p * f + 6.9314718056e-1f;
    p = p * f + 1.0f;
    const Words power = ((Words)shifted - (Words)magic + 127u) << 23;
    return select(is_zero, Floats{}, p * (Floats)power);
}

// --------------------------------------------------------------------------------------------------------- numbers

struct Bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(Bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

inline void round_to(float x, float* to) { *to = x; }

inline void round_to(float x, Bf16* to) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    to->bits = std::isnan(x) ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// ------------------------------------------------------------------------------------------------------- operands

constexpr int BATCH = 384;          // columns of scores that exist at a time
constexpr int SCORES = BATCH + 16;  // from one of their rows to the next: no power of two, or caches would use few sets

// Columns of scores: keys [key, key + columns) of one panel.
struct Piece {
    int64_t key;
    int columns;
    int at;         // first column of the batch
    bool is_own;    // of the rows' own blocks, else of the clean tokens
    bool is_whole;  // every row of the tile sees all of it

    // Of its first column in what pack_columns has written.
    int64_t packed_at(int64_t units) const { return key / PANEL * PANEL * units + key % PANEL; }
};

// Operands of multiply: a Unit holds WIDTH numbers that follow each other in the dimension that is summed over.

struct Singles {
    using Unit = float;
    static constexpr int WIDTH = 1;

    static Floats multiplied(Floats sum, float a, Floats b) { return sum + a * b; }
    static Floats loaded(const float* from) { return load<Floats>(from); }

    template <class T>
    static float unit(const T* x, const T*, bool) {
        return to_float(*x);
    }

    // Rows of scores as operands of a product that sums over their columns, or over the rows.
    static const float* along_columns(const float* scores, int64_t, const std::vector<Piece>&, float*) { return scores; }
    static const float* along_rows(const float* scores, int64_t, const std::vector<Piece>&, float*) { return scores; }
};

#if defined(__AVX512BF16__)
struct Pairs {
    using Unit = uint32_t;
    static constexpr int WIDTH = 2;

    static Floats multiplied(Floats sum, uint32_t a, Words b) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
    }
    static Words loaded(const uint32_t* from) { return load<Words>(from); }

    static uint32_t unit(const Bf16* a, const Bf16* b, bool has_b) {
        return a->bits | (has_b ? uint32_t(b->bits) << 16 : 0);
    }

    static const uint32_t* along_columns(const float* scores, int64_t rows, const std::vector<Piece>& batch,
                                         uint32_t* to) {
        const int columns = batch.back().at + batch.back().columns;
        for (int64_t row = 0; row < rows; ++row)
            for (int column = 0; column < columns; column += LANES)
                store(to + (row * SCORES + column) / 2, rounded(scores + row * SCORES + column));
        return to;
    }

    static const uint32_t* along_rows(const float* scores, int64_t rows, const std::vector<Piece>& batch, uint32_t* to) {
        const int columns = batch.back().at + batch.back().columns;
        for (int64_t row = 0; row < rows; row += 2)
            for (int column = 0; column < columns; column += LANES) {
                const float* a = scores + row * SCORES + column;
                const Words low = widened(rounded(a));
                const Words high = row + 1 < rows ? widened(rounded(a + SCORES)) : Words{};
                store(to + row / 2 * SCORES + column, low | high << 16);
            }
        return to;
    }

   private:
    static __m256i rounded(const float* x) { return (__m256i)_mm512_cvtneps_pbh((__m512)load<Floats>(x)); }
    static Words widened(__m256i x) { return (Words)_mm512_cvtepu16_epi32(x); }
};
#endif

// ---------------------------------------------------------------------------------------------------------- product

// c [R, V vectors] (+)= a [R, count] b [count, V vectors], in units; a has any strides.
template <class Op, int R, int V>
void multiply(const typename Op::Unit* a, int64_t row_step, int64_t step, const typename Op::Unit* b, int64_t b_step,
              float* c, int64_t c_step, int count, bool adds) {
    Floats sums[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = adds ? load<Floats>(c + r * c_step + v * LANES) : Floats{};
    for (int k = 0; k < count; ++k) {
        decltype(Op::loaded(b)) of_b[V];
        for (int v = 0; v < V; ++v) of_b[v] = Op::loaded(b + k * b_step + v * LANES);
        for (int r = 0; r < R; ++r) {
            typename Op::Unit of_a = a[r * row_step + k * step];
            for (int v = 0; v < V; ++v) sums[r][v] = Op::multiplied(sums[r][v], of_a, of_b[v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(c + r * c_step + v * LANES, sums[r][v]);
}

template <class Op, int V>
void multiply_rows(const typename Op::Unit* a, int64_t row_step, int64_t step, const typename Op::Unit* b,
                   int64_t b_step, float* c, int64_t c_step, int rows, int count, bool adds) {
    int r = 0;
    for (; r + ROWS <= rows; r += ROWS)
        multiply<Op, ROWS, V>(a + r * row_step, row_step, step, b, b_step, c + r * c_step, c_step, count, adds);
    a += r * row_step;
    c += r * c_step;
    switch (rows - r) {
        case 5: return multiply<Op, 5, V>(a, row_step, step, b, b_step, c, c_step, count, adds);
        case 4: return multiply<Op, 4, V>(a, row_step, step, b, b_step, c, c_step, count, adds);
        case 3: return multiply<Op, 3, V>(a, row_step, step, b, b_step, c, c_step, count, adds);
        case 2: return multiply<Op, 2, V>(a, row_step, step, b, b_step, c, c_step, count, adds);
        case 1: return multiply<Op, 1, V>(a, row_step, step, b, b_step, c, c_step, count, adds);
    }
}

// c [rows, columns] (+)= a b, of any number of rows and a multiple of LANES columns.
template <class Op>
void product(const typename Op::Unit* a, int64_t row_step, int64_t step, const typename Op::Unit* b, int64_t b_step,
             float* c, int64_t c_step, int rows, int columns, int count, bool adds) {
    for (int column = 0; column < columns; column += PANEL) {
        const typename Op::Unit* of_b = b + column;
        float* of_c = c + column;
        switch (std::min(columns - column, PANEL) / LANES) {
            case 1: multiply_rows<Op, 1>(a, row_step, step, of_b, b_step, of_c, c_step, rows, count, adds); break;
            case 2: multiply_rows<Op, 2>(a, row_step, step, of_b, b_step, of_c, c_step, rows, count, adds); break;
#if !defined(__AVX__) || defined(__AVX512F__)
            case 3: multiply_rows<Op, 3>(a, row_step, step, of_b, b_step, of_c, c_step, rows, count, adds); break;
            case 4: multiply_rows<Op, 4>(a, row_step, step, of_b, b_step, of_c, c_step, rows, count, adds); break;
#endif
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- problem

}  // namespace

extern "C" {

struct Strides {  // in elements, of the first three of four dimensions; that of the last is 1
    int64_t sequence, head, row;
};

// Keys that a row sees: [clean_first, clean_end) and [own_first, own_end). None: the row is padding.
struct Seen {
    int32_t clean_first, clean_end, own_first, own_end;
};

struct Problem {
    int64_t sequences, heads, kv_heads, rows, noisy_rows, keys, dim;  // the first noisy_rows rows are the first keys
    int64_t threads, parts;  // parts: in which the rows of a key-value head are shared out
    const Seen* seen;        // [B, S]
    const void *query, *key, *value, *grad_out;
    void *out, *grad_query, *grad_key, *grad_value;
    float* log_sum_exp;  // [B, H, S], to base 2
    Strides of_query, of_key, of_value, of_grad_out, of_out, of_grad_query, of_grad_key, of_grad_value;
    float* room;  // see nld_room
    float scale;
    int32_t is_bf16;
};
}

namespace {

constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr float LOG2_E = 1.44269504f;

inline bool is_padding(const Seen& seen) {
    return seen.clean_first >= seen.clean_end && seen.own_first >= seen.own_end;
}

inline int64_t rounded_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

struct Sizes {
    int64_t group, tokens, tile, dim, keys;  // tokens: rows of a tile of one head; tile: of all; dim, keys: rounded up

    explicit Sizes(const Problem& p)
        : group(p.heads / p.kv_heads),
          tokens(group == 1 ? 64 : std::clamp<int64_t>(128 / group, 1, 32)),
          tile(rounded_up(tokens * group, 2)),
          dim(rounded_up(p.dim, LANES)),
          keys(rounded_up(p.keys, PANEL)) {}
};

// Pieces of one block of memory, each on a cache line of its own.
class Room {
   public:
    explicit Room(float* at) : at_(at) {}

    template <class T = float>
    T* take(int64_t count) {
        float* taken = at_;
        at_ += rounded_up(count, 16);
        return reinterpret_cast<T*>(taken);
    }
    float* end() const { return at_; }

   private:
    float* at_;
};

// ----------------------------------------------------------------------------------------------------------- tiles

struct Range {
    int64_t first, end;
};

// Rows [first, end) of a sequence, for all heads of a group; and the keys that any of them sees, in batches.
struct Tile {
    int64_t first, end;
    std::vector<std::vector<Piece>> batches;

    int64_t tokens() const { return end - first; }
    // Of a row of the tile: which head of the group, and which row of the sequence.
    int64_t head(int64_t row) const { return row / tokens(); }
    int64_t place(int64_t row) const { return first + row % tokens(); }
};

void add_pieces(Tile& tile, Range any, Range all, bool is_own) {
    if (any.first >= any.end) return;
    int64_t end = rounded_up(any.end, LANES);
    for (int64_t key = any.first / LANES * LANES; key < end;) {
        const int columns = int(std::min(end, key / PANEL * PANEL + PANEL) - key);
        auto& batches = tile.batches;
        int at = batches.empty() ? BATCH : batches.back().back().at + batches.back().back().columns;
        if (at + columns > BATCH) {
            batches.emplace_back();
            at = 0;
        }
        batches.back().push_back({key, columns, at, is_own, all.first <= key && key + columns <= all.end});
        key += columns;
    }
}

Tile tile_of(const Seen* seen, int64_t first, int64_t end) {
    constexpr int64_t far = std::numeric_limits<int64_t>::max();
    Range own{far, 0}, clean{far, 0}, all_own{0, far}, all_clean{0, far};
    auto add = [](int64_t from, int64_t to, Range& any, Range& all) {
        all = {std::max(all.first, from), std::min(all.end, to)};
        if (from < to) any = {std::min(any.first, from), std::max(any.end, to)};
    };
    for (int64_t row = first; row < end; ++row) {
        add(seen[row].own_first, seen[row].own_end, own, all_own);
        add(seen[row].clean_first, seen[row].clean_end, clean, all_clean);
    }
    Tile tile{first, end, {}};
    add_pieces(tile, own, all_own, true);
    add_pieces(tile, clean, all_clean, false);
    return tile;
}

// A tile ends where the noisy rows or a document do; and before a block that it cannot hold, once it is half full.
std::vector<Tile> tiles_of(const Problem& p, const Sizes& sizes, const Seen* seen) {
    std::vector<Tile> tiles;
    for (int64_t first = 0, row = 1; first < p.rows; ++row) {
        bool ends = row == p.rows || row == p.noisy_rows || row - first == sizes.tokens ||
                    seen[row].clean_first != seen[first].clean_first;
        if (!ends && row < p.noisy_rows && seen[row].own_first == row)
            ends = 2 * (row - first) >= sizes.tokens && seen[row].own_end - first > sizes.tokens;
        if (ends) {
            tiles.push_back(tile_of(seen, first, row));
            first = row;
        }
    }
    return tiles;
}

// --------------------------------------------------------------------------------------------------------- packing

template <class T>
struct Rows {
    T* at;
    int64_t step;

    T* operator[](int64_t row) const { return at + row * step; }
};

template <class T, class Pointer>
Rows<T> rows_of(Pointer x, const Strides& strides, int64_t sequence, int64_t head) {
    return {static_cast<T*>(x) + sequence * strides.sequence + head * strides.head, strides.row};
}

// Where rows stand; null for one of zeros. What is padding is 0, whatever stands there.
template <class T>
using Pointers = std::vector<const T*>;

template <class T>
Pointers<T> keys_of(const Problem& p, const Sizes& sizes, const Seen* seen, Rows<const T> keys) {
    Pointers<T> pointers(sizes.keys, nullptr);
    for (int64_t key = 0; key < p.keys; ++key)
        if (key >= p.noisy_rows || !is_padding(seen[key])) pointers[key] = keys[key];
    return pointers;
}

// The rows of a tile, head by head.
template <class T, class Pointer>
Pointers<T> rows_of_tile(const Sizes& sizes, const Seen* seen, const Tile& tile, Pointer x, const Strides& strides,
                         int64_t sequence, int64_t kv_head) {
    Pointers<T> pointers;
    for (int64_t i = 0; i < sizes.group; ++i) {
        const auto rows = rows_of<const T>(x, strides, sequence, kv_head * sizes.group + i);
        for (int64_t row = tile.first; row < tile.end; ++row)
            pointers.push_back(is_padding(seen[row]) ? nullptr : rows[row]);
    }
    if (pointers.size() % 2) pointers.push_back(nullptr);
    return pointers;
}

// [rows, D / WIDTH]: the sum will run over D.
template <class Op, class T>
void pack_rows(const Pointers<T>& rows, int64_t dim, int64_t padded_dim, typename Op::Unit* to) {
    for (const T* row : rows) {
        std::fill(to, to + padded_dim / Op::WIDTH, typename Op::Unit(0));
        if (row)
            for (int64_t d = 0; d < dim; d += Op::WIDTH) to[d / Op::WIDTH] = Op::unit(row + d, row + d + 1, d + 1 < dim);
        to += padded_dim / Op::WIDTH;
    }
}

// [panels, D / WIDTH, PANEL rows] of a multiple of PANEL rows: likewise, and rows are columns.
template <class Op, class T>
void pack_columns(const Pointers<T>& rows, int64_t dim, int64_t padded_dim, typename Op::Unit* to) {
    const int64_t units = padded_dim / Op::WIDTH;
    for (size_t first = 0; first < rows.size(); first += PANEL, to += units * PANEL) {
        std::fill(to, to + units * PANEL, typename Op::Unit(0));
        for (int i = 0; i < PANEL; ++i)
            if (const T* row = rows[first + i])
                for (int64_t d = 0; d < dim; d += Op::WIDTH)
                    to[d / Op::WIDTH * PANEL + i] = Op::unit(row + d, row + d + 1, d + 1 < dim);
    }
}

// [rows / WIDTH, D] of a multiple of WIDTH rows: the sum will run over rows.
template <class Op, class T>
void pack_summed(const Pointers<T>& rows, int64_t dim, int64_t padded_dim, typename Op::Unit* to) {
    const std::vector<T> zeros(dim);
    for (size_t row = 0; row < rows.size(); row += Op::WIDTH, to += padded_dim) {
        const T* a = rows[row] ? rows[row] : zeros.data();
        const T* b = rows[row + Op::WIDTH - 1] ? rows[row + Op::WIDTH - 1] : zeros.data();
        for (int64_t d = 0; d < dim; ++d) to[d] = Op::unit(a + d, b + d, true);
        std::fill(to + dim, to + padded_dim, typename Op::Unit(0));
    }
}

template <class T>
void write_row(const float* from, float factor, int64_t dim, T* to) {
    for (int64_t d = 0; d < dim; ++d) round_to(from[d] * factor, to + d);
}

// ------------------------------------------------------------------------------------------- softmax of a batch

// -1 where the row sees the key of a column, for LANES of them; 0 elsewhere.
inline Ints is_seen(const Piece& piece, int column, const Seen& seen) {
    const int first = piece.is_own ? seen.own_first : seen.clean_first;
    const int end = piece.is_own ? seen.own_end : seen.clean_end;
    const Ints keys = counted_from(int(piece.key) + column);
    return (Ints)(keys >= first) & (Ints)(keys < end);
}

inline Floats masked(Floats x, float otherwise, const Piece& piece, int column, const Seen& seen) {
    return piece.is_whole ? x : select(is_seen(piece, column, seen), x, Floats{} + otherwise);
}

// Keys of a batch that stand together, in one product.
template <class Do>
void for_spans(const std::vector<Piece>& batch, Do run) {
    for (size_t i = 0; i < batch.size();) {
        Piece span = batch[i++];
        for (; i < batch.size() && batch[i].key == span.key + span.columns; ++i) span.columns += batch[i].columns;
        run(span.key, span.columns, span.at);
    }
}

// Unnormalised probabilities 2^(factor * score - largest) of a row, in place of its scores. ``largest`` and ``sum`` are
// of all batches up to this one. Returns what sums up to now are to be multiplied by.
float exponentiate(const std::vector<Piece>& batch, const Seen& seen, float factor, float* scores, float& largest,
                   float& sum) {
    Floats found = Floats{} + NONE;
    for (const Piece& piece : batch)
        for (int column = 0; column < piece.columns; column += LANES) {
            float* at = scores + piece.at + column;
            const Floats score = masked(load<Floats>(at) * factor, NONE, piece, column, seen);
            store(at, score);
            found = larger(found, score);
        }
    const float before = largest;
    largest = std::max(largest, largest_of(found));
    const float origin = largest == NONE ? 0.0f : largest;
    Floats total = {};
    for (const Piece& piece : batch)
        for (int column = 0; column < piece.columns; column += LANES) {
            float* at = scores + piece.at + column;
            const Floats p = exp2_of(load<Floats>(at) - origin);
            store(at, p);
            total += p;
        }
    const float correction = before == NONE ? 0.0f : std::exp2(before - origin);
    sum = sum * correction + sum_of(total);
    return correction;
}

// --------------------------------------------------------------------------------------------------------- forward

template <class T, class Op>
class Forward {
   public:
    Forward(const Problem& p, float* room) : p_(p), sizes_(p) {
        Room left(room);
        keys_ = left.take<Unit>(sizes_.keys * sizes_.dim);
        values_ = left.take<Unit>(sizes_.keys * sizes_.dim);
        rows_ = left.take<Unit>(sizes_.tile * sizes_.dim);
        scores_ = left.take(sizes_.tile * SCORES);
        rounded_ = left.take<Unit>(sizes_.tile * SCORES);
        out_ = left.take(sizes_.tile * sizes_.dim);
        largest_ = left.take(sizes_.tile);
        sums_ = left.take(sizes_.tile);
        room_ = left.end() - room;
    }

    int64_t room() const { return room_; }

    // Of one key-value head of one sequence, every parts-th tile.
    void run(int64_t sequence, int64_t kv_head, int64_t part) {
        const Seen* seen = p_.seen + sequence * p_.rows;
        pack_columns<Op>(keys_of(p_, sizes_, seen, rows_of<const T>(p_.key, p_.of_key, sequence, kv_head)), p_.dim,
                         sizes_.dim, keys_);
        pack_summed<Op>(keys_of(p_, sizes_, seen, rows_of<const T>(p_.value, p_.of_value, sequence, kv_head)), p_.dim,
                        sizes_.dim, values_);
        const std::vector<Tile> tiles = tiles_of(p_, sizes_, seen);
        for (size_t i = part; i < tiles.size(); i += p_.parts) of_tile(tiles[i], seen, sequence, kv_head);
    }

   private:
    using Unit = typename Op::Unit;

    void of_tile(const Tile& tile, const Seen* seen, int64_t sequence, int64_t kv_head) {
        const int64_t units = sizes_.dim / Op::WIDTH, num_rows = tile.tokens() * sizes_.group;
        pack_rows<Op>(rows_of_tile<T>(sizes_, seen, tile, p_.query, p_.of_query, sequence, kv_head), p_.dim,
                      sizes_.dim, rows_);
        std::fill(largest_, largest_ + num_rows, NONE);
        std::fill(sums_, sums_ + num_rows, 0.0f);
        std::fill(out_, out_ + num_rows * sizes_.dim, 0.0f);
        for (const auto& batch : tile.batches) {
            for (const Piece& piece : batch)
                product<Op>(rows_, units, 1, keys_ + piece.packed_at(units), PANEL,
                            scores_ + piece.at, SCORES, num_rows, piece.columns, units, false);
            for (int64_t row = 0; row < num_rows; ++row) {
                const float correction = exponentiate(batch, seen[tile.place(row)],
                                                      p_.scale * LOG2_E, scores_ + row * SCORES, largest_[row], sums_[row]);
                if (correction != 1.0f)
                    for (int64_t d = 0; d < sizes_.dim; ++d) out_[row * sizes_.dim + d] *= correction;
            }
            const Unit* probabilities = Op::along_columns(scores_, num_rows, batch, rounded_);
            for_spans(batch, [&](int64_t key, int columns, int at) {
                product<Op>(probabilities + at / Op::WIDTH, SCORES / Op::WIDTH, 1, values_ + key / Op::WIDTH * sizes_.dim,
                            sizes_.dim, out_, sizes_.dim, num_rows, sizes_.dim, columns / Op::WIDTH, true);
            });
        }
        for (int64_t row = 0; row < num_rows; ++row) {
            const int64_t head = kv_head * sizes_.group + tile.head(row), at = tile.place(row);
            const bool is_empty = is_padding(seen[at]);
            write_row(out_ + row * sizes_.dim, is_empty ? 0.0f : 1.0f / sums_[row], p_.dim,
                      rows_of<T>(p_.out, p_.of_out, sequence, head)[at]);
            p_.log_sum_exp[(sequence * p_.heads + head) * p_.rows + at] =
                is_empty ? 0.0f : largest_[row] + std::log2(sums_[row]);
        }
    }

    const Problem& p_;
    const Sizes sizes_;
    Unit *keys_, *values_, *rows_, *rounded_;
    float *scores_, *out_, *largest_, *sums_;
    int64_t room_;
};

// -------------------------------------------------------------------------------------------------------- backward

// With probabilities p and d = grad_out values^T, the gradient of the scores is p (d - sum(p d)), and sum(p d) is
// sum(grad_out out) of the row.
template <class T, class Op>
class Backward {
   public:
    Backward(const Problem& p, float* room) : p_(p), sizes_(p) {
        Room left(room);
        key_columns_ = left.take<Unit>(sizes_.keys * sizes_.dim);
        value_columns_ = left.take<Unit>(sizes_.keys * sizes_.dim);
        keys_ = left.take<Unit>(sizes_.keys * sizes_.dim);
        for (Unit** rows : {&query_rows_, &grad_rows_, &query_, &grad_}) *rows = left.take<Unit>(sizes_.tile * sizes_.dim);
        scores_ = left.take(sizes_.tile * SCORES);
        of_probabilities_ = left.take(sizes_.tile * SCORES);
        for (Unit** rounded : {&rounded_, &rounded_columns_}) *rounded = left.take<Unit>(sizes_.tile * SCORES);
        grad_query_ = left.take(sizes_.tile * sizes_.dim);
        log_sums_exp_ = left.take(sizes_.tile);
        products_ = left.take(sizes_.tile);
        room_ = left.end() - room;
    }

    int64_t room() const { return room_; }

    // Of one key-value head of one sequence, every parts-th tile. ``of_keys``, ``of_values``: sums [keys, D].
    void run(int64_t sequence, int64_t kv_head, int64_t part, float* of_keys, float* of_values) {
        const Seen* seen = p_.seen + sequence * p_.rows;
        const auto keys = keys_of(p_, sizes_, seen, rows_of<const T>(p_.key, p_.of_key, sequence, kv_head));
        const auto values = keys_of(p_, sizes_, seen, rows_of<const T>(p_.value, p_.of_value, sequence, kv_head));
        pack_columns<Op>(keys, p_.dim, sizes_.dim, key_columns_);
        pack_columns<Op>(values, p_.dim, sizes_.dim, value_columns_);
        pack_summed<Op>(keys, p_.dim, sizes_.dim, keys_);
        std::fill(of_keys, of_keys + sizes_.keys * sizes_.dim, 0.0f);
        std::fill(of_values, of_values + sizes_.keys * sizes_.dim, 0.0f);
        const std::vector<Tile> tiles = tiles_of(p_, sizes_, seen);
        for (size_t i = part; i < tiles.size(); i += p_.parts)
            of_tile(tiles[i], seen, sequence, kv_head, of_keys, of_values);
    }

   private:
    using Unit = typename Op::Unit;

    void of_tile(const Tile& tile, const Seen* seen, int64_t sequence, int64_t kv_head, float* of_keys,
                 float* of_values) {
        const int64_t dim = sizes_.dim, units = dim / Op::WIDTH, num_rows = tile.tokens() * sizes_.group;
        const auto query = rows_of_tile<T>(sizes_, seen, tile, p_.query, p_.of_query, sequence, kv_head);
        const auto grad = rows_of_tile<T>(sizes_, seen, tile, p_.grad_out, p_.of_grad_out, sequence, kv_head);
        const auto out = rows_of_tile<T>(sizes_, seen, tile, p_.out, p_.of_out, sequence, kv_head);
        pack_rows<Op>(query, p_.dim, dim, query_rows_);
        pack_rows<Op>(grad, p_.dim, dim, grad_rows_);
        pack_summed<Op>(query, p_.dim, dim, query_);
        pack_summed<Op>(grad, p_.dim, dim, grad_);
        for (int64_t row = 0; row < num_rows; ++row) {
            const int64_t head = kv_head * sizes_.group + tile.head(row), at = tile.place(row);
            log_sums_exp_[row] = p_.log_sum_exp[(sequence * p_.heads + head) * p_.rows + at];
            products_[row] = 0;
            if (grad[row])
                for (int64_t d = 0; d < p_.dim; ++d) products_[row] += to_float(grad[row][d]) * to_float(out[row][d]);
        }
        std::fill(grad_query_, grad_query_ + num_rows * dim, 0.0f);
        const int64_t summed_rows = (num_rows + Op::WIDTH - 1) / Op::WIDTH;
        for (const auto& batch : tile.batches) {
            for (const Piece& piece : batch) {
                const int64_t columns = piece.packed_at(units);
                product<Op>(query_rows_, units, 1, key_columns_ + columns, PANEL, scores_ + piece.at, SCORES, num_rows,
                            piece.columns, units, false);
                product<Op>(grad_rows_, units, 1, value_columns_ + columns, PANEL, of_probabilities_ + piece.at, SCORES,
                            num_rows, piece.columns, units, false);
            }
            for (int64_t row = 0; row < num_rows; ++row)
                differentiate(batch, seen[tile.place(row)], scores_ + row * SCORES,
                              of_probabilities_ + row * SCORES, log_sums_exp_[row], products_[row]);
            const Unit* by_row = Op::along_rows(scores_, num_rows, batch, rounded_);
            for_spans(batch, [&](int64_t key, int columns, int at) {
                product<Op>(by_row + at, 1, SCORES, grad_, dim, of_values + key * dim, dim, columns, dim, summed_rows, true);
            });
            by_row = Op::along_rows(of_probabilities_, num_rows, batch, rounded_);
            const Unit* by_column = Op::along_columns(of_probabilities_, num_rows, batch, rounded_columns_);
            for_spans(batch, [&](int64_t key, int columns, int at) {
                product<Op>(by_row + at, 1, SCORES, query_, dim, of_keys + key * dim, dim, columns, dim, summed_rows, true);
                product<Op>(by_column + at / Op::WIDTH, SCORES / Op::WIDTH, 1, keys_ + key / Op::WIDTH * dim, dim,
                            grad_query_, dim, num_rows, dim, columns / Op::WIDTH, true);
            });
        }
        for (int64_t row = 0; row < num_rows; ++row) {
            const int64_t head = kv_head * sizes_.group + tile.head(row), at = tile.place(row);
            write_row(grad_query_ + row * dim, 1.0f, p_.dim,
                      rows_of<T>(p_.grad_query, p_.of_grad_query, sequence, head)[at]);
        }
    }

    // Of a row: probabilities in place of its scores, gradients of the scores in place of those of the probabilities.
    void differentiate(const std::vector<Piece>& batch, const Seen& seen, float* scores, float* of_probabilities,
                       float log_sum_exp, float product) const {
        const float factor = p_.scale * LOG2_E;
        for (const Piece& piece : batch)
            for (int column = 0; column < piece.columns; column += LANES) {
                float *score = scores + piece.at + column, *of_p = of_probabilities + piece.at + column;
                // Rounded like the forward pass's, which is what the log-sum-exp was taken of: where one key has all the
                // weight it is exactly 1.
                const Floats scaled = rounded(load<Floats>(score) * factor);
                const Floats p = masked(exp2_of(scaled - log_sum_exp), 0.0f, piece, column, seen);
                const Floats d = p * (load<Floats>(of_p) - product) * p_.scale;
                store(score, p);
                store(of_p, d);
            }
    }

    const Problem& p_;
    const Sizes sizes_;
    Unit *key_columns_, *value_columns_, *keys_, *query_rows_, *grad_rows_, *query_, *grad_, *rounded_, *rounded_columns_;
    float *scores_, *of_probabilities_, *grad_query_, *log_sums_exp_, *products_;
    int64_t room_;
};

// ------------------------------------------------------------------------------------------------------------ all

template <class T, class Op>
int64_t forward(const Problem& p, bool only_room) {
    const int64_t of_thread = Forward<T, Op>(p, nullptr).room();
    if (only_room) return p.threads * of_thread;
    const int64_t num_units = p.sequences * p.kv_heads * p.parts;
#pragma omp parallel num_threads(int(p.threads))
    {
        Forward<T, Op> worker(p, p.room + omp_get_thread_num() * of_thread);
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < num_units; ++unit)
            worker.run(unit / p.parts / p.kv_heads, unit / p.parts % p.kv_heads, unit % p.parts);
    }
    return 0;
}

template <class T, class Op>
int64_t backward(const Problem& p, bool only_room) {
    const Sizes sizes(p);
    const int64_t of_thread = Backward<T, Op>(p, nullptr).room(), of_sum = sizes.keys * sizes.dim;
    const int64_t num_units = p.sequences * p.kv_heads * p.parts;
    if (only_room) return p.threads * of_thread + 2 * num_units * of_sum;
    float* sums = p.room + p.threads * of_thread;
#pragma omp parallel num_threads(int(p.threads))
    {
        Backward<T, Op> worker(p, p.room + omp_get_thread_num() * of_thread);
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < num_units; ++unit)
            worker.run(unit / p.parts / p.kv_heads, unit / p.parts % p.kv_heads, unit % p.parts,
                       sums + 2 * unit * of_sum, sums + (2 * unit + 1) * of_sum);
#pragma omp for schedule(static) collapse(2)
        for (int64_t head = 0; head < p.sequences * p.kv_heads; ++head)
            for (int64_t key = 0; key < p.keys; ++key) {
                float* of_head = sums + 2 * head * p.parts * of_sum + key * sizes.dim;
                for (int64_t part = 1; part < p.parts; ++part)
                    for (int64_t d = 0; d < p.dim; ++d) {
                        of_head[d] += of_head[2 * part * of_sum + d];
                        of_head[of_sum + d] += of_head[(2 * part + 1) * of_sum + d];
                    }
                const int64_t sequence = head / p.kv_heads, kv_head = head % p.kv_heads;
                write_row(of_head, 1.0f, p.dim, rows_of<T>(p.grad_key, p.of_grad_key, sequence, kv_head)[key]);
                write_row(of_head + of_sum, 1.0f, p.dim, rows_of<T>(p.grad_value, p.of_grad_value, sequence, kv_head)[key]);
            }
    }
    return 0;
}

#if defined(__AVX512BF16__)
using HalfOperands = Pairs;
#else
using HalfOperands = Singles;
#endif

}  // namespace

extern "C" {

// How many floats ``room`` must hold, for the forward or the backward pass.
int64_t nld_room(const Problem* p, int is_backward) {
    if (is_backward) return p->is_bf16 ? backward<Bf16, HalfOperands>(*p, true) : backward<float, Singles>(*p, true);
    return p->is_bf16 ? forward<Bf16, HalfOperands>(*p, true) : forward<float, Singles>(*p, true);
}

void nld_forward(const Problem* p) {
    p->is_bf16 ? forward<Bf16, HalfOperands>(*p, false) : forward<float, Singles>(*p, false);
}

void nld_backward(const Problem* p) {
    p->is_bf16 ? backward<Bf16, HalfOperands>(*p, false) : backward<float, Singles>(*p, false);
}

// Whether operands in bf16 are multiplied as such.
int nld_multiplies_bf16() { return HalfOperands::WIDTH > 1; }
}
