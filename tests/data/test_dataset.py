"""Samples: the order of the stream, its index, what is refused, and the validation set."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from torch.testing._internal.distributed.fake_pg import FakeStore

from nld_train.data.dataset import TrainStream, ValidationSet, validation_position
from nld_train.data.prepared import TRAIN, VALIDATION, PreparedCorpus
from nld_train.errors import DataError
from nld_train.objective.noise import stratified_levels

L = 48
SEED = 7
EOS = 2
MASK = 3

WriteCorpus = Callable[..., PreparedCorpus]


def _stream(corpus: PreparedCorpus, cache_dir: Path, *, seed: int = SEED, length: int = L) -> TrainStream:
    return TrainStream(corpus, sequence_length=length, seed=seed, mask_token_id=MASK, cache_dir=cache_dir)


def _tokens(stream: TrainStream, indices: range) -> torch.Tensor:
    return torch.stack([stream[index]["tokens"] for index in indices])


def _reference_epoch(corpus: PreparedCorpus, seed: int) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of one epoch, the slow, obvious way: shuffle the documents, join, cut, shuffle the pieces.

    The first piece starts at the first token; each has L tokens and one more for the last label.
    """
    dataset = IndexedDataset(str(corpus.prefix(TRAIN)))
    random_state = np.random.RandomState(seed)
    order = np.arange(len(dataset), dtype=np.int32)
    random_state.shuffle(order)
    text = [token for document in order for token in dataset[document].tolist()]
    pieces = [text[start : start + L + 1] for start in range(0, len(text) - L, L)]
    places = np.arange(len(pieces), dtype=np.uint32)
    random_state.shuffle(places)
    return [(pieces[place][:-1], pieces[place][1:]) for place in places]


def test_samples_are_the_obvious_ones(corpus: PreparedCorpus, tmp_path: Path) -> None:
    stream = _stream(corpus, tmp_path)
    n = stream.samples_per_epoch
    reference = [sample for epoch in range(3) for sample in _reference_epoch(corpus, SEED + epoch)]
    assert len(reference) == 3 * n
    assert n > 20
    for index, (tokens, labels) in enumerate(reference):
        sample = stream[index]
        assert sample["tokens"].tolist() == tokens
        assert sample["labels"].tolist() == labels
        assert sample["tokens"].dtype == sample["labels"].dtype == torch.int64
        assert sample["loss_mask"].tolist() == [1.0] * L
        assert sample["is_supervised"].tolist() == [True] * L
        assert sample["document_starts"] is None
        assert sample["stream_position"] == index


class _Tokenizer:
    """What a stock dataset asks for; defined here, so that the comparison shares nothing with the code under test."""

    vocab_size, eod, pad, unique_identifiers = 400, EOS, -1, ()


