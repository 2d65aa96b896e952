"""The loader: the same samples and the same noise however a step is cut, read, stopped and resumed."""

import multiprocessing
import random
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nld_train.data.dataset import SampleSource, TrainStream, ValidationSet
from nld_train.data.loader import LoaderBatch, TrainLoader
from nld_train.data.prepared import PreparedCorpus
from nld_train.errors import ConfigError, DataError
from nld_train.objective.noise import Corruption, NoiseSpec, corrupt

L = 32
G = 8
MASK = 3
NOISE = NoiseSpec(mask_token_id=MASK, eps=1e-3, seed=11, block_size=8)
SPREAD = replace(
    NOISE, sampler="power_count", stratify="batch", complementary=True, noisy_fraction=0.5, global_batch_size=G
)


@pytest.fixture(scope="module")
def stream(corpus: PreparedCorpus, tmp_path_factory: pytest.TempPathFactory) -> TrainStream:
    cache_dir = tmp_path_factory.mktemp("index")
    return TrainStream(corpus, sequence_length=L, seed=5, mask_token_id=MASK, cache_dir=cache_dir)


def _rows(batch: LoaderBatch) -> list[tuple[object, ...]]:
    """Everything about each sample, comparable."""
    rows = []
    for j, position in enumerate(batch.stream_positions.tolist()):
        values = [batch.tokens[j], batch.labels[j], batch.loss_mask[j], batch.is_supervised[j]]
        if batch.corruption is not None:
            values += [getattr(batch.corruption, item.name)[j] for item in fields(Corruption)]
        rows.append((position, *((value.dtype, value.numpy().tobytes()) for value in values)))
    return rows


def _steps(source: SampleSource, num_steps: int, *, mbs: int = 2, dp: int = 1, **options: object) -> list[list[object]]:
    """Rows of each step over all ranks, in the order of their place in the step."""
    ranks = []
    for rank in range(dp):
        settings: dict[str, object] = {"noise": NOISE, "global_batch_size": G, **options}
        loader = TrainLoader(
            source,
            micro_batch_size=mbs,
            data_parallel_rank=rank,
            data_parallel_size=dp,
            num_steps=num_steps,
            **settings,  # type: ignore[arg-type]
        )
        ranks.append((loader.num_micro_batches, list(loader)))
    steps = []
    for step in range(num_steps):
        rows = []
        for micro_batch in range(ranks[0][0]):
            for num_micro_batches, batches in ranks:
                rows += _rows(batches[step * num_micro_batches + micro_batch])
        steps.append(rows)
    return steps


def test_batches_are_the_streams_samples_with_their_own_noise(stream: TrainStream) -> None:
    loader = TrainLoader(stream, micro_batch_size=4, global_batch_size=G, consumed_samples=3, num_steps=2, noise=NOISE)
    batches = list(loader)
    assert len(batches) == 2 * loader.num_micro_batches == 4
    for number, batch in enumerate(batches):
        assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == (4, L)
        assert batch.stream_positions.tolist() == list(range(3 + 4 * number, 7 + 4 * number))
        assert batch.corruption is not None
        for j, position in enumerate(batch.stream_positions.tolist()):
            sample = stream[position]
            assert torch.equal(batch.tokens[j], sample["tokens"])
            assert torch.equal(batch.labels[j], sample["labels"])
            assert torch.equal(batch.loss_mask[j], sample["loss_mask"])
            alone = corrupt(sample["tokens"][None], torch.tensor([position]), NOISE)
            for item in fields(Corruption):
                assert torch.equal(getattr(batch.corruption, item.name)[j], getattr(alone, item.name)[0]), item.name
    weights = torch.cat([batch.corruption.weights for batch in batches if batch.corruption is not None])
    assert (weights > 0).any()
    assert (weights == 0).any()


