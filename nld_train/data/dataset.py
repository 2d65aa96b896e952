"""Samples of a prepared corpus: an endless training stream, and a fixed validation set.

L is the sequence length. The documents of a part stand one after the other; a sample is L tokens of that text and the
L tokens that follow them by one, across ends of documents. With a document mask, a sample says where its documents
begin, and no label is supervised that belongs to the next one:

    tokens           c  d </s> e  f  g </s> h        (the sequence begins in the middle of a document)
    document_starts  0  0  0   3  3  3  3   7
    loss_mask        1  1  0   1  1  1  0   1
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch import Tensor

from nld_train.data.files import locked, publish_folder
from nld_train.data.prepared import TRAIN, VALIDATION, PreparedCorpus, TokenDocuments
from nld_train.errors import DataError

logger = logging.getLogger(__name__)

VALIDATION_POSITIONS_START = 1 << 62
"""Stream positions of validation samples start here or up to a set's length before: no training sample ever draws the
same noise."""


def validation_position(index: int, num_samples: int) -> int:
    """Stream position of validation sample ``index``. The first is a multiple of the set's length, so that the whole
    set is one batch to noise that is spread evenly over a batch."""
    return VALIDATION_POSITIONS_START - VALIDATION_POSITIONS_START % num_samples + index


class Sample(TypedDict):
    """One sequence.

    ``tokens`` and ``labels`` (the next tokens) int64 [L]; ``loss_mask`` float32 [L], 1 where the label is supervised;
    ``is_supervised`` bool [L], where the token itself is: all of them in pretraining, the answers in chat;
    ``document_starts`` int64 [L], the place of the first token of each token's document, None: one text, documents are
    not told apart; ``stream_position``: what the sample's noise is keyed by.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    is_supervised: Tensor
    document_starts: Tensor | None
    stream_position: int


class SampleSource(Protocol):
    """What a loader reads: sample ``index``, a pure function of the corpus, the seed and the sequence length."""

    def __getitem__(self, index: int) -> Sample: ...


class IndexedSource(SampleSource, Protocol):
    """Samples whose order is an index on disk, which can be built ahead of their being read."""

    def build_index(self, start_sample: int, end_sample: int) -> None: ...


class SizedSource(SampleSource, Protocol):
    """Samples 0 .. len - 1."""

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class _StreamTokenizer:
    """The part of a tokenizer that Megatron's dataset asks for."""

    vocab_size: int
    eod: int
    # Megatron replaces every token equal to ``pad`` by 0 and drops its loss. No token is -1, so every label counts.
    pad: int = -1

    @property
    def unique_identifiers(self) -> dict[str, int]:
        return {"vocab_size": self.vocab_size, "eod": self.eod}


