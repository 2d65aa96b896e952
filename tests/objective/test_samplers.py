"""Estimators of the diffusion loss against every masked set written out, and the rows against loops.

B sequences, L tokens of a sequence, N noisy rows.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nld_train.objective.noise import Corruption, corrupt, stratified_levels, uniforms
from nld_train.objective.samplers import (
    BERNOULLI,
    BERNOULLI_PER_BLOCK,
    POSITION_WEIGHTED,
    POWER_COUNT,
    SAMPLERS,
    STRATIFY_BATCH,
    UNIFORM_COUNT,
    NoiseSpec,
)
from nld_train.testing.enumeration import enumerate_masked_sets

MASK = 3
BLOCK_SIZE = 5
LENGTH = 15
# The documents have 8 and 7 tokens, their blocks 5, 3, 5 and 2; the last block is not supervised at all.
DOCUMENT_STARTS = [0] * 8 + [8] * 7
UNSUPERVISED = (2, 13, 14)
SPEC = NoiseSpec(mask_token_id=MASK, eps=0.05, seed=17, block_size=BLOCK_SIZE)

VARIANTS = {
    "plain": {},
    "complementary": {"complementary": True},
    "fraction": {"noisy_fraction": 0.5},
    "one_block": {"noisy_fraction": 0.2},
    "stratified": {"stratify": STRATIFY_BATCH, "global_batch_size": 16},
    "documents": {},
    "documents_fraction": {"noisy_fraction": 0.4},
    "all": {"complementary": True, "noisy_fraction": 0.5, "stratify": STRATIFY_BATCH, "global_batch_size": 16},
}
CASES = [
    (sampler, variant)
    for sampler, variant in itertools.product(SAMPLERS, VARIANTS)
    if (sampler, variant) != (POSITION_WEIGHTED, "complementary")  # refused
]
WITH_DOCUMENTS = ("documents", "documents_fraction", "all")


def spec_of(sampler: str, **fields) -> NoiseSpec:
    if sampler == POSITION_WEIGHTED:
        fields["complementary"] = False
    return replace(SPEC, sampler=sampler, **fields)


def tokens_of(num_sequences: int, length: int) -> torch.Tensor:
    return 1000 + torch.arange(num_sequences * length).reshape(num_sequences, length)


def cut(document_starts: list[int], block_size: int) -> list[list[int]]:
    """Places of each block, one token at a time."""
    blocks: list[list[int]] = []
    for place, start in enumerate(document_starts):
        if (place - start) % block_size == 0:
            blocks.append([])
        blocks[-1].append(place)
    return blocks


# ------------------------------------------------------------------------------------- the law, written out by subsets


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 4, 6])
def test_all_samplers_but_position_weighted_estimate_one_loss(num_tokens: int, complementary: bool):
    """The Beta integral: a set of k tokens counts 1 / (k * (n over k))."""
    for sampler in (BERNOULLI, BERNOULLI_PER_BLOCK, UNIFORM_COUNT, POWER_COUNT):
        spec = spec_of(sampler, eps=1e-10, complementary=complementary)
        sets = enumerate_masked_sets(spec, range(num_tokens))
        assert len(sets) == 2**num_tokens - 1
        for one in sets:
            size = len(one.masked)
            expected = 1 / (size * math.comb(num_tokens, size))
            assert one.probability * one.weight == pytest.approx(expected, rel=1e-8), (sampler, one)


def test_the_position_weighted_law_by_hand():
    """Two tokens: m <= 1/2 masks one of them with odds 1 : 2^(1-m) (a half-life of one token), m > 1/2 both."""
    spec = spec_of(POSITION_WEIGHTED, eps=0.1, block_size=2, half_life_ratio=0.5)
    sets = {one.masked: one for one in enumerate_masked_sets(spec, range(2))}
    m = 0.1 + 0.4 * (np.arange(200_000) + 0.5) / 200_000
    first = 1 / (1 + 2 ** (1 - m))
    assert sets[(0,)].probability == pytest.approx(first.mean() * 0.4 / 0.9, rel=1e-9)
    assert sets[(0,)].weight == pytest.approx((first / m).mean() / first.mean(), rel=1e-9)
    assert sets[(1,)].probability == pytest.approx((1 - first).mean() * 0.4 / 0.9, rel=1e-9)
    assert sets[(0, 1)].probability == pytest.approx(0.5 / 0.9, rel=1e-12)
    assert sets[(0, 1)].weight == pytest.approx(math.log(2) / 0.5, rel=1e-12)


def random_losses(blocks: list[list[int]]) -> np.ndarray:
    """float64 [tables, place, set, place's block's index]: token i's loss given its block's masked set (bits), made up.

    One table is arbitrary; each other is not 0 only for sets of one size, so that no two errors cancel."""
    values = np.random.default_rng(5).random((len(blocks), 2**BLOCK_SIZE, BLOCK_SIZE))
    sizes = np.array([code.bit_count() for code in range(2**BLOCK_SIZE)])
    return np.stack([values] + [values * (sizes == size)[:, None] for size in range(1, BLOCK_SIZE + 1)])


def estimates(corruption: Corruption, blocks: list[list[int]], losses: np.ndarray) -> np.ndarray:
    """float64 [tables, B]: the weighted losses of each sequence, the set read off the tokens that the model sees."""
    block_of = np.array([number for number, block in enumerate(blocks) for _ in block])
    index_of = np.array([index for block in blocks for index in range(len(block))])
    sequences, rows = np.nonzero((corruption.noisy_tokens == MASK).numpy() & (corruption.places >= 0).numpy())
    places, numbers = corruption.places.numpy()[sequences, rows], corruption.blocks.numpy()[sequences, rows]
    codes = np.zeros((len(corruption.places), 2 * len(blocks)), dtype=np.int64)
    np.add.at(codes, (sequences, numbers), 1 << index_of[places])
    values = losses[:, block_of[places], codes[sequences, numbers], index_of[places]]
    weighted = values * corruption.weights.numpy()[sequences, rows]
    return np.stack([np.bincount(sequences, weights=one, minlength=len(codes)) for one in weighted])


@pytest.mark.parametrize(("sampler", "variant"), CASES)
def test_the_mean_over_draws_is_the_enumerated_loss(sampler: str, variant: str):
    spec = spec_of(sampler, **VARIANTS[variant])
    num_sequences, group = 8192, 16
    starts = DOCUMENT_STARTS if variant in WITH_DOCUMENTS else [0] * LENGTH
    blocks = cut(starts, BLOCK_SIZE)
    is_supervised = torch.ones(LENGTH, dtype=torch.bool)
    if variant == "all":
        is_supervised[list(UNSUPERVISED)] = False
    corruption = corrupt(
        tokens_of(num_sequences, LENGTH),
        torch.arange(num_sequences),
        spec,
        is_supervised.expand(num_sequences, -1) if variant == "all" else None,
        torch.tensor(starts).expand(num_sequences, -1) if variant in WITH_DOCUMENTS else None,
    )
    losses = random_losses(blocks)
    drawn = estimates(corruption, blocks, losses)

    expected = np.zeros(len(losses))
    for number, block in enumerate(blocks):
        maskable = [index for index, place in enumerate(block) if is_supervised[place]]
        for one in enumerate_masked_sets(spec, maskable):
            code = sum(1 << index for index in one.masked)
            expected += one.probability * one.weight * losses[:, number, code, list(one.masked)].sum(axis=1)
    means = drawn.reshape(len(losses), -1, group).mean(axis=2)  # stratified: whole batches are independent
    errors = means.std(axis=1, ddof=1) / math.sqrt(means.shape[1])
    assert (errors < 0.05 * expected).all()
    assert (np.abs(means.mean(axis=1) - expected) < 4.5 * errors).all(), (means.mean(axis=1), expected, errors)


# --------------------------------------------------------------------------------------------------- counts and levels


@pytest.mark.parametrize("sampler", [UNIFORM_COUNT, POWER_COUNT, POSITION_WEIGHTED])
def test_exactly_k_tokens_of_each_block_are_masked(sampler: str):
    spec = spec_of(sampler)
    corruption = corrupt(
        tokens_of(64, LENGTH),
        torch.arange(64),
        spec,
        document_starts=torch.tensor(DOCUMENT_STARTS).expand(64, -1),
    )
    for sequence in range(64):
        levels = uniforms(spec.seed, sequence, 1 + LENGTH + 4)[1 + LENGTH :]
        for number, (level, block) in enumerate(zip(levels, cut(DOCUMENT_STARTS, BLOCK_SIZE), strict=True)):
            n = len(block)
            if sampler == POSITION_WEIGHTED:
                ratio = 0.95 * level + 0.05
                count, weight = math.ceil(ratio * n), 1 / ratio
            else:
                power = 0.0 if sampler == UNIFORM_COUNT else -0.5
                q = [k**power / sum(j**power for j in range(1, n + 1)) for k in range(1, n + 1)]
                count = next(k for k in range(1, n + 1) if level < sum(q[:k]) or k == n)
                weight = 1 / (count * q[count - 1])
            rows = corruption.blocks[sequence] == number
            is_masked = corruption.noisy_tokens[sequence, rows] == MASK
            assert is_masked.sum() == count
            assert corruption.weights[sequence, rows].tolist() == pytest.approx(
                (is_masked.double() * weight).tolist(), rel=1e-12
            )
            assert corruption.mask_ratios[sequence, rows].tolist() == pytest.approx([count / n] * n, rel=1e-6)


PINNED = {
    BERNOULLI: [[4, 8, 13, 14], [3, 4, 9]],
    BERNOULLI_PER_BLOCK: [[4, 5, 8, 12, 13, 14], [3, 4, 9]],
    UNIFORM_COUNT: [[0, 4, 5, 6, 8, 9, 12, 13, 14], [0, 3, 4, 5, 6, 7, 9]],
    POWER_COUNT: [[4, 5, 8, 9, 12, 13, 14], [3, 4, 6, 7, 9]],
    POSITION_WEIGHTED: [[0, 4, 5, 7, 8, 9, 12, 13, 14], [2, 3, 4, 6, 7, 8, 9]],
}


def test_masks_are_pinned():
    """They are part of a run's state: a resumed run may live under another numpy."""
    masked = {}
    for sampler in SAMPLERS:
        spec = spec_of(sampler, noisy_fraction=0.7, stratify=STRATIFY_BATCH, global_batch_size=4)
        corruption = corrupt(tokens_of(2, LENGTH), torch.tensor([8, 2**62 + 7]), spec)
        masked[sampler] = [
            places[weights > 0].tolist() for places, weights in zip(corruption.places, corruption.weights, strict=True)
        ]
    assert masked == PINNED