@pytest.mark.parametrize(("dp", "mbs"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("noise", [NOISE, SPREAD], ids=["recipe", "all_options"])
def test_steps_do_not_depend_on_how_they_are_cut(
    stream: TrainStream, mbs: int, dp: int, num_workers: int, noise: NoiseSpec
) -> None:
    start = stream.samples_per_epoch - 11  # across an end of an epoch
    reference = _steps(stream, 3, mbs=G, consumed_samples=start, noise=noise)
    found = _steps(stream, 3, mbs=mbs, dp=dp, num_workers=num_workers, consumed_samples=start, noise=noise)
    assert found == reference
    assert [row[0] for step in reference for row in step] == list(range(start, start + 3 * G))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_at_any_sample(stream: TrainStream, num_workers: int) -> None:
    whole = [row for step in _steps(stream, 10) for row in step]
    for start in random.Random(0).sample(range(8 * G), 4):
        resumed = [row for step in _steps(stream, 2, consumed_samples=start, num_workers=num_workers) for row in step]
        assert resumed == whole[start : start + 2 * G]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stopped_and_continued(stream: TrainStream, num_workers: int) -> None:
    """``consumed_samples`` moves with the last micro-batch of a step, whatever the workers have read ahead."""
    whole = [row for step in _steps(stream, 4) for row in step]
    loader = TrainLoader(
        stream, micro_batch_size=2, global_batch_size=G, num_steps=4, noise=NOISE, num_workers=num_workers
    )
    batches = iter(loader)
    consumed = []
    for _ in range(6):
        next(batches)
        consumed.append(loader.consumed_samples)
    assert consumed == [0, 0, 0, G, G, G]
    batches.close()  # type: ignore[attr-defined]  # a generator; in the middle of the second step
    rest = [row for batch in loader for row in _rows(batch)]
    assert rest == whole[G:]
    assert loader.consumed_samples == 4 * G
    assert list(loader) == []


def test_global_batch_may_change_between_stages(stream: TrainStream) -> None:
    whole = [row for step in _steps(stream, 4) for row in step]
    first = [row for step in _steps(stream, 2, consumed_samples=0) for row in step]
    second = [row for step in _steps(stream, 1, consumed_samples=2 * G, global_batch_size=2 * G) for row in step]
    assert first + second == whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stage_without_noise(stream: TrainStream, num_workers: int) -> None:
    loader = TrainLoader(stream, micro_batch_size=2, global_batch_size=G, num_steps=1, num_workers=num_workers)
    assert [batch.corruption for batch in loader] == [None] * 4


def test_endless_loader_crosses_epochs(stream: TrainStream) -> None:
    loader = TrainLoader(stream, micro_batch_size=G, global_batch_size=G, num_workers=1)
    for number, batch in enumerate(loader):
        assert batch.stream_positions.tolist() == list(range(number * G, (number + 1) * G))
        if number * G > 2 * stream.samples_per_epoch:
            break
    assert loader.consumed_samples > 2 * stream.samples_per_epoch


def test_workers_leave_no_trace(stream: TrainStream) -> None:
    """No process stays behind, and the default random generator is where it was: resuming draws the same numbers."""
    before = torch.get_rng_state()
    others = set(multiprocessing.active_children())  # of other tests
    for _ in TrainLoader(stream, micro_batch_size=2, global_batch_size=G, num_steps=2, noise=NOISE, num_workers=2):
        assert len(set(multiprocessing.active_children()) - others) == 2
    assert set(multiprocessing.active_children()) <= others
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_come_through_the_workers(
    write_corpus: Callable[..., PreparedCorpus], tmp_path: Path, num_workers: int
) -> None:
    rng = np.random.default_rng(0)
    text = rng.integers(5, 100, 40 * L).tolist()
    text[20 * L] = MASK
    corpus = write_corpus([text], counts=np.zeros(100, dtype=np.int64))
    source = TrainStream(corpus, sequence_length=L, seed=0, mask_token_id=MASK, cache_dir=tmp_path)
    loader = TrainLoader(source, micro_batch_size=1, global_batch_size=1, num_workers=num_workers)
    with pytest.raises(DataError, match=r"train\.bin: sample \d+ of the train stream contains the mask") as caught:
        list(loader)
    assert f"sample {loader.consumed_samples} " in str(caught.value)


@pytest.mark.parametrize("dp", [1, 2])
def test_validation_pass(corpus: PreparedCorpus, dp: int) -> None:
    validation = ValidationSet(corpus, sequence_length=L, num_samples=G, mask_token_id=MASK)
    once = _steps(validation, 1, mbs=G)
    assert _steps(validation, 1, mbs=2, dp=dp) == once
    assert _steps(validation, 1, mbs=2, dp=dp, num_workers=1) == once
    assert len(once[0]) == G


@pytest.mark.parametrize(("global_batch_size", "mbs", "dp"), [(4, 3, 1), (4, 2, 4), (0, 1, 1), (8, 0, 1)])
def test_indivisible_batch_is_refused(stream: TrainStream, global_batch_size: int, mbs: int, dp: int) -> None:
    with pytest.raises(ConfigError, match=rf"train\.global_batch_size: {global_batch_size} is not a multiple"):
        TrainLoader(stream, micro_batch_size=mbs, global_batch_size=global_batch_size, data_parallel_size=dp)