class EpochDataset(GPTDataset):
    """One pass over a part of a corpus: Megatron's dataset, with an index cache that processes share safely.

    The order is exactly that of a stock ``GPTDataset`` with ``num_samples=None``; the keeping of the index differs.
    Stock Megatron keys it by the path (a rewritten .bin meets a stale index), writes it in place, builds it on rank 0
    only (the loader workers of other ranks cannot), and fails for ever on a file cut short.
    """

    def __init__(
        self,
        documents: TokenDocuments,
        *,
        sequence_length: int,
        seed: int,
        vocab_size: int,
        eod: int,
        index_folder: Path,
    ) -> None:
        self._index_folder = index_folder  # the base class builds the index while it is constructed
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=sequence_length,
            blend=([str(index_folder)], None),
            split="1",
            path_to_cache=str(index_folder),
            tokenizer=_StreamTokenizer(vocab_size, eod),  # type: ignore[arg-type]  # asked for these attributes only
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        indices = np.arange(len(documents), dtype=np.int32)
        # Megatron asks a low-level dataset for its lengths and for a stretch of a document: that is what these have.
        super().__init__(documents, str(index_folder), indices, None, Split.train, config)  # type: ignore[arg-type]

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The order of the documents, where each sample begins, the order of the samples; from the cache or built."""
        index = self._load_index()
        if index is None:
            with locked(self._index_folder.with_name(f".{self._index_folder.name}.lock")):
                index = self._load_index()
                if index is None:
                    if self._index_folder.exists():
                        logger.warning("the sample index %s is damaged and is built again", self._index_folder)
                        shutil.rmtree(self._index_folder)
                    with publish_folder(self._index_folder) as temporary:
                        self._write_index(temporary)
                    index = self._load_index()
        if index is None:
            raise DataError(
                str(self._index_folder), "cannot be read after it was built", "check the disk, or set data.cache_dir"
            )
        return index

    def _write_index(self, folder: Path) -> None:
        # The same draws in the same order as Megatron's: documents first, samples second.
        random_state = np.random.RandomState(self.config.random_seed)
        document_order = self.indices.copy()
        random_state.shuffle(document_order)
        sample_starts = helpers.build_sample_idx(
            np.array(self.dataset.sequence_lengths),
            document_order,
            self.config.sequence_length,
            1,  # epochs
            self._get_num_tokens_per_epoch(),
            True,  # drop the last, partial sample
            True,  # one more token per sample, for the last label
        )
        num_samples = len(sample_starts) - 1
        dtype = np.uint32 if num_samples < np.iinfo(np.uint32).max - 1 else np.int64
        sample_order = np.arange(num_samples, dtype=dtype)
        random_state.shuffle(sample_order)
        for name, array in zip(_INDEX_FILES, (document_order, sample_starts, sample_order), strict=True):
            np.save(folder / name, array, allow_pickle=False)

    def _load_index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """None: not there, cut short, or of other shapes than this corpus has."""
        try:
            documents, starts, order = (
                np.load(self._index_folder / name, mmap_mode="r", allow_pickle=False) for name in _INDEX_FILES
            )
        except (OSError, ValueError, EOFError):
            return None
        num_samples = (self._get_num_tokens_per_epoch() - 1) // self.config.sequence_length
        shapes = (documents.shape, starts.shape, order.shape)
        if shapes != ((len(self.indices),), (num_samples + 1, 2), (num_samples,)):
            return None
        return documents, starts, order


_INDEX_FILES = ("document_order.npy", "sample_starts.npy", "sample_order.npy")


class TrainStream:
    """The training part, epoch after epoch, without an end: sample i for every i >= 0.

    Each epoch is a shuffle of its own, seeded with seed + epoch, so the order is a pure function of (corpus, seed,
    sequence length): it depends neither on how long a run is nor on who reads it.

    Args:
        corpus: prepared corpus.
        sequence_length: L, tokens.
        seed: of the run.
        mask_token_id: must not occur; every sample is checked.
        cache_dir: ``data.cache_dir``; indices are kept below it, in folders keyed by the content of the token file.
        document_mask: tell documents apart: ``document_starts`` is given, and labels do not cross.

    Raises:
        DataError: the training part has fewer than L + 1 tokens; on reading, a sample with a mask token or with an id
            outside the vocabulary.
    """

    _MAX_OPEN_EPOCHS = 2  # a micro-batch may straddle two

    def __init__(
        self,
        corpus: PreparedCorpus,
        *,
        sequence_length: int,
        seed: int,
        mask_token_id: int,
        cache_dir: Path,
        document_mask: bool = False,
    ) -> None:
        num_tokens = corpus.num_tokens(TRAIN)
        _check_length(corpus, TRAIN, sequence_length)
        self.samples_per_epoch = (num_tokens - 1) // sequence_length
        self._corpus = corpus
        self._sequence_length = sequence_length
        self._seed = seed
        self._mask_token_id = mask_token_id
        self._document_mask = document_mask
        self._index_root = cache_dir / "index"
        self._tokens = corpus.documents(TRAIN)
        self._epochs: dict[int, EpochDataset] = {}

    def __getitem__(self, index: int) -> Sample:
        if index < 0:
            raise IndexError(f"the training stream starts at sample 0, asked for {index}")
        epoch, place = divmod(index, self.samples_per_epoch)
        raw = self._epoch(epoch)[place]
        sample = _text_sample(
            raw["tokens"], raw["labels"], index, self._corpus.manifest.eos_token_id if self._document_mask else None
        )
        _check_text_sample(sample, self._corpus, TRAIN, index, self._mask_token_id)
        return sample

    def build_index(self, start_sample: int, end_sample: int) -> None:
        """Build the index of every epoch that samples [start, end) touch, so that other processes only map it.

        Never needed: a missing index is built by whoever meets it first. For large corpora on many nodes, call it on
        one rank before the others start.
        """
        for epoch in range(start_sample // self.samples_per_epoch, -(-end_sample // self.samples_per_epoch)):
            self._epoch(epoch)

    def _epoch(self, epoch: int) -> EpochDataset:
        if epoch not in self._epochs:
            while len(self._epochs) >= self._MAX_OPEN_EPOCHS:
                del self._epochs[next(iter(self._epochs))]
            key = f"{self._corpus.part_hash(TRAIN)[:16]}-{self._sequence_length}-{self._seed}-{epoch}"
            self._epochs[epoch] = EpochDataset(
                self._tokens,
                sequence_length=self._sequence_length,
                seed=(self._seed + epoch) % 2**32,
                vocab_size=self._corpus.vocab_size,
                eod=self._corpus.manifest.eos_token_id,
                index_folder=self._index_root / key,
            )
        return self._epochs[epoch]


class ValidationSet:
    """The first ``num_samples`` samples of the validation part, in file order: the same ones in every run.

    Args:
        corpus: prepared corpus.
        sequence_length: L, tokens.
        num_samples: how many.
        mask_token_id: must not occur; every sample is checked.
        document_mask: as in :class:`TrainStream`.

    Raises:
        DataError: the validation part is too small for ``num_samples``; on reading, as :class:`TrainStream`.
    """

    def __init__(
        self,
        corpus: PreparedCorpus,
        *,
        sequence_length: int,
        num_samples: int,
        mask_token_id: int,
        document_mask: bool = False,
    ) -> None:
        _check_length(corpus, VALIDATION, sequence_length)
        num_tokens = corpus.num_tokens(VALIDATION)
        available = (num_tokens - 1) // sequence_length
        if num_samples > available:
            raise DataError(
                "train.validation_samples",
                f"{num_samples} sequences of {sequence_length} tokens were asked for, the validation part of corpus "
                f"{corpus.folder} ({num_tokens} tokens) holds {available}",
                f"lower train.validation_samples to at most {available}, shorten data.sequence_length, or raise "
                "data.validation_fraction",
            )
        self._corpus = corpus
        self._sequence_length = sequence_length
        self._num_samples = num_samples
        self._mask_token_id = mask_token_id
        self._document_mask = document_mask
        self._documents = corpus.documents(VALIDATION)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"the validation set has samples 0..{self._num_samples - 1}, asked for {index}")
        start = index * self._sequence_length
        tokens = self._documents.read(0, start, start + self._sequence_length + 1)  # the part is one shard
        text = torch.from_numpy(tokens.astype(np.int64))
        sample = _text_sample(
            text[:-1].contiguous(),
            text[1:].contiguous(),
            validation_position(index, self._num_samples),
            self._corpus.manifest.eos_token_id if self._document_mask else None,
        )
        _check_text_sample(sample, self._corpus, VALIDATION, index, self._mask_token_id)
        return sample


def _text_sample(tokens: Tensor, labels: Tensor, stream_position: int, end_token_id: int | None) -> Sample:
    """Everything is supervised, but labels across the documents that ``end_token_id`` ends (None: one text)."""
    loss_mask = torch.ones(len(tokens))
    document_starts = None
    if end_token_id is not None:
        is_last = tokens == end_token_id
        loss_mask[is_last] = 0.0
        # The token after the last one of a document begins the next; a sequence begins one in any case.
        places = torch.arange(len(tokens))
        document_starts = torch.where(is_last.roll(1), places, 0).cummax(dim=0).values
    return Sample(
        tokens=tokens,
        labels=labels,
        loss_mask=loss_mask,
        is_supervised=torch.ones(len(tokens), dtype=torch.bool),
        document_starts=document_starts,
        stream_position=stream_position,
    )


def _check_length(corpus: PreparedCorpus, part: str, sequence_length: int) -> None:
    num_tokens = corpus.num_tokens(part)
    if num_tokens <= sequence_length:
        raise DataError(
            "data.sequence_length",
            f"{sequence_length} is too long: the {part} part of corpus {corpus.folder} has {num_tokens} tokens",
            f"set data.sequence_length to at most {num_tokens - 1}, or use a larger corpus",
        )


def _check_text_sample(sample: Sample, corpus: PreparedCorpus, part: str, index: int, mask_token_id: int) -> None:
    check_sample(
        sample,
        location=str(corpus.prefix(part).with_suffix(".bin")),
        name=f"sample {index} of the {part} stream",
        vocab_size=corpus.vocab_size,
        mask_token_id=mask_token_id,
        preparation="the corpus",
    )


def check_sample(
    sample: Sample, *, location: str, name: str, vocab_size: int, mask_token_id: int, preparation: str
) -> None:
    """Refuse what must never be trained on.

    Args:
        sample: as read.
        location: the file that it is from.
        name: of the sample, for the message.
        vocab_size: ids are smaller.
        mask_token_id: must not occur.
        preparation: what is to be prepared again if the file is wrong.

    Raises:
        DataError: the mask token, or an id that is not in the vocabulary.
    """
    # The labels are the tokens shifted by one: the last label is the only id that the tokens do not show.
    for ids in (sample["tokens"], sample["labels"][-1:]):
        smallest, largest = (int(value) for value in ids.aminmax())
        if smallest < 0 or largest >= vocab_size:
            raise DataError(
                location,
                f"{name} holds token {smallest if smallest < 0 else largest}, the vocabulary has {vocab_size} entries",
                f"the token file was written with another tokenizer or is damaged: prepare {preparation} again",
            )
        if bool((ids == mask_token_id).any()):
            raise DataError(
                location,
                f"{name} contains the mask token, objective.mask_token_id = {mask_token_id}",
                "set objective.mask_token_id to an id that the tokenizer never gives to text",
            )