# -------------------------------------------------------------------------------------------- the same bits everywhere


def real_rows(corruption: Corruption, sequence: int) -> list[list]:
    """A sequence's rows without its padding, whose number is the micro-batch's affair."""
    count = int((corruption.places[sequence] >= 0).sum())
    fields = ("noisy_tokens", "places", "blocks", "weights", "mask_ratios")
    return [getattr(corruption, name)[sequence, :count].tolist() for name in fields] + [
        corruption.sequence_ratios[sequence].tolist()
    ]


@pytest.mark.parametrize(("sampler", "variant"), CASES)
def test_any_cut_into_micro_batches_has_the_same_bits(sampler: str, variant: str):
    spec = spec_of(sampler, **VARIANTS[variant])
    tokens, positions = tokens_of(6, 60), torch.tensor([40, 7, 2**62 + 5, 0, 3, 41])
    generator = torch.Generator().manual_seed(1)
    is_supervised = torch.rand(6, 60, generator=generator) < 0.7 if variant == "all" else None
    starts = [torch.rand(60, generator=generator) < 0.1 for _ in range(6)]
    document_starts = torch.stack([torch.where(s, torch.arange(60), 0).cummax(0).values for s in starts])

    def rows_of(chosen: list[int]) -> list:
        corruption = corrupt(
            tokens[chosen],
            positions[chosen],
            spec,
            None if is_supervised is None else is_supervised[chosen],
            document_starts[chosen] if variant in WITH_DOCUMENTS else None,
        )
        return [real_rows(corruption, sequence) for sequence in range(len(chosen))]

    whole = rows_of(list(range(6)))
    for chosen in ([2, 0], [5], [1, 3, 4]):
        assert rows_of(chosen) == [whole[sequence] for sequence in chosen]
    positions[2] += 1
    assert rows_of([2]) != [whole[2]]
    positions[2] -= 1
    spec = replace(spec, seed=spec.seed + 1)
    assert rows_of([2]) != [whole[2]]


