"""The noisy rows of a sequence: a pure function of (seed, place in the stream).

Nothing here is process state. Whoever knows the seed and a sample's place in the data stream gets the same mask, bit
for bit: a resumed run, a tensor-parallel peer, the first and the last pipeline stage, any data-parallel size. Samples
(or blocks) draw their own noise level, so data-parallel ranks see different ratios in every step ("DP-rank varying mask
ratios", NLD technical report). What is masked at a level, and what it weighs: :mod:`nld_train.objective.samplers`.

Dimensions: B sequences, L clean tokens of a sequence, N noisy rows of a sequence; M blocks of the micro-batch, T =
block_size tokens of a block (the last columns of a short block are absent), C noisy copies of a block.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nld_train.objective.samplers import BERNOULLI, STRATIFY_BATCH, NoiseSpec, draw_masks

# Streams of random numbers with the same key never overlap: this is the highest word of Philox's counter.
_TOKEN_STREAM, _BLOCK_STREAM, _SHIFT_STREAM, _SLOT_STREAM, _SHARED_STREAM = range(5)
# Levels of a global batch are made and kept for so many slots at once: 32 x 512 samples take 1.5 ms and 128 KiB.
_SLOTS_PER_CHUNK = 32
_CACHED_CHUNKS = 64
# Where the number of rows differs from one sequence to the next, shapes are kept few.
_ROW_MULTIPLE = 128


@dataclass(slots=True, kw_only=True)
class Corruption:
    """The noisy rows of B sequences, N each: some or all of their blocks, masked in part, once or twice.

    ``noisy_tokens`` int64 [B, N] (x_t); the mask token for a padding row. ``places`` int64 [B, N]: the clean token that
    a row is a copy of, 0..L-1; -1 for a padding row. ``blocks`` int64 [B, N]: number of the row's noisy block in its
    sequence, from 0 in the order of the rows (two copies of a block have two numbers); -1 for a padding row. A block's
    rows stand together, in the order of their places; blocks stand in the order of their places, all of the first copy
    before all of the second, and padding rows come last. ``weights`` float64 [B, N]: factor of the row's cross-entropy
    in the diffusion sum; 0 where the token is not masked. ``mask_ratios`` float32 [B, N]: masked share of the maskable
    tokens of the row's block, in this copy; 0 for a padding row. ``sequence_ratios`` float64 [B]: masked share of all
    maskable noisy rows of a sequence (0 where it has none).
    """

    noisy_tokens: Tensor
    places: Tensor
    blocks: Tensor
    weights: Tensor
    mask_ratios: Tensor
    sequence_ratios: Tensor

    def is_whole(self, length: int, block_size: int) -> bool:
        """The rows are one copy of all ``length`` tokens in blocks of ``block_size``."""
        places = torch.arange(length)
        return (
            self.places.shape[1] == length
            and length % block_size == 0
            and bool((self.places == places).all())
            and bool((self.blocks == places // block_size).all())
        )


@dataclass(frozen=True, slots=True)
class _Blocks:
    """M blocks of a micro-batch with at least one maskable token each, by sequence and place.

    ``sequences`` int64 [M]; ``places`` int64 [M, T], valid where ``is_token`` bool [M, T]; ``is_maskable`` bool [M, T].
    """

    sequences: np.ndarray
    places: np.ndarray
    is_token: np.ndarray
    is_maskable: np.ndarray

    def counts(self, num_sequences: int) -> np.ndarray:
        """int64 [B], blocks of each sequence."""
        return np.bincount(self.sequences, minlength=num_sequences)

    def __getitem__(self, chosen: np.ndarray) -> "_Blocks":
        return _Blocks(self.sequences[chosen], self.places[chosen], self.is_token[chosen], self.is_maskable[chosen])


def uniforms(seed: int, stream_position: int, count: int, stream: int = 0, part: int = 0) -> np.ndarray:
    """``count`` float64 in [0, 1), a pure function of the arguments.

    Philox is counter-based, and its raw output is fixed by numpy's compatibility policy (the distributions are not),
    so the 53-bit fractions are built here. ``stream`` and ``part`` choose numbers of their own for the same key.
    """
    return (_raw(seed, stream_position, count, stream, part) >> np.uint64(11)) * 2.0**-53


def _raw(seed: int, key: int, count: int, stream: int, part: int) -> np.ndarray:
    """uint64 [count]."""
    counter = np.array([0, 0, part, stream], dtype=np.uint64)
    return np.random.Philox(key=np.array([seed, key], dtype=np.uint64), counter=counter).random_raw(count)


def corrupt(
    tokens: Tensor,
    stream_positions: Tensor,
    spec: NoiseSpec,
    is_supervised: Tensor | None = None,
    document_starts: Tensor | None = None,
) -> Corruption:
    """Choose blocks, replace some of their tokens by the mask token, and lay the blocks out as rows.

    Blocks are cut every ``block_size`` tokens of a sequence, or of each document: the last of a document may be short.
    Only supervised tokens are maskable; blocks without any never become rows, and the other tokens of a chosen block
    (a prompt's end) are rows of weight 0. Of a sequence's n_b blocks, m = max(1, floor(rho * n_b + u)) are chosen, all
    sets of m alike, and weigh 1 / E[m / n_b] more (rho = ``noisy_fraction``): the expected loss is that of all blocks.

    N is the most rows of any sequence. It is a constant of the configuration where every token is supervised and there
    are no documents (or rho is 1); else it is rounded up to a multiple of 128, at most to C * L. N is at least 1, and
    a multiple of ``row_multiple``.

    Args:
        tokens: int64 [B, L], on the CPU.
        stream_positions: int64 [B], each sequence's place in the data stream.
        spec: see :class:`NoiseSpec`.
        is_supervised: bool [B, L], the token itself counts in the loss; None: all do.
        document_starts: int64 [B, L], place of the first token of each token's document; None: a sequence is one text.

    Raises:
        ValueError: L is no multiple of ``block_size`` (without documents), or ``document_starts`` names no documents.
    """
    num_sequences, length = tokens.shape
    blocks = _cut_into_blocks(num_sequences, length, spec.block_size, is_supervised, document_starts)
    num_blocks = blocks.counts(num_sequences)
    # E[m]; rounded, since 0.07 * 100 is above 7.
    mean_chosen = np.maximum(np.round(spec.noisy_fraction * num_blocks, 9), np.minimum(num_blocks, 1))
    if spec.noisy_fraction < 1:
        blocks = _choose_blocks(blocks, stream_positions, spec.seed, num_blocks, mean_chosen)
    levels, token_draws = _draws(blocks, stream_positions, spec, length)
    is_masked, weights = draw_masks(spec, levels, token_draws, blocks.is_maskable)
    weights *= (num_blocks / np.maximum(mean_chosen, 1))[blocks.sequences]

    has_gaps = is_supervised is not None and not bool(is_supervised.all())
    num_rows = num_noisy_rows(spec, length, has_documents=document_starts is not None, has_gaps=has_gaps)
    if num_rows is None:
        most_rows = np.bincount(blocks.sequences, weights=blocks.is_token.sum(axis=1), minlength=num_sequences).max()
        num_multiples = max(1, math.ceil(spec.num_copies * most_rows / _ROW_MULTIPLE))
        num_rows = _rounded(min(num_multiples * _ROW_MULTIPLE, spec.num_copies * length), spec)
    return _lay_out(tokens.numpy(), num_rows, spec.mask_token_id, blocks, is_masked, weights)


def num_noisy_rows(spec: NoiseSpec, length: int, *, has_documents: bool, has_gaps: bool) -> int | None:
    """N where it is a constant of the configuration; None where it depends on a micro-batch's documents and gaps.

    Args:
        length: L.
        has_documents: blocks begin anew at each document.
        has_gaps: some tokens are not supervised.
    """
    if has_gaps or (has_documents and spec.noisy_fraction < 1):
        return None
    if has_documents:
        return _rounded(spec.num_copies * length, spec)
    num_chosen = max(1, math.ceil(round(spec.noisy_fraction * (length // spec.block_size), 9)))
    return _rounded(spec.num_copies * num_chosen * spec.block_size, spec)


def _rounded(num_rows: int, spec: NoiseSpec) -> int:
    return math.ceil(num_rows / spec.row_multiple) * spec.row_multiple


def stratified_levels(seed: int, stream_position: int, global_batch_size: int, num_slots: int) -> np.ndarray:
    """float64 [num_slots]: the levels of a sample's noisy blocks, evenly spread over its global batch.

    Block slot s of sample g of a batch of G takes u = frac((pi_s(g) + phi(s)) / G + shift): pi_s permutes the samples,
    each slot in its own way; phi(s) is the base-2 van der Corput sequence, so that the slots 0..m-1 of all samples are
    evenly spread for every m; the shift, one for the batch, makes each u exactly uniform on [0, 1). (A simulation of
    sums over batches found a golden-ratio phi better at 3 to 13 slots and worse from 48 on, where training is.)

    Args:
        seed: of the run.
        stream_position: place of the sample: number g = stream_position % G of batch stream_position // G.
        global_batch_size: G.
        num_slots: noisy blocks of the sample. A slot's level does not depend on how many others there are.
    """
    batch, number = divmod(stream_position, global_batch_size)
    num_chunks = math.ceil(num_slots / _SLOTS_PER_CHUNK)
    chunks = [_batch_levels(seed, batch, global_batch_size, chunk)[number] for chunk in range(num_chunks)]
    return np.concatenate([np.empty(0), *chunks])[:num_slots]


@lru_cache(maxsize=_CACHED_CHUNKS)
def _batch_levels(seed: int, batch: int, global_batch_size: int, chunk: int) -> np.ndarray:
    """float64 [G, _SLOTS_PER_CHUNK]: levels of a whole batch in some slots. Shared: do not write."""
    slots = np.arange(chunk * _SLOTS_PER_CHUNK, (chunk + 1) * _SLOTS_PER_CHUNK)
    # Random numbers sorted with the samples' numbers in their low bits: faster than argsort, and without ties.
    low_bits = np.uint64(2 ** (global_batch_size - 1).bit_length() - 1)
    draws = _raw(seed, batch, _SLOTS_PER_CHUNK * global_batch_size, _SLOT_STREAM, chunk) & ~low_bits
    keys = draws.reshape(_SLOTS_PER_CHUNK, global_batch_size) | np.arange(global_batch_size, dtype=np.uint64)
    permutations = np.sort(keys, axis=1) & low_bits
    offsets = np.zeros(_SLOTS_PER_CHUNK)  # the bits of s, mirrored at the binary point
    for bit in range(32):
        offsets += (slots >> bit & 1) * 0.5 ** (bit + 1)
    levels = (permutations.T + offsets) / global_batch_size + uniforms(seed, batch, 1, _SHIFT_STREAM)
    return np.ascontiguousarray(levels - np.floor(levels))


def _cut_into_blocks(
    num_sequences: int, length: int, block_size: int, is_supervised: Tensor | None, document_starts: Tensor | None
) -> _Blocks:
    places = np.arange(length)
    if document_starts is None:
        if length % block_size:
            raise ValueError(f"block_size {block_size} must divide the sequence length {length}")
        starts = np.zeros((num_sequences, length), dtype=np.int64)
    else:
        starts = document_starts.numpy()
        begins = starts == places
        if not begins[:, 0].all() or not (begins[:, 1:] | (starts[:, 1:] == starts[:, :-1])).all():
            raise ValueError("document_starts: each token must name its own place or the same start as the one before")
    sequences, first_places = np.nonzero((places - starts) % block_size == 0)
    firsts = sequences * length + first_places
    lengths = np.diff(firsts, append=num_sequences * length)
    columns = np.arange(block_size)
    is_token = columns < lengths[:, None]
    block_places = np.minimum(first_places[:, None] + columns, length - 1)
    if is_supervised is None:
        is_maskable = is_token
    else:
        is_maskable = is_token & is_supervised.numpy()[sequences[:, None], block_places]
    return _Blocks(sequences, block_places, is_token, is_maskable)[np.any(is_maskable, axis=1)]


def _choose_blocks(
    blocks: _Blocks, stream_positions: Tensor, seed: int, num_blocks: np.ndarray, mean_chosen: np.ndarray
) -> _Blocks:
    """Of each sequence's ``num_blocks`` [B], floor(mean_chosen + u) blocks, uniformly."""
    is_chosen = np.zeros(len(blocks.sequences), dtype=bool)
    first = 0
    for position, count, mean in zip(stream_positions.tolist(), num_blocks, mean_chosen, strict=True):
        draws = uniforms(seed, position, 1 + count, _BLOCK_STREAM)
        num_chosen = min(int(mean + draws[0]), math.ceil(mean))  # the sum may round up to an integer
        is_chosen[first + draws[1:].argsort(kind="stable")[:num_chosen]] = True
        first += count
    return blocks[is_chosen]


def _draws(blocks: _Blocks, stream_positions: Tensor, spec: NoiseSpec, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Levels float64 [M] and token draws float64 [M, T]: of a sequence's numbers the first is its t, the next L are its
    tokens' by place, then come its chosen blocks' in order."""
    levels, token_draws = np.empty(len(blocks.sequences)), np.empty(blocks.places.shape)
    first = 0
    for position, count in zip(stream_positions.tolist(), blocks.counts(len(stream_positions)), strict=True):
        own = slice(first, first + count)
        draws = uniforms(spec.seed, position, 1 + length + count)
        token_draws[own] = draws[1 + blocks.places[own]]
        num_levels = 1 if spec.sampler == BERNOULLI else count
        if spec.shared_noise_level:
            levels[own] = uniforms(spec.seed, position // spec.global_batch_size, 1, _SHARED_STREAM)
        elif spec.stratify == STRATIFY_BATCH:
            levels[own] = stratified_levels(spec.seed, position, spec.global_batch_size, num_levels)
        else:
            levels[own] = draws[:1] if spec.sampler == BERNOULLI else draws[1 + length :]
        first += count
    return levels, token_draws


def _lay_out(
    tokens: np.ndarray, num_rows: int, mask_token_id: int, blocks: _Blocks, is_masked: np.ndarray, weights: np.ndarray
) -> Corruption:
    """Rows of blocks whose copies are masked where ``is_masked`` [C, M, T] and weigh ``weights`` [C, M]."""
    num_sequences, num_copies = len(tokens), len(is_masked)
    num_maskable, num_masked = blocks.is_maskable.sum(axis=1), is_masked.sum(axis=2)
    mask_ratios = (num_masked / num_maskable).ravel()
    totals = num_copies * np.bincount(blocks.sequences, weights=num_maskable, minlength=num_sequences)
    masked_totals = np.bincount(blocks.sequences, weights=num_masked.sum(axis=0), minlength=num_sequences)

    # Copies of blocks in the order of their rows: sequence by sequence, its first copies before its second ones.
    order = np.tile(blocks.sequences, num_copies).argsort(kind="stable")
    originals = np.tile(np.arange(len(blocks.sequences)), num_copies)[order]
    sequences, is_token = blocks.sequences[originals], blocks.is_token[originals]
    lengths = is_token.sum(axis=1)
    row_sequences = sequences.repeat(lengths)
    rows = (row_sequences, _numbers_within(row_sequences))
    row_places = blocks.places[originals][is_token]
    row_is_masked = is_masked.reshape(-1, is_masked.shape[2])[order][is_token]

    shape = (num_sequences, num_rows)
    noisy_tokens, places, numbers = np.full(shape, mask_token_id), np.full(shape, -1), np.full(shape, -1)
    row_weights, row_ratios = np.zeros(shape), np.zeros(shape, dtype=np.float32)
    noisy_tokens[rows] = np.where(row_is_masked, mask_token_id, tokens[row_sequences, row_places])
    places[rows] = row_places
    numbers[rows] = _numbers_within(sequences).repeat(lengths)
    row_weights[rows] = np.where(row_is_masked, weights.ravel()[order].repeat(lengths), 0.0)
    row_ratios[rows] = mask_ratios[order].repeat(lengths)
    return Corruption(
        noisy_tokens=torch.from_numpy(noisy_tokens),
        places=torch.from_numpy(places),
        blocks=torch.from_numpy(numbers),
        weights=torch.from_numpy(row_weights),
        mask_ratios=torch.from_numpy(row_ratios),
        sequence_ratios=torch.from_numpy(masked_totals / np.maximum(totals, 1)),
    )


def _numbers_within(sequences: np.ndarray) -> np.ndarray:
    """Of sorted sequence numbers: how many equal ones stand before each."""
    return np.arange(len(sequences)) - np.searchsorted(sequences, sequences)
