"""Estimators of the diffusion loss: which tokens of a block are masked, and what their losses weigh.

Noisy blocks do not see each other, so only the law of one block's masked set S matters for the expected loss, and

    ∫₀¹ (1/t) E_{Bernoulli(t)}[Σ_{i∈S} ℓ_i(S)] dt  =  Σ_k (1/k) E_{|S|=k}[Σ_{i∈S} ℓ_i(S)]

(a Beta integral): drawing a count k from any q and weighing 1/(k q_k) estimates the same loss as drawing a ratio t and
weighing 1/t, with smaller weights. Everything here is a function of uniform numbers; where they come from is
:mod:`nld_train.objective.noise`.

Dimensions: M noisy blocks of a micro-batch, T = block_size columns (the tokens of a block, the last of a short block
absent), C copies (2 if complementary, else 1), n maskable tokens of a block: those that are supervised.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

BERNOULLI = "bernoulli"
"""The recipe: t per sequence, p = (1 - eps) * t + eps, every maskable token with chance p, weight 1/p."""
BERNOULLI_PER_BLOCK = "bernoulli_per_block"
"""The same with a t of its own for each block."""
UNIFORM_COUNT = "uniform_count"
"""k uniform on 1..n, every subset of k tokens alike, weight n/k."""
POWER_COUNT = "power_count"
"""k from q_k proportional to k^-1/2 on 1..n, every subset of k tokens alike, weight 1/(k * q_k)."""
POSITION_WEIGHTED = "position_weighted"
"""Efficient-DLM: m = (1 - eps) * u + eps per block, k = ceil(m * n) tokens drawn one after another without replacement,
token i of the block (counted from its first token) with a chance proportional to exp(lambda * (1 - m) * i), lambda =
ln 2 / (half_life_ratio * block_size); weight 1/m. Later tokens are masked more often when few are masked. An objective
of its own: its expectation is not that of the other samplers, nor a bound on the likelihood."""
SAMPLERS = (BERNOULLI, BERNOULLI_PER_BLOCK, UNIFORM_COUNT, POWER_COUNT, POSITION_WEIGHTED)

STRATIFY_NONE = "none"
"""The levels (t, u) of blocks are independent."""
STRATIFY_BATCH = "batch"
"""The levels of a global batch are evenly spread; each is still U[0, 1)."""


@dataclass(frozen=True, slots=True)
class NoiseSpec:
    """How tokens are chosen.

    Args:
        mask_token_id: id that replaces a chosen token.
        eps: smallest masking probability, p = (1 - eps) * t + eps; complementary: p = eps + (1 - 2 * eps) * t. Not
            used by the count samplers.
        seed: of the run.
        block_size: tokens of a diffusion block.
        sampler: one of :data:`SAMPLERS`.
        stratify: :data:`STRATIFY_NONE` or :data:`STRATIFY_BATCH`.
        shared_noise_level: of ``bernoulli``: one t for all samples of a global batch (what the technical report's
            data-parallel ranks with ratios of their own are compared with).
        complementary: two noisy copies of each noisy block; the second masks the maskable tokens that the first leaves.
            Same expected loss (with eps, the masking probability is cut at both ends), summed over both copies.
        noisy_fraction: rho, share of a sequence's blocks that become noisy rows, 0 < rho <= 1.
        global_batch_size: samples of a step over all ranks; used, and then needed, with ``stratify`` batch and with
            ``shared_noise_level``.
        half_life_ratio: of ``position_weighted``, in blocks.
        row_multiple: the number of noisy rows is rounded up to a multiple of it by padding rows.

    Raises:
        ValueError: a value, or the pair of ``complementary`` and ``position_weighted``, is out of range.
    """

    mask_token_id: int
    eps: float
    seed: int
    block_size: int
    sampler: str = BERNOULLI
    stratify: str = STRATIFY_NONE
    shared_noise_level: bool = False
    complementary: bool = False
    noisy_fraction: float = 1.0
    global_batch_size: int = 0
    half_life_ratio: float = 0.25
    row_multiple: int = 1

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r}: choose one of {', '.join(SAMPLERS)}")
        if self.stratify not in (STRATIFY_NONE, STRATIFY_BATCH):
            raise ValueError(f"stratify {self.stratify!r}: choose {STRATIFY_NONE} or {STRATIFY_BATCH}")
        if self.complementary and self.sampler == POSITION_WEIGHTED:
            raise ValueError(
                f"complementary with sampler {POSITION_WEIGHTED}: the complement of its set follows another law, for "
                f"which there is no weight; choose another sampler or complementary false"
            )
        if self.shared_noise_level and (self.sampler != BERNOULLI or self.stratify != STRATIFY_NONE):
            raise ValueError(f"shared_noise_level is of sampler {BERNOULLI} with stratify {STRATIFY_NONE}")
        if (self.stratify == STRATIFY_BATCH or self.shared_noise_level) and self.global_batch_size < 1:
            raise ValueError(
                f"global_batch_size {self.global_batch_size}: stratify {STRATIFY_BATCH} and shared_noise_level need "
                "the true one"
            )
        if self.block_size < 1:
            raise ValueError(f"block_size {self.block_size} must be positive")
        if not 0 < self.noisy_fraction <= 1:
            raise ValueError(f"noisy_fraction {self.noisy_fraction} must be above 0 and at most 1")
        if not 0 <= self.eps < (0.5 if self.complementary else 1):
            raise ValueError(f"eps {self.eps} must be at least 0 and below 1 (complementary: below 0.5)")
        if self.half_life_ratio <= 0:
            raise ValueError(f"half_life_ratio {self.half_life_ratio} must be positive")

    @property
    def num_copies(self) -> int:
        """C, noisy copies of a noisy block."""
        return 2 if self.complementary else 1


def draw_masks(
    spec: NoiseSpec, levels: np.ndarray, token_draws: np.ndarray, is_maskable: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Masked sets of M blocks, and what a masked token's cross-entropy weighs.

    Complementary counts: k is drawn from q, the first copy masks S with |S| = k, the second the other n - k. A set of
    count j is then drawn q_j + q_{n-j} times in the mean (q_0 = 0), and weighs 1/(j * (q_j + q_{n-j})) in either copy:
    the mean of the two copies' 1/(j * q_j) would be biased. Complementary Bernoulli: weights 1/(2p) and 1/(2(1-p)).

    Args:
        spec: see :class:`NoiseSpec`; what it says beyond a block is not used.
        levels: float64 [M] in [0, 1), each block's t or u.
        token_draws: float64 [M, T] in [0, 1), independent.
        is_maskable: bool [M, T], at least one in each row.

    Returns:
        is_masked bool [C, M, T]; weights float64 [C, M], 0 where a copy masks nothing.
    """
    if spec.sampler in (BERNOULLI, BERNOULLI_PER_BLOCK):
        return _bernoulli(spec, levels, token_draws, is_maskable)
    if spec.sampler == POSITION_WEIGHTED:
        return _position_weighted(spec, levels, token_draws, is_maskable)
    return _counts(spec, levels, token_draws, is_maskable)


