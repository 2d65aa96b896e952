"""The law of one block's masked set, sampler by sampler, written out slowly: every subset, no random numbers."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nld_train.objective.samplers import BERNOULLI, BERNOULLI_PER_BLOCK, POSITION_WEIGHTED, UNIFORM_COUNT, NoiseSpec


@dataclass(frozen=True, slots=True)
class MaskedSet:
    """One masked set of a block.

    ``masked``: indices inside the block, ascending, at least one. ``probability``: how many noisy copies of the block
    have this set, in the mean (with one copy its probability). ``weight``: mean weight of a masked token given the set.
    """

    masked: tuple[int, ...]
    probability: float
    weight: float


def enumerate_masked_sets(spec: NoiseSpec, maskable: Sequence[int]) -> list[MaskedSet]:
    """All masked sets but the empty one. The expected diffusion loss of the block, with copies and any noisy fraction,
    is the sum over sets of probability * weight * (sum of the masked tokens' cross-entropies given the set).

    Args:
        spec: the sampler; ``stratify`` and ``noisy_fraction`` do not matter.
        maskable: indices inside the block of the tokens that may be masked.
    """
    return [
        MaskedSet(masked=masked, probability=probability, weight=weighted / probability)
        for size in range(1, len(maskable) + 1)
        for masked in itertools.combinations(maskable, size)
        for probability, weighted in [_moments(spec, masked, maskable)]
    ]


def _moments(spec: NoiseSpec, masked: tuple[int, ...], maskable: Sequence[int]) -> tuple[float, float]:
    """E[copies with this set] and E[their weights]."""
    n, k = len(maskable), len(masked)
    if spec.sampler in (BERNOULLI, BERNOULLI_PER_BLOCK):

        def chance(p: float) -> float:
            return p**k * (1 - p) ** (n - k)

        if not spec.complementary:
            return _mean(chance, spec.eps, 1.0), _mean(lambda p: chance(p) / p, spec.eps, 1.0)
        low, high = spec.eps, 1.0 - spec.eps
        first = _mean(chance, low, high), _mean(lambda p: chance(p) / (2 * p), low, high)
        second = (
            _mean(lambda p: chance(1 - p), low, high),
            _mean(lambda p: chance(1 - p) / (2 * (1 - p)), low, high),
        )
        return first[0] + second[0], first[1] + second[1]
    if spec.sampler == POSITION_WEIGHTED:
        # m is cut where ceil(m * n) = k; in x = log(m) the integrands are smooth down to small eps.
        low, high = math.log(max(spec.eps, (k - 1) / n, 1e-300)), math.log(max(spec.eps, k / n))

        def density(x: float) -> float:
            return _chance_without_replacement(spec, math.exp(x), masked, maskable) / (1.0 - spec.eps)

        return (
            _mean(lambda x: density(x) * math.exp(x), low, high) * (high - low),
            _mean(density, low, high) * (high - low),
        )
    power = 0.0 if spec.sampler == UNIFORM_COUNT else -0.5
    total = sum(count**power for count in range(1, n + 1))
    copies = k**power / total
    if spec.complementary and k < n:
        copies += (n - k) ** power / total
    probability = copies / math.comb(n, k)
    return probability, probability / (k * copies)


def _mean(function: Callable[[float], float], low: float, high: float) -> float:
    """Over [low, high], by Gauss-Legendre: exact for the polynomials here."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    values = [function(low + (high - low) * (node + 1) / 2) for node in nodes.tolist()]
    return sum(value * weight / 2 for value, weight in zip(values, weights.tolist(), strict=True))


def _chance_without_replacement(
    spec: NoiseSpec, ratio: float, masked: tuple[int, ...], maskable: Sequence[int]
) -> float:
    """Chance that the drawn tokens are ``masked``, in any order."""
    rate = math.log(2) / (spec.half_life_ratio * spec.block_size)
    chances = {index: math.exp(rate * (1 - ratio) * index) for index in maskable}

    def orders() -> Iterator[float]:
        for order in itertools.permutations(masked):
            left, chance = sum(chances.values()), 1.0
            for index in order:
                chance *= chances[index] / left
                left -= chances[index]
            yield chance

    return sum(orders())