def test_a_noisy_fraction_leaves_the_other_draws_alone():
    tokens, positions = tokens_of(4, 60), torch.arange(4)
    whole = corrupt(tokens, positions, spec_of(BERNOULLI))
    part = corrupt(tokens, positions, spec_of(BERNOULLI, noisy_fraction=0.25))
    assert part.places.shape == (4, 15)
    assert torch.equal(part.noisy_tokens, whole.noisy_tokens.gather(1, part.places))
    assert torch.equal(part.weights, 4.0 * whole.weights.gather(1, part.places))


# ----------------------------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize("trial", range(60))
def test_rows_of_random_documents_and_supervision(trial: int):
    """Against loops: which rows there are, in which order, and which of them may be masked."""
    random = np.random.default_rng(trial)
    print("seed", trial)
    block_size = int(random.integers(1, 7))
    length, num_sequences = block_size * int(random.integers(1, 50)), int(random.integers(1, 5))
    has_documents, has_gaps = random.random() < 0.6, random.random() < 0.6
    sampler = SAMPLERS[trial % len(SAMPLERS)]
    spec = spec_of(
        sampler,
        block_size=block_size,
        complementary=bool(random.random() < 0.5),
        noisy_fraction=float(random.choice([1.0, 0.5, 0.3, 0.07])),
        stratify=str(random.choice(["none", "batch"])),
        global_batch_size=4,
    )
    starts = [[0] * length for _ in range(num_sequences)]
    if has_documents:
        length -= int(random.integers(0, block_size))
        begins = random.random((num_sequences, length)) < random.choice([0.02, 0.3])
        starts = np.maximum.accumulate(np.where(begins, np.arange(length), 0), axis=1).tolist()
    is_supervised = np.ones((num_sequences, length), dtype=bool)
    if has_gaps:
        is_supervised = random.random((num_sequences, length)) < random.choice([0.05, 0.8], size=(num_sequences, 1))
    is_supervised[0] &= not has_gaps or trial % 3 > 0  # some micro-batches hold a sequence without any supervised token
    tokens = tokens_of(num_sequences, length)
    corruption = corrupt(
        tokens,
        torch.from_numpy(random.integers(0, 100, num_sequences)),
        spec,
        torch.from_numpy(is_supervised) if has_gaps else None,
        torch.tensor(starts) if has_documents else None,
    )
    num_copies = 2 if spec.complementary else 1
    most_rows = 0
    for sequence in range(num_sequences):
        candidates = [block for block in cut(starts[sequence], block_size) if is_supervised[sequence, block].any()]
        places, numbers = corruption.places[sequence].tolist(), corruption.blocks[sequence].tolist()
        num_rows = sum(place >= 0 for place in places)
        most_rows = max(most_rows, num_rows)
        assert all(place == -1 for place in places[num_rows:])
        rows_of = [[row for row in range(num_rows) if numbers[row] == b] for b in range(max(numbers) + 1)]
        assert list(itertools.chain(*rows_of)) == list(range(num_rows))  # contiguous, in order
        num_chosen = len(rows_of) // num_copies
        mean = max(1, spec.noisy_fraction * len(candidates)) if candidates else 0
        assert math.floor(mean + 1e-9) <= num_chosen <= math.ceil(mean - 1e-9)
        chosen = [[places[row] for row in rows] for rows in rows_of]
        assert chosen[num_chosen:] == chosen[:num_chosen] * (num_copies - 1)
        assert chosen[:num_chosen] == [block for block in candidates if block in chosen]  # whole blocks, ascending
        weights, noisy = corruption.weights[sequence].tolist(), corruption.noisy_tokens[sequence].tolist()
        times_masked = dict.fromkeys(itertools.chain(*chosen), 0)
        for rows in rows_of:
            num_maskable = sum(is_supervised[sequence, places[row]] for row in rows)
            num_masked = sum(noisy[row] == MASK for row in rows)
            for row in rows:
                place, is_masked = places[row], noisy[row] == MASK
                times_masked[place] += is_masked
                assert is_masked or noisy[row] == tokens[sequence, place]
                assert (weights[row] > 0) == is_masked
                assert corruption.mask_ratios[sequence, row] == pytest.approx(num_masked / num_maskable)
            assert len({weights[row] for row in rows if weights[row]}) <= 1
        num_supervised = int(is_supervised[sequence, list(times_masked)].sum()) if times_masked else 0
        for place, times in times_masked.items():
            is_maskable = bool(is_supervised[sequence, place])
            assert times == is_maskable if spec.complementary else times <= is_maskable
        expected = sum(times_masked.values()) / (num_copies * num_supervised) if num_supervised else 0.0
        assert corruption.sequence_ratios[sequence] == pytest.approx(expected, rel=1e-12)
        assert all(noisy[row] == MASK and weights[row] == 0 for row in range(num_rows, len(places)))
        assert not corruption.mask_ratios[sequence, num_rows:].any()
    total = corruption.places.shape[1]
    assert max(1, most_rows) <= total <= num_copies * length
    all_supervised = is_supervised.all()
    if all_supervised and spec.noisy_fraction == 1:
        assert total == num_copies * length
    elif all_supervised and not has_documents:
        num_chosen = max(1, math.ceil(spec.noisy_fraction * (length // block_size) - 1e-9))
        assert total == num_copies * num_chosen * block_size
    else:
        assert total == min(num_copies * length, 128 * max(1, math.ceil(most_rows / 128)))


def test_a_micro_batch_without_a_supervised_token_is_padding():
    for spec in (SPEC, spec_of(POWER_COUNT, complementary=True, noisy_fraction=0.5)):
        corruption = corrupt(tokens_of(2, LENGTH), torch.arange(2), spec, torch.zeros(2, LENGTH, dtype=torch.bool))
        assert corruption.places.shape[1] >= 1
        assert (corruption.places == -1).all()
        assert (corruption.blocks == -1).all()
        assert (corruption.noisy_tokens == MASK).all()
        assert not corruption.weights.any()
        assert corruption.sequence_ratios.tolist() == [0, 0]


@pytest.mark.parametrize(("fraction", "shares"), [(0.5, {2: 1.0}), (0.4, {1: 0.4, 2: 0.6}), (0.1, {1: 1.0})])
def test_every_set_of_blocks_is_chosen_alike(fraction: float, shares: dict[int, float]):
    num_sequences = 4000
    spec = spec_of(UNIFORM_COUNT, noisy_fraction=fraction)
    corruption = corrupt(tokens_of(num_sequences, 20), torch.arange(num_sequences), spec)
    sets = [tuple(sorted({place // 5 for place in row if place >= 0})) for row in corruption.places.tolist()]
    for size, share in shares.items():
        for chosen in itertools.combinations(range(4), size):
            p = share / math.comb(4, size)
            assert abs(sets.count(chosen) / num_sequences - p) < 4.5 * math.sqrt(p * (1 - p) / num_sequences)


# ------------------------------------------------------------------------------------------------------ stratification


def batch_levels(batch: int, size: int, num_slots: int) -> np.ndarray:
    """float64 [G, slots]"""
    return np.stack([stratified_levels(3, batch * size + g, size, num_slots) for g in range(size)])


@pytest.mark.parametrize("num_slots", [1, 2, 7, 32, 64, 100])
def test_levels_of_a_batch_are_evenly_spread(num_slots: int):
    size = 16
    levels = batch_levels(5, size, num_slots)
    assert (levels >= 0).all()
    assert (levels < 1).all()
    assert np.array_equal(levels, batch_levels(5, size, 200)[:, :num_slots])
    for slot in levels.T:
        assert np.diff(np.sort(slot)) == pytest.approx(1 / size, abs=1e-12)
    in_order = np.sort(levels.ravel())
    gaps = np.diff(in_order, append=in_order[0] + 1)
    if num_slots.bit_count() == 1:
        assert gaps == pytest.approx(1 / levels.size, abs=1e-12)
    # The number of levels in any interval: within 1 + log2(m) of its length's share (independent ones: some sqrt(G m)).
    excess = np.arange(levels.size) - levels.size * in_order
    assert excess.max() - excess.min() < 1 + math.log2(num_slots) + 1e-6


def test_each_level_is_uniform_and_slots_are_permuted_apart():
    pairs = np.array([stratified_levels(11, batch * 16 + 3, 16, 40)[[4, 36]] for batch in range(3000)])
    for column in pairs.T:
        deviation = np.abs(np.sort(column) - (np.arange(3000) + 0.5) / 3000).max()
        assert deviation < 1.95 / math.sqrt(3000)  # Kolmogorov-Smirnov, 0.1%
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 4 / math.sqrt(3000)
    assert not np.array_equal(batch_levels(0, 16, 1), batch_levels(1, 16, 1))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stratified_counts_vary_less(sampler: str):
    """The number of masked tokens of a global batch: its variance against independent levels."""
    size, num_batches, length = 32, 40, 80
    variances = {}
    for stratify in ("none", STRATIFY_BATCH):
        spec = spec_of(sampler, stratify=stratify, global_batch_size=size)
        corruption = corrupt(tokens_of(size * num_batches, length), torch.arange(size * num_batches), spec)
        variances[stratify] = float((corruption.weights > 0).sum(1).reshape(-1, size).sum(1).double().var())
    # Bernoulli: the tokens' own coins stay; a t per block: they are half of the variance with 5 tokens.
    bound = {BERNOULLI: 0.2, BERNOULLI_PER_BLOCK: 0.6}.get(sampler, 0.02)
    assert variances[STRATIFY_BATCH] < bound * variances["none"]


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampler": "gaussian"}, "sampler 'gaussian'"),
        ({"stratify": "rank"}, "stratify 'rank'"),
        ({"sampler": POSITION_WEIGHTED, "complementary": True}, "complementary with sampler position_weighted"),
        ({"stratify": STRATIFY_BATCH}, "global_batch_size 0"),
        ({"block_size": 0}, "block_size 0"),
        ({"noisy_fraction": 0.0}, "noisy_fraction 0.0"),
        ({"noisy_fraction": 1.5}, "noisy_fraction 1.5"),
        ({"eps": 1.0}, "eps 1.0"),
        ({"eps": 0.5, "complementary": True}, "eps 0.5"),
        ({"half_life_ratio": 0.0}, "half_life_ratio 0.0"),
    ],
)
def test_a_specification_out_of_range_is_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **fields)


def test_a_length_that_blocks_do_not_fill_and_broken_documents_are_refused():
    with pytest.raises(ValueError, match=r"block_size 5 .* 12"):
        corrupt(tokens_of(1, 12), torch.arange(1), SPEC)
    for starts in ([1, 1, 1], [0, 0, 1], [0, 2, 2]):
        with pytest.raises(ValueError, match="document_starts"):
            corrupt(tokens_of(1, 3), torch.arange(1), SPEC, document_starts=torch.tensor([starts]))
