"""Blends: several corpora read as one stream, each with its share at every moment.

Which corpus sample i is from, and which of that corpus's own samples it is, are closed formulas of i and the weights:
nothing is built, stored or walked through, so sample 10^9 of a resumed run costs what sample 0 costs, and the order
cannot depend on how long a run is. A corpus of its own is an endless :class:`~nld_train.data.dataset.TrainStream`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import Any

from nld_train.config.blends import exact_weights
from nld_train.config.schema import BlendPart, DataConfig
from nld_train.config.validate import find_corpora
from nld_train.data.chat import tokenizer_hash
from nld_train.data.dataset import (
    IndexedSource,
    Sample,
    SizedSource,
    TrainStream,
    ValidationSet,
    validation_position,
)
from nld_train.data.prepare import prepare
from nld_train.data.prepared import TRAIN, VALIDATION, PreparedCorpus
from nld_train.data.progress import PrepareProgress
from nld_train.errors import DataError, Problem

_ORDER_VERSION = 1
"""Raised whenever the same blend gives other samples; part of its hash."""

# ---------------------------------------------------------------------------------------------- the order


@dataclass(frozen=True, slots=True)
class _Node:
    """A set of parts cut in two: of its first n samples the left side has ``share`` / ``total`` * n, rounded."""

    share: int
    total: int
    left: "_Node | int"
    right: "_Node | int"

    def num_left(self, count: int) -> int:
        return (2 * self.share * count + self.total) // (2 * self.total)


class BlendOrder:
    """Which part the i-th sample of a blend is from.

    The parts stand at the leaves of a binary tree, and each node deals its samples to its two sides so that after n of
    them the left side has round(share * n). So each step goes to exactly one side, and how many samples of each part
    are among the first n follows from n alone, by one rounding per level.

    After n samples a part of weight w has w * n within :attr:`largest_error`: at most 1/2 for two parts, less than 1
    for up to four, and for any number what the tree's roundings can add up to (below 1.5 in all random blends tried;
    the greedy rule of stock data sets, which is not known by a formula, reaches 1.3 with three parts).

    Args:
        weights: positive, adding up to 1; equal ones are told apart by their order.
    """

    def __init__(self, weights: Sequence[Fraction]) -> None:
        if not weights or min(weights) <= 0 or sum(weights) != 1:
            raise ValueError(f"weights {[str(weight) for weight in weights]}: must be positive and add up to 1")
        unit = lcm(*(weight.denominator for weight in weights))
        shares = [int(weight * unit) for weight in weights]
        heaviest_first = sorted(range(len(shares)), key=lambda part: (-shares[part], part))
        trees = [_grow(heaviest_first, shares, is_shallow=is_shallow) for is_shallow in (True, False)]
        self._num_parts = len(shares)
        self._root = min(trees, key=lambda tree: _largest_error(tree, shares))
        self.largest_error = _largest_error(self._root, shares)

    def locate(self, index: int) -> tuple[int, int]:
        """Sample ``index`` is (part, number of the part's own sample)."""
        node = self._root
        while isinstance(node, _Node):
            # num_left(index), and whether num_left(index + 1) is one more
            num_left, rest = divmod(2 * node.share * index + node.total, 2 * node.total)
            if rest + 2 * node.share >= 2 * node.total:
                node, index = node.left, num_left
            else:
                node, index = node.right, index - num_left
        return node, index

    def counts(self, num_samples: int) -> list[int]:
        """Samples of each part among the first ``num_samples``."""
        counts = [0] * self._num_parts
        stack: list[tuple[_Node | int, int]] = [(self._root, num_samples)]
        while stack:
            node, count = stack.pop()
            if isinstance(node, _Node):
                num_left = node.num_left(count)
                stack += [(node.left, num_left), (node.right, count - num_left)]
            else:
                counts[node] = count
        return counts


def _grow(parts: Sequence[int], shares: Sequence[int], *, is_shallow: bool) -> "_Node | int":
    """A tree over ``parts``, heaviest first: each goes to the lighter side; shallow: no deeper than it must be."""
    if len(parts) == 1:
        return parts[0]
    most = 1 << ((len(parts) - 1).bit_length() - 1) if is_shallow else len(parts) - 1
    sides: tuple[list[int], list[int]] = ([], [])
    sums = [0, 0]
    for part in parts:
        side = 0 if sums[0] <= sums[1] else 1
        if len(sides[side]) == most:
            side = 1 - side
        sides[side].append(part)
        sums[side] += shares[part]
    left, right = (_grow(side, shares, is_shallow=is_shallow) for side in sides)
    return _Node(sums[0], sum(sums), left, right)


def _largest_error(tree: "_Node | int", shares: Sequence[int]) -> float:
    """The most samples that a part may be away from its share: 1/2 for its own rounding, and what it inherits of the
    1/2 of each set that it belongs to, in proportion."""
    worst = 0.0
    stack: list[tuple[_Node | int, tuple[int, ...]]] = [(tree, ())]
    while stack:
        node, weights = stack.pop()
        if isinstance(node, _Node):
            for side, weight in ((node.left, node.share), (node.right, node.total - node.share)):
                stack.append((side, (*weights, weight)))
        else:  # integers divided by integers: they may be too large for floats, their ratios are not
            worst = max(worst, 0.5 * sum(shares[node] / weight for weight in weights))
    return worst


# ---------------------------------------------------------------------------------------------- what is blended


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendEntry:
    """One part of a blend: a corpus, or several that a pattern matched, read in proportion to their training tokens.

    ``corpora`` are in the order of their training tokens' hashes, whatever their folders are called.
    """

    name: str
    weight: Fraction
    corpora: tuple[PreparedCorpus, ...]

    @property
    def content_hash(self) -> str:
        """sha256 over the training tokens' hashes."""
        return _hash([corpus.part_hash(TRAIN) for corpus in self.corpora])

    @property
    def inner_weights(self) -> list[Fraction]:
        """Of the corpora: one pass over the entry is one pass over each."""
        tokens = [corpus.num_tokens(TRAIN) for corpus in self.corpora]
        return [Fraction(count, sum(tokens)) for count in tokens]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """Corpora opened together, with weights that add up to 1, in an order that follows from their contents."""

    entries: tuple[BlendEntry, ...]

    @property
    def corpora(self) -> tuple[PreparedCorpus, ...]:
        return tuple(corpus for entry in self.entries for corpus in entry.corpora)

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer's, which all corpora share."""
        return self.corpora[0].tokenizer_folder

    @property
    def content_hash(self) -> str:
        """sha256 over weights and training tokens: equal blends give the same samples in the same order."""
        return _hash([_ORDER_VERSION, *([str(entry.weight), entry.content_hash] for entry in self.entries)])

    def describe(self) -> dict[str, Any]:
        """What a checkpoint remembers, so that a resumed run can say what has changed."""
        return {
            "hash": self.content_hash,
            "parts": {
                entry.name: {
                    "weight": str(entry.weight),
                    "hash": entry.content_hash,
                    "folders": [str(corpus.folder) for corpus in entry.corpora],
                }
                for entry in sorted(self.entries, key=lambda entry: entry.name)
            },
        }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def prepare_blend(
    key: str,
    parts: Mapping[str, BlendPart],
    data: DataConfig,
    vocab_size: int,
    *,
    mask_token_id: int,
    progress: PrepareProgress | None = None,
) -> Blend:
    """Find or build every corpus of a blend; see :func:`~nld_train.data.prepare.prepare`.

    Args:
        key: of the blend, for messages: ``data.blend``; ``data`` where ``data.corpus`` is the only part.
        parts: of the blend, by name; checked by :mod:`nld_train.config.validate`.

    Raises:
        DataError: a corpus that cannot be used, two that are the same, two with different tokenizers.
    """
    weights = exact_weights(dict(parts))
    entries = []
    for name, part in parts.items():
        found = find_corpora("data.corpus" if key == "data" else f"{key}.{name}.corpus", part.corpus)
        if isinstance(found, Problem):
            raise DataError(found.location, found.message, found.remedy)
        corpora = [
            prepare(folder, data, vocab_size, mask_token_id=mask_token_id, progress=progress) for folder in found
        ]
        corpora.sort(key=lambda corpus: corpus.part_hash(TRAIN))
        entries.append(BlendEntry(name=name, weight=weights[name], corpora=tuple(corpora)))
    entries.sort(key=lambda entry: entry.content_hash)
    blend = Blend(entries=tuple(entries))
    _check_different(key, blend)
    check_readable_together(blend.corpora)
    return blend


def _check_different(key: str, blend: Blend) -> None:
    """Two copies of a corpus would give every sample twice, side by side."""
    seen: dict[str, tuple[str, Path]] = {}
    for entry in blend.entries:
        for corpus in entry.corpora:
            name, folder = seen.setdefault(corpus.part_hash(TRAIN), (entry.name, corpus.folder))
            if folder is not corpus.folder:
                raise DataError(
                    key,
                    f"{folder} (part {name}) and {corpus.folder} (part {entry.name}) have the same training tokens",
                    "name the corpus once, with the sum of the weights",
                )


def _check_same_fraction(first: PreparedCorpus, other: PreparedCorpus) -> None:
    """A text that is in two corpora is held out of both only where they hold out the same share."""
    fractions = [corpus.manifest.options.get("validation_fraction") for corpus in (first, other)]
    if fractions[0] != fractions[1]:
        raise DataError(
            str(other.folder),
            f"holds out {fractions[1]} of its sources, {first.folder}, which the run reads as well, {fractions[0]}: "
            "a text of both would be trained on and validated on",
            "prepare all corpora of a run with one --validation-fraction (shipped ones: data.validation_fraction)",
        )


def check_readable_together(corpora: Sequence[PreparedCorpus]) -> None:
    """A token id must mean the same in every corpus of a run, and what one holds out no other may train on.

    Raises:
        DataError: two corpora with different tokenizers, or of which different shares are held out; names both.
    """
    first = corpora[0]
    known = {first.tokenizer_folder: tokenizer_hash(first.tokenizer_folder)}
    for other in corpora[1:]:
        _check_same_fraction(first, other)
        reason = None
        for what, ours, theirs in (
            ("vocabulary", first.vocab_size, other.vocab_size),
            ("end-of-text token", first.manifest.eos_token_id, other.manifest.eos_token_id),
        ):
            if ours != theirs:
                reason = f"{what} {ours} and {theirs}"
        folder = other.tokenizer_folder
        if folder not in known:
            known[folder] = tokenizer_hash(folder)
        if reason is None and known[folder] != known[first.tokenizer_folder]:
            reason = f"the files of {first.tokenizer_folder} and {folder} differ"
        if reason is not None:
            raise DataError(
                str(other.folder),
                f"was prepared with another tokenizer than {first.folder}, which the run reads as well: {reason}",
                "prepare all corpora of a run with one tokenizer",
            )


# ---------------------------------------------------------------------------------------------- samples


class BlendStream:
    """The training samples of several streams in a blend's order, without an end: sample i for every i >= 0.

    Args:
        streams: endless ones, each with its weight; the weights add up to 1.
        first_position: ``stream_position`` of sample 0: the noise is keyed by the place in the blend.
    """

    def __init__(self, streams: Sequence[tuple[IndexedSource, Fraction]], *, first_position: int = 0) -> None:
        self._streams = [stream for stream, _ in streams]
        self._order = BlendOrder([weight for _, weight in streams])
        self._first_position = first_position

    def __getitem__(self, index: int) -> Sample:
        if index < 0:
            raise IndexError(f"the training stream starts at sample 0, asked for {index}")
        part, own = self._order.locate(index)
        sample = self._streams[part][own]
        sample["stream_position"] = self._first_position + index
        return sample

    def locate(self, index: int) -> tuple[int, int]:
        """Sample ``index`` is (number of the stream, number of its own sample)."""
        return self._order.locate(index)

    def build_index(self, start_sample: int, end_sample: int) -> None:
        """Build the index of every epoch of every stream that samples [start, end) touch."""
        starts, ends = self._order.counts(start_sample), self._order.counts(end_sample)
        for stream, start, end in zip(self._streams, starts, ends, strict=True):
            if end > start:
                stream.build_index(start, end)


def train_stream(
    blend: Blend,
    *,
    sequence_length: int,
    seed: int,
    mask_token_id: int,
    cache_dir: Path,
    document_mask: bool,
    first_position: int = 0,
) -> TrainStream | BlendStream:
    """The training samples of a blend; those of a single corpus are its own stream.

    In a blend every corpus is shuffled with a seed of its own, which depends on the run's seed and the corpus alone:
    changing the other parts or the weights does not change its order.

    Args:
        first_position: ``stream_position`` of sample 0.

    Raises:
        DataError: as :class:`~nld_train.data.dataset.TrainStream`.
    """
    is_single = len(blend.corpora) == 1

    def stream(corpus: PreparedCorpus) -> TrainStream:
        own = 0 if is_single else int(corpus.part_hash(TRAIN)[:8], 16)
        return TrainStream(
            corpus,
            sequence_length=sequence_length,
            seed=(seed + own) % 2**31,
            mask_token_id=mask_token_id,
            cache_dir=cache_dir,
            document_mask=document_mask,
        )

    def of_entry(entry: BlendEntry) -> TrainStream | BlendStream:
        if len(entry.corpora) == 1:
            return stream(entry.corpora[0])
        return BlendStream([(stream(c), weight) for c, weight in zip(entry.corpora, entry.inner_weights, strict=True)])

    if is_single and first_position == 0:
        return stream(blend.corpora[0])
    return BlendStream([(of_entry(entry), entry.weight) for entry in blend.entries], first_position=first_position)


class BlendValidation:
    """Held-out samples of several corpora in a blend's order: the same ones in every run.

    Args:
        sets: held-out samples of the parts, as many of each as the order asks for; None: none of this part.
        order: of the blend.
        num_samples: of the whole.
    """

    def __init__(self, sets: Sequence[SizedSource | None], order: BlendOrder, num_samples: int) -> None:
        self._sets = sets
        self._order = order
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"the validation set has samples 0..{self._num_samples - 1}, asked for {index}")
        part, own = self._order.locate(index)
        source = self._sets[part]
        assert source is not None  # it has as many samples as the order has of this part
        sample = source[own]
        sample["stream_position"] = validation_position(index, self._num_samples)
        return sample


