"""Likelihood of text: AR, and the bound of block diffusion, per token and per byte.

The bound of a block of n maskable tokens given its clean prefix is

    -log p(block) <= sum over k = 1..n of (1/k) E_{|S| = k}[sum of the cross-entropies of the masked tokens, S]

with S uniform among the sets of k tokens (see :mod:`nld_train.objective.samplers`). It is estimated in sweeps: in each,
every block is evaluated once with every count k, so that only the choice of S is left to chance. All blocks of a text
are evaluated in the same forward, since noisy blocks do not see each other.

The first token of a text is given: AR cannot predict it, so diffusion does not have to either (it is never masked).
Both numbers are then likelihoods of the same tokens. L tokens of a text, M blocks, T tokens of a block, R sweeps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nld_train.errors import DataError
from nld_train.evaluation.reader import CleanPrefix
from nld_train.objective.losses import NUM_BUCKETS


@dataclass(frozen=True, slots=True)
class Text:
    """A document, or a window of one.

    Args:
        source: whose it is; the error over texts is one over sources.
        token_ids: int64 [L], L >= 2.
        num_bytes: UTF-8 bytes of all tokens but the first.
    """

    source: int
    token_ids: Tensor
    num_bytes: int


class Likelihood(TypedDict):
    """Means over all scored tokens. ``error_over_texts`` and ``error_of_estimate`` are standard errors of
    ``nats_per_token``: from the choice of the texts (nan with one source), and from that of the masks (0 for AR)."""

    nats_per_token: float
    bits_per_token: float
    nats_per_byte: float
    bits_per_byte: float
    error_over_texts: float
    error_of_estimate: float


class Bucket(TypedDict):
    """Mean cross-entropy of masked tokens whose block is masked to a share in (``low``, ``high``]."""

    low: float
    high: float
    nats_per_masked_token: float
    num_masked: int


class BlockLikelihood(Likelihood):
    block_size: int
    buckets: list[Bucket]


class LikelihoodResult(TypedDict):
    num_sources: int
    num_texts: int
    num_tokens: int
    num_bytes: int
    num_sweeps: int
    seed: int
    ar: Likelihood
    diffusion: list[BlockLikelihood]


@dataclass(slots=True)
class BoundSample:
    """Estimates of one text: ``nats`` float64 [R, M], one for each sweep and block; ``bucket_sums`` and
    ``bucket_counts`` float64 [NUM_BUCKETS], unweighted cross-entropies of masked tokens."""

    nats: Tensor
    bucket_sums: Tensor = field(default_factory=lambda: torch.zeros(NUM_BUCKETS, dtype=torch.float64))
    bucket_counts: Tensor = field(default_factory=lambda: torch.zeros(NUM_BUCKETS, dtype=torch.float64))


def tokenize(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], max_length: int, max_windows: int | None = None
) -> list[Text]:
    """Cut documents into windows of at most ``max_length`` tokens; of each the first ``max_windows`` (None: all).

    Windows of fewer than two tokens are left out.

    Bytes are counted by the tokenizer's offsets: where a window ends inside a character, that counts as a whole.

    Raises:
        DataError: nothing is left, or the tokenizer gives no offsets.
    """
    if not tokenizer.is_fast:
        raise DataError("tokenizer", "gives no offsets, which counting bytes needs", "export with a fast tokenizer")
    texts = []
    for source, document in enumerate(documents):
        encoded = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
        for start in range(0, len(ids), max_length)[:max_windows]:
            window = ids[start : start + max_length]
            if len(window) >= 2:
                scored = document[ends[start] : ends[start + len(window) - 1]]
                texts.append(Text(source, torch.tensor(window), len(scored.encode())))
    if not texts:
        raise DataError("texts", "none has two tokens or more", "name longer texts")
    return texts


def sample_bound(
    model: Any,
    prefix: CleanPrefix,
    token_ids: Tensor,
    block_size: int,
    num_sweeps: int,
    generator: torch.Generator,
    *,
    first: int = 0,
    num_given: int = 1,
) -> BoundSample:
    """Estimate the bound of one text that ``prefix`` has read.

    Args:
        model: an exported model.
        prefix: holds ``token_ids`` and nothing else.
        token_ids: int64 [L].
        block_size: T.
        num_sweeps: R.
        generator: on the CPU; draws the masked sets.
        first: where the first block begins; 0: blocks are cut at multiples of T, as in training.
        num_given: tokens [0, num_given) are given, never masked; in [first, L).
    """
    length = len(token_ids) - first
    blocks = torch.arange(length) // block_size
    num_blocks = int(blocks[-1]) + 1
    is_maskable = torch.arange(num_blocks * block_size) + first >= num_given
    is_maskable[length:] = False
    is_maskable = is_maskable.view(num_blocks, block_size)
    num_maskable = is_maskable.sum(dim=1)
    found = BoundSample(torch.zeros(num_sweeps, num_blocks, dtype=torch.float64))
    noisy_ids, device = token_ids[first:], token_ids.device
    starts = first + blocks * block_size
    layout = [tensor.to(device) for tensor in (first + torch.arange(length), blocks, starts)]
    for sweep in range(num_sweeps):
        # Each block goes through its counts in an order of its own, so that every forward holds many counts.
        order = torch.rand(num_blocks, block_size, generator=generator, dtype=torch.float64)
        counts = order.masked_fill(torch.arange(block_size) >= num_maskable[:, None], 2.0).argsort(dim=1) + 1
        for step in range(int(num_maskable.max())):
            sizes = torch.where(step < num_maskable, counts[:, step], 0)  # 0: this block has had all its counts
            draws = torch.rand(num_blocks, block_size, generator=generator, dtype=torch.float64)
            rank = draws.masked_fill(~is_maskable, 2.0).argsort(dim=1).argsort(dim=1)
            is_masked = (rank < sizes[:, None]).flatten()[:length]
            noisy = noisy_ids.masked_fill(is_masked.to(device), model.config.mask_token_id)
            log_p = prefix.denoise(noisy, *layout)
            losses = -log_p.gather(1, noisy_ids[:, None])[:, 0].double().cpu() * is_masked
            sums = torch.zeros(num_blocks, dtype=torch.float64).index_add_(0, blocks, losses)
            found.nats[sweep] += sums / sizes.clamp_min(1)
            share = sizes / num_maskable.clamp_min(1)
            bucket = (share * NUM_BUCKETS).ceil().sub(1).clamp(0, NUM_BUCKETS - 1).long()[blocks]
            found.bucket_sums.index_add_(0, bucket, losses)
            found.bucket_counts.index_add_(0, bucket, is_masked.double())
    return found


def measure_likelihood(
    model: Any,
    texts: Sequence[Text],
    *,
    block_sizes: Sequence[int],
    num_sweeps: int = 2,
    seed: int = 1234,
    on_text: Callable[[], None] = lambda: None,
) -> LikelihoodResult:
    """AR likelihood and the diffusion bound at each block size.

    Args:
        model: an exported model.
        texts: of :func:`tokenize`.
        block_sizes: each costs its own number of forwards per sweep and text.
        num_sweeps: R, at least 2: the error of the estimate comes from their spread.
        on_text: called after each text.
    """
    if num_sweeps < 2:
        raise ValueError(f"num_sweeps: {num_sweeps}; it must be at least 2, for the error of the estimate")
    generator = torch.Generator().manual_seed(seed)
    ar_nats: list[float] = []
    bounds: dict[int, list[BoundSample]] = {size: [] for size in block_sizes}
    for text in texts:
        token_ids = text.token_ids.to(model.device)
        prefix = CleanPrefix(model)
        log_p = prefix.read(token_ids)
        ar_nats.append(-log_p[:-1].gather(1, token_ids[1:, None]).double().sum().item())
        for size, samples in bounds.items():
            samples.append(sample_bound(model, prefix, token_ids, size, num_sweeps, generator))
        on_text()
    diffusion: list[BlockLikelihood] = []
    for size, samples in bounds.items():
        nats = [sample.nats.mean(dim=0).sum().item() for sample in samples]
        variance = sum(sample.nats.var(dim=0).sum().item() / num_sweeps for sample in samples)
        sums = torch.stack([sample.bucket_sums for sample in samples]).sum(dim=0).tolist()
        counts = torch.stack([sample.bucket_counts for sample in samples]).sum(dim=0).tolist()
        buckets = [
            Bucket(
                low=index / NUM_BUCKETS,
                high=(index + 1) / NUM_BUCKETS,
                nats_per_masked_token=sums[index] / counts[index],
                num_masked=int(counts[index]),
            )
            for index in range(NUM_BUCKETS)
            if counts[index]
        ]
        diffusion.append(BlockLikelihood(**_means(texts, nats, variance), block_size=size, buckets=buckets))
    return LikelihoodResult(
        num_sources=len({text.source for text in texts}),
        num_texts=len(texts),
        num_tokens=sum(len(text.token_ids) - 1 for text in texts),
        num_bytes=sum(text.num_bytes for text in texts),
        num_sweeps=num_sweeps,
        seed=seed,
        ar=_means(texts, ar_nats, 0.0),
        diffusion=diffusion,
    )


def _means(texts: Sequence[Text], nats: Sequence[float], variance: float) -> Likelihood:
    """``variance``: of the sum of ``nats``, from the masks."""
    num_tokens = sum(len(text.token_ids) - 1 for text in texts)
    num_bytes = sum(text.num_bytes for text in texts)
    mean = math.fsum(nats) / num_tokens
    # The error of a ratio of sums over sources, from each source's distance to what its tokens let expect.
    distances: dict[int, float] = {}
    for text, value in zip(texts, nats, strict=True):
        distances[text.source] = distances.get(text.source, 0.0) + value - mean * (len(text.token_ids) - 1)
    count = len(distances)
    spread = math.sqrt(sum(d * d for d in distances.values()) * count / (count - 1)) if count > 1 else math.nan
    per_byte = math.fsum(nats) / num_bytes
    return Likelihood(
        nats_per_token=mean,
        bits_per_token=mean / math.log(2),
        nats_per_byte=per_byte,
        bits_per_byte=per_byte / math.log(2),
        error_over_texts=spread / num_tokens,
        error_of_estimate=math.sqrt(variance) / num_tokens,
    )