def test_order_is_that_of_stock_megatron(corpus: PreparedCorpus, tmp_path: Path) -> None:
    dataset = IndexedDataset(str(corpus.prefix(TRAIN)))
    stream = _stream(corpus, tmp_path / "ours")
    for epoch in range(2):
        config = GPTDatasetConfig(
            random_seed=SEED + epoch,
            sequence_length=L,
            blend=([str(corpus.prefix(TRAIN))], None),
            split="1",
            path_to_cache=str(tmp_path / "stock"),
            tokenizer=_Tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        documents = np.arange(len(dataset), dtype=np.int32)
        stock = GPTDataset(dataset, str(corpus.prefix(TRAIN)), documents, None, Split.train, config)
        assert len(stock) == stream.samples_per_epoch
        for place in range(len(stock)):
            ours = stream[epoch * len(stock) + place]
            for key in ("tokens", "labels", "loss_mask"):
                assert torch.equal(ours[key], stock[place][key])


def test_order_does_not_depend_on_how_long_the_run_is(corpus: PreparedCorpus, tmp_path: Path) -> None:
    short, long = _stream(corpus, tmp_path / "short"), _stream(corpus, tmp_path / "long")
    n = short.samples_per_epoch
    short.build_index(0, n)
    long.build_index(0, 5 * n)
    assert len(list((tmp_path / "short" / "index").glob("[!.]*"))) == 1
    assert len(list((tmp_path / "long" / "index").glob("[!.]*"))) == 5
    assert torch.equal(_tokens(short, range(n)), _tokens(long, range(n)))
    # Beyond what was built, and backwards, in a stream that has read nothing before.
    backwards = [short[index]["tokens"] for index in reversed(range(5 * n))]
    assert torch.equal(torch.stack(backwards[::-1]), _tokens(long, range(5 * n)))


def test_epochs_and_seeds_differ(corpus: PreparedCorpus, tmp_path: Path) -> None:
    stream = _stream(corpus, tmp_path)
    n = stream.samples_per_epoch
    epochs = [_tokens(stream, range(epoch * n, (epoch + 1) * n)) for epoch in range(3)]
    epochs.append(_tokens(_stream(corpus, tmp_path, seed=SEED + 100), range(n)))
    for i, one in enumerate(epochs):
        for other in epochs[:i]:
            assert (one != other).any(dim=1).float().mean() > 0.9


def test_every_label_counts_and_no_id_is_rewritten(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    """Megatron turns its padding id into 0 without a loss. Here no id is padding: not <unk> 0, not <pad> 4, not 99."""
    rng = np.random.default_rng(0)
    allowed = [token for token in range(100) if token != MASK]
    documents = [[*rng.choice(allowed, 30).tolist(), EOS] for _ in range(20)]
    corpus = write_corpus(documents, validation=documents)
    stream = _stream(corpus, tmp_path)
    samples = [stream[index] for index in range(stream.samples_per_epoch)]
    assert torch.stack([sample["loss_mask"] for sample in samples]).min() == 1
    seen = {token for sample in samples for token in sample["labels"].tolist()}
    assert {0, 1, EOS, 4, 99} <= seen


def test_rewritten_corpus_does_not_meet_a_stale_index(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = write_corpus([[*rng.integers(5, 100, 40).tolist(), EOS] for _ in range(10)])
    # As many documents and as many tokens, elsewhere: the old index would fit, and be wrong.
    _stream(first, tmp_path)[0]
    first.folder.rename(tmp_path / "old")
    second = write_corpus([[*rng.integers(5, 100, 20 + 40 * (n % 2)).tolist(), EOS] for n in range(10)])
    assert second.prefix(TRAIN) == first.prefix(TRAIN)
    assert second.num_tokens(TRAIN) == first.num_tokens(TRAIN)
    stream = _stream(second, tmp_path)
    expected = [tokens for tokens, _ in _reference_epoch(second, SEED)]
    assert _tokens(stream, range(stream.samples_per_epoch)).tolist() == expected


@pytest.mark.parametrize("name", ["document_order.npy", "sample_starts.npy", "sample_order.npy"])
@pytest.mark.parametrize("keep", [None, 0, 60, 140])
def test_damaged_index_is_built_again(corpus: PreparedCorpus, tmp_path: Path, name: str, keep: int | None) -> None:
    expected = _tokens(_stream(corpus, tmp_path), range(10))
    (file,) = (tmp_path / "index").glob(f"[!.]*/{name}")
    content = file.read_bytes()
    if keep is None:
        file.unlink()
    else:
        file.write_bytes(content[:keep])
    assert torch.equal(_tokens(_stream(corpus, tmp_path), range(10)), expected)
    assert file.read_bytes() == content


@pytest.mark.parametrize("name", ["document_order.npy", "sample_starts.npy", "sample_order.npy"])
def test_index_of_another_shape_is_built_again(corpus: PreparedCorpus, tmp_path: Path, name: str) -> None:
    _stream(corpus, tmp_path)[0]
    (file,) = (tmp_path / "index").glob(f"[!.]*/{name}")
    content = file.read_bytes()
    np.save(file, np.load(file)[:-1])
    _stream(corpus, tmp_path)[0]
    assert file.read_bytes() == content


@pytest.fixture
def as_rank_one() -> Iterator[None]:
    """torch.distributed is initialised, and this process is not rank 0."""
    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("as_rank_one")
def test_any_rank_may_build_the_index(corpus: PreparedCorpus, tmp_path: Path) -> None:
    assert torch.distributed.get_rank() == 1
    expected = [tokens for tokens, _ in _reference_epoch(corpus, SEED)]
    assert _tokens(_stream(corpus, tmp_path), range(len(expected))).tolist() == expected


def test_sequence_longer_than_the_corpus_is_refused(corpus: PreparedCorpus, tmp_path: Path) -> None:
    num_tokens = corpus.num_tokens(TRAIN)
    with pytest.raises(DataError, match=rf"data\.sequence_length: {num_tokens} is too long: the train part"):
        _stream(corpus, tmp_path, length=num_tokens)
    longest = _stream(corpus, tmp_path, length=num_tokens - 1)
    assert longest.samples_per_epoch == 1
    assert longest[3]["tokens"].shape == (num_tokens - 1,)


@pytest.mark.parametrize(("token", "message"), [(MASK, "contains the mask token"), (100, "vocabulary has 100 entries")])
@pytest.mark.parametrize("place", [0, 48, 96])
def test_wrong_tokens_are_never_handed_out(
    write_corpus: WriteCorpus, tmp_path: Path, token: int, message: str, place: int
) -> None:
    """Also where the corpus's own token counts do not mention them; place 96 is the label of the last position only."""
    text = [9] * 97
    text[place] = token
    corpus = write_corpus([text], validation=[text], counts=np.zeros(100, dtype=np.int64))
    expected = rf"train\.bin: sample [01] of the train stream .*{message}"
    stream = _stream(corpus, tmp_path)
    with pytest.raises(DataError, match=expected):
        [stream[index] for index in range(2)]
    validation = ValidationSet(corpus, sequence_length=L, num_samples=2, mask_token_id=MASK)
    bad = 0 if place == 0 else 1
    with pytest.raises(DataError, match=rf"validation\.bin: sample {bad} .*{message}"):
        validation[bad]


def _reference_documents(tokens: list[int]) -> tuple[list[int], list[float]]:
    """document_starts and loss_mask, token by token."""
    starts, loss_mask = [], []
    start = 0
    for place, token in enumerate(tokens):
        starts.append(start)
        loss_mask.append(0.0 if token == EOS else 1.0)
        if token == EOS:
            start = place + 1
    return starts, loss_mask


@pytest.mark.parametrize(
    ("tokens", "starts", "loss_mask"),
    [
        ([5, 6, EOS, 7, 8, EOS, 9, 9], [0, 0, 0, 3, 3, 3, 6, 6], [1, 1, 0, 1, 1, 0, 1, 1]),
        ([5, 6, 7, 8, 9, 9, 9, EOS], [0] * 8, [1, 1, 1, 1, 1, 1, 1, 0]),  # ends with the sequence
        ([EOS, 6, 7, 8, 9, 9, 9, 9], [0, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1]),  # one token of it is left
        ([5, EOS, EOS, 8, 9, 9, EOS, EOS], [0, 0, 2, 3, 3, 3, 3, 7], [1, 0, 0, 1, 1, 1, 0, 0]),  # empty documents
        ([5, 6, 7, 8, 9, 9, 9, 9], [0] * 8, [1] * 8),  # inside of one document
    ],
)
def test_documents_by_hand(
    write_corpus: WriteCorpus, tmp_path: Path, tokens: list[int], starts: list[int], loss_mask: list[int]
) -> None:
    assert _reference_documents(tokens) == (starts, loss_mask)
    # The labels reach one token into what follows: the beginning of another document, if the last token ends one.
    corpus = write_corpus([[*tokens, 11]], validation=[[*tokens, 11]])
    stream = TrainStream(corpus, sequence_length=8, seed=0, mask_token_id=MASK, cache_dir=tmp_path, document_mask=True)
    validation = ValidationSet(corpus, sequence_length=8, num_samples=1, mask_token_id=MASK, document_mask=True)
    for sample in (stream[0], validation[0]):
        assert sample["tokens"].tolist() == tokens
        assert sample["labels"].tolist() == [*tokens[1:], 11]
        assert sample["document_starts"] is not None
        assert sample["document_starts"].dtype == torch.int64
        assert sample["document_starts"].tolist() == starts
        assert sample["loss_mask"].dtype == torch.float32
        assert sample["loss_mask"].tolist() == loss_mask
        assert sample["is_supervised"].dtype == torch.bool
        assert sample["is_supervised"].all()


def test_documents_of_a_corpus(corpus: PreparedCorpus, tmp_path: Path) -> None:
    """Documents change what is said about a sample, never its tokens, and sequences begin in the middle of some."""
    plain = _stream(corpus, tmp_path)
    stream = TrainStream(
        corpus, sequence_length=L, seed=SEED, mask_token_id=MASK, cache_dir=tmp_path, document_mask=True
    )
    num_documents = 0
    for index in range(2 * stream.samples_per_epoch):
        sample, other = stream[index], plain[index]
        for key in ("tokens", "labels", "is_supervised"):
            assert torch.equal(sample[key], other[key])
        assert sample["stream_position"] == other["stream_position"] == index
        assert other["document_starts"] is None
        assert other["loss_mask"].tolist() == [1.0] * L
        starts, loss_mask = _reference_documents(sample["tokens"].tolist())
        assert sample["document_starts"] is not None
        assert (sample["document_starts"].tolist(), sample["loss_mask"].tolist()) == (starts, loss_mask)
        num_documents += len(set(starts)) - 1
    assert num_documents > 20


def test_negative_sample_is_refused(corpus: PreparedCorpus, tmp_path: Path) -> None:
    with pytest.raises(IndexError, match="-1"):
        _stream(corpus, tmp_path)[-1]


def test_validation_set_is_the_beginning_of_its_file(corpus: PreparedCorpus) -> None:
    text = corpus.tokens(VALIDATION).astype(np.int64)
    validation = ValidationSet(corpus, sequence_length=L, num_samples=5, mask_token_id=MASK)
    assert len(validation) == 5
    for index in range(5):
        sample = validation[index]
        assert sample["tokens"].tolist() == text[index * L : (index + 1) * L].tolist()
        assert sample["labels"].tolist() == text[index * L + 1 : (index + 1) * L + 1].tolist()
        assert sample["loss_mask"].tolist() == [1.0] * L
        assert sample["stream_position"] == validation_position(index, 5)
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            validation[outside]


def test_a_validation_set_is_one_batch_to_spread_noise() -> None:
    """Its levels have no gap wider than one in as many as there are."""
    for num_samples in (48, 60, 64, 100):
        positions = [validation_position(index, num_samples) for index in range(num_samples)]
        assert min(positions) > 2**61
        levels = np.array([stratified_levels(7, position, num_samples, 1)[0] for position in positions])
        gaps = np.diff(np.sort(levels), append=levels.min() + 1)
        assert gaps.max() == pytest.approx(1 / num_samples), num_samples


def test_too_many_validation_samples_are_refused(corpus: PreparedCorpus) -> None:
    available = (corpus.num_tokens(VALIDATION) - 1) // L
    last = ValidationSet(corpus, sequence_length=L, num_samples=available, mask_token_id=MASK)[available - 1]
    assert last["labels"].shape == (L,)
    with pytest.raises(DataError, match=rf"train\.validation_samples: {available + 1} (?s:.*)at most {available},"):
        ValidationSet(corpus, sequence_length=L, num_samples=available + 1, mask_token_id=MASK)