def validation_samples(
    blend: Blend, *, sequence_length: int, num_samples: int, mask_token_id: int, document_mask: bool
) -> SizedSource:
    """The first held-out samples of each corpus, in the proportion of the weights.

    Raises:
        DataError: a corpus holds fewer than its share of ``num_samples``; says how many there could be.
    """

    def of_one(corpus: PreparedCorpus, count: int) -> ValidationSet:
        return ValidationSet(
            corpus,
            sequence_length=sequence_length,
            num_samples=count,
            mask_token_id=mask_token_id,
            document_mask=document_mask,
        )

    if len(blend.corpora) == 1:
        return of_one(blend.corpora[0], num_samples)
    pairs = [
        (corpus, entry.weight * inner)
        for entry in blend.entries
        for corpus, inner in zip(entry.corpora, entry.inner_weights, strict=True)
    ]
    order = BlendOrder([weight for _, weight in pairs])
    available = [max(0, corpus.num_tokens(VALIDATION) - 1) // sequence_length for corpus, _ in pairs]

    def fits(total: int) -> bool:
        return all(count <= held for count, held in zip(order.counts(total), available, strict=True))

    if not fits(num_samples):
        most, too_many = 0, num_samples  # counts only grow with the total
        while too_many - most > 1:
            middle = (most + too_many) // 2
            most, too_many = (middle, too_many) if fits(middle) else (most, middle)
        count, held, corpus = next(
            (count, held, corpus)
            for count, held, (corpus, _) in zip(order.counts(num_samples), available, pairs, strict=True)
            if count > held
        )
        raise DataError(
            "train.validation_samples",
            f"{num_samples} sequences of {sequence_length} tokens were asked for, {count} of them from corpus "
            f"{corpus.folder}, whose validation part ({corpus.num_tokens(VALIDATION)} tokens) holds {held}",
            f"lower train.validation_samples to at most {most}, shorten data.sequence_length, or hold out more of it",
        )
    counts = order.counts(num_samples)
    sets = [of_one(corpus, count) if count else None for (corpus, _), count in zip(pairs, counts, strict=True)]
    return BlendValidation(sets, order, num_samples)