def _bernoulli(
    spec: NoiseSpec, levels: np.ndarray, token_draws: np.ndarray, is_maskable: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if not spec.complementary:
        p_mask = (1.0 - spec.eps) * levels + spec.eps
        is_masked = ((token_draws < p_mask[:, None]) & is_maskable)[None]
        return is_masked, _inverse_of_used(p_mask[None], is_masked)
    p_mask = spec.eps + (1.0 - 2.0 * spec.eps) * levels
    is_below = token_draws < p_mask[:, None]
    is_masked = np.stack([is_below & is_maskable, ~is_below & is_maskable])
    return is_masked, _inverse_of_used(2.0 * np.stack([p_mask, 1.0 - p_mask]), is_masked)


def _counts(
    spec: NoiseSpec, levels: np.ndarray, token_draws: np.ndarray, is_maskable: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    masses, cumulative = count_masses(spec.sampler, spec.block_size)
    num_maskable = is_maskable.sum(axis=1)
    totals = cumulative[num_maskable]
    # Inverse of the distribution function; rounding must not go beyond n.
    counts = np.minimum(np.searchsorted(cumulative[1:], levels * totals, side="right") + 1, num_maskable)
    is_masked = _smallest(np.where(is_maskable, token_draws, np.inf), counts)[None]
    set_masses = masses[counts][None]
    if spec.complementary:
        is_masked = np.concatenate([is_masked, is_maskable & ~is_masked])
        counts = np.stack([counts, num_maskable - counts])
        set_masses = masses[counts] + masses[counts[::-1]]
    return is_masked, _inverse_of_used(counts * set_masses / totals, is_masked)


def _position_weighted(
    spec: NoiseSpec, levels: np.ndarray, token_draws: np.ndarray, is_maskable: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    ratios = (1.0 - spec.eps) * levels + spec.eps
    counts = np.ceil(ratios * is_maskable.sum(axis=1)).astype(np.int64)
    rate = np.log(2.0) / (spec.half_life_ratio * spec.block_size)
    log_chances = rate * (1.0 - ratios[:, None]) * np.arange(spec.block_size)
    # An exponential race: of tokens that arrive after Exp(1) / chance, the first k are k draws without replacement.
    with np.errstate(divide="ignore"):  # a draw of 0 arrives first
        arrivals = np.log(-np.log1p(-token_draws)) - log_chances
    is_masked = _smallest(np.where(is_maskable, arrivals, np.inf), counts)[None]
    return is_masked, _inverse_of_used(ratios[None], is_masked)


@lru_cache(maxsize=8)
def count_masses(sampler: str, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The law of the count in a block of n tokens, q_k = masses[k] / cumulative[n].

    Args:
        sampler: :data:`UNIFORM_COUNT` or :data:`POWER_COUNT`.
        block_size: the largest n.

    Returns:
        masses float64 [block_size + 1], the first 0, and their running sums. Shared: do not write.
    """
    counts = np.arange(1, block_size + 1, dtype=np.float64)
    masses = np.concatenate([[0.0], np.ones_like(counts) if sampler == UNIFORM_COUNT else 1.0 / np.sqrt(counts)])
    return masses, masses.cumsum()


def _smallest(keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """bool [M, T]: the ``counts`` [M] smallest of each row of ``keys`` [M, T]; exactly so many, also with ties."""
    is_chosen = np.zeros(keys.shape, dtype=bool)
    order = keys.argsort(axis=1, kind="stable")
    np.put_along_axis(is_chosen, order, np.arange(keys.shape[1]) < counts[:, None], axis=1)
    return is_chosen


def _inverse_of_used(values: np.ndarray, is_masked: np.ndarray) -> np.ndarray:
    """1 / values [C, M] where a set is not empty, else 0."""
    return np.divide(1.0, values, out=np.zeros_like(values), where=is_masked.any(axis=2))
