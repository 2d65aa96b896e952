"""Saving beside the training, checksums, full disks, and which checkpoints are kept."""

import contextlib
import errno
import os
import pickle
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from nld_train.checkpoint import manager as manager_module
from nld_train.checkpoint.checksums import CHECKSUM_FILE, Checksum, read_checksums
from nld_train.checkpoint.manager import CheckpointInfo, CheckpointManager, complete_checkpoints
from nld_train.checkpoint.sharded import (
    METADATA_FILE,
    FileWriting,
    Piece,
    RankState,
    rank_state,
    rectangles,
    write_common_files,
)
from nld_train.config.schema import CheckpointConfig, OptimConfig, ParallelConfig
from nld_train.errors import CheckpointError, NLDError
from nld_train.model.build import build_model
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.ranks import RankPool
from nld_train.testing.steps import tiny_model
from nld_train.training.optimizer import build_optimizer, set_hyperparameters
from nld_train.training.run import connect, wrap_data_parallel


def info_of(step: int, **metrics: float) -> CheckpointInfo:
    return CheckpointInfo(
        step=step, tokens=0, stage="joint", samples=0, dtype="float32", model=tiny_model(), parallel={}, config={},
        metrics=metrics, tokenizer="",
    )  # fmt: skip


def trained(platform: Platform, seed: int = 1) -> tuple[list[Any], Any]:
    """A small model with an optimizer that has made a step, so that it has state."""
    model = build_model(tiny_model(), ParallelConfig(), dtype=torch.float32, device=platform.device, seed=seed)
    chunks = [wrap_data_parallel(model)]
    optimizer = build_optimizer(OptimConfig(), chunks, torch.float32)
    connect(chunks, optimizer)
    for parameter in model.parameters():
        parameter.main_grad.fill_(0.1)  # type: ignore[attr-defined]
    set_hyperparameters(optimizer, OptimConfig(), 1e-3)
    optimizer.step()
    return chunks, optimizer


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4)])
def test_rectangles_tile_a_range(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for first in range(whole.numel() + 1):
        for end in range(first, whole.numel() + 1):
            found: list[int] = []
            for offsets, size, start in rectangles(shape, first, end):
                place = tuple(slice(begin, begin + length) for begin, length in zip(offsets, size, strict=True))
                expected = torch.arange(start, start + size.numel()).view(size)
                assert torch.equal(whole[place], expected)
                found += expected.flatten().tolist()
            assert found == list(range(first, end))
            if len(shape) == 2:
                assert len(list(rectangles(shape, first, end))) <= 3


def save_two(topology: Topology, platform: Platform, directory: str) -> None:
    chunks, optimizer = trained(platform)
    manager = CheckpointManager(Path(directory), CheckpointConfig(keep_last=2))
    for step in (1, 2):
        manager.save(chunks, optimizer, info_of(step))


def latest(topology: Topology, platform: Platform, *directories: str) -> list[Any]:
    """Where a run in each of the directories would go on."""
    found: list[Any] = []
    for directory in directories:
        try:
            found.append(CheckpointManager(Path(directory), CheckpointConfig()).latest())
        except CheckpointError as error:
            found.append(str(error))
    return found


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {"truncated": truncate, "flipped": flip, "deleted": Path.unlink}


def test_damage_to_any_file_is_named_and_the_checkpoint_before_is_used(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(save_two, str(tmp_path / "whole"))
    older, newest = complete_checkpoints(tmp_path / "whole")
    names = {path.name for path in newest.iterdir()}
    assert names == {
        ".metadata", "__0_0.distcp", "__1_0.distcp", "checkpoint.json", "common.pt", "metadata.json", CHECKSUM_FILE,
    }  # fmt: skip
    cases = [(name, kind) for name in sorted(names) for kind in DAMAGES]
    directories = [tmp_path / f"{kind}_{name}" for name, kind in cases]
    for (name, kind), directory in zip(cases, directories, strict=True):
        shutil.copytree(tmp_path / "whole", directory)
        DAMAGES[kind](directory / newest.name / name)
    whole, *answers = two_ranks.run(latest, str(tmp_path / "whole"), *map(str, directories))
    assert whole == (newest, [])
    for (name, _), directory, (found, damaged) in zip(cases, directories, answers, strict=True):
        assert found == directory / older.name, directory
        assert len(damaged) == 1
        assert str(directory / newest.name) in damaged[0]
        assert name in damaged[0].partition("now damaged_")[2], damaged
        assert (directory / f"damaged_{newest.name}").is_dir()


def test_a_flip_of_any_byte_of_the_checksums_is_seen(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(save_two, str(tmp_path))
    folder = complete_checkpoints(tmp_path)[0]
    good = (folder / CHECKSUM_FILE).read_bytes()
    assert len(read_checksums(folder)) == 6
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1
        (folder / CHECKSUM_FILE).write_bytes(bad)
        with pytest.raises(ValueError, match="own checksum"):
            read_checksums(folder)


def test_nothing_undamaged_is_an_error_and_no_new_beginning(one_rank: RankPool, tmp_path: Path) -> None:
    one_rank.run(save_two, str(tmp_path))
    for folder in complete_checkpoints(tmp_path):
        flip(folder / "__0_0.distcp")
    message, again, nothing = one_rank.run(latest, str(tmp_path), str(tmp_path), str(tmp_path / "nothing there"))
    assert message == again  # the next start does not begin anew, either
    assert "no checkpoint is undamaged" in message
    assert "step_00000001" in message
    assert "step_00000002" in message
    assert nothing == (None, [])


def with_a_file_server_that_is_gone(topology: Topology, platform: Platform, directory: str) -> list[Any]:
    """What finding and loading a checkpoint end with."""
    gone = OSError(errno.ESTALE, "Stale file handle")
    manager = CheckpointManager(Path(directory), CheckpointConfig())
    found: list[Any] = []
    for where, name in ((Checksum, "of"), (manager_module, "read_checksums")):
        with mock.patch.object(where, name, side_effect=gone), contextlib.suppress(OSError):
            found.append(manager.latest())
    chunks, optimizer = trained(platform)
    with mock.patch.object(manager_module.dist_checkpointing, "load", side_effect=gone), contextlib.suppress(OSError):
        found.append(manager.load(complete_checkpoints(Path(directory))[-1], chunks, optimizer))
    return found


def test_a_file_server_that_is_gone_is_no_damage(one_rank: RankPool, tmp_path: Path) -> None:
    """The error itself comes, which has a run started again; no checkpoint is set aside for it."""
    one_rank.run(save_two, str(tmp_path))
    before = sorted(path.name for path in tmp_path.iterdir())
    assert one_rank.run(with_a_file_server_that_is_gone, str(tmp_path)) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def training_state(chunks: list[Any], optimizer: Any) -> dict[str, torch.Tensor]:
    """Weights and moments, themselves."""
    part = optimizer.chained_optimizers[0]
    found = {}
    for name, parameter in chunks[0].module.named_parameters():
        found[f"weight of {name}"] = parameter
        states = part._get_main_param_and_optimizer_states(parameter)
        found |= {f"{kind} of {name}": states[kind] for kind in ("exp_avg", "exp_avg_sq")}
    return found


def save_while_training(topology: Topology, platform: Platform, directory: str, asynchronous: bool) -> list[str]:
    """Weights and moments change while the file is written; names of what is loaded and not what was saved."""
    chunks, optimizer = trained(platform)
    values = training_state(chunks, optimizer)
    saved = {name: value.detach().clone() for name, value in values.items()}
    is_changed = threading.Event()
    main = threading.current_thread()

    def progress() -> None:
        if threading.current_thread() is not main:
            assert is_changed.wait(60)

    config = CheckpointConfig(asynchronous=asynchronous)
    manager = CheckpointManager(Path(directory), config, progress=progress)
    manager.begin(chunks, optimizer, info_of(1))
    assert manager.is_saving
    assert manager.is_writing == asynchronous
    for value in values.values():
        value.data.add_(1.0)
    is_changed.set()
    result = manager.finish()
    assert result.error is None
    assert not manager.is_saving
    others, other_optimizer = trained(platform, seed=2)
    assert manager.load(result.folder, others, other_optimizer).step == 1
    found = training_state(others, other_optimizer)
    assert sum(name.startswith("exp_avg") for name in found) == 2 * len(list(others[0].module.parameters()))
    return [name for name, value in saved.items() if not torch.equal(found[name], value)]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_next_step_does_not_reach_into_a_save(one_rank: RankPool, tmp_path: Path, asynchronous: bool) -> None:
    assert one_rank.run(save_while_training, str(tmp_path), asynchronous) == []


def save_and_note(topology: Topology, platform: Platform, directory: str) -> list[tuple[str, str, int]]:
    """What a save has the disk do, in order: ("sync", path, its bytes then) and ("rename", path, 0)."""
    chunks, optimizer = trained(platform)
    noted: list[tuple[str, str, int]] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        noted.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))

    def noted_rename(path: Path, target: Path) -> Path:
        noted.append(("rename", str(path), 0))
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", noted_fsync)
        patch.setattr(Path, "rename", noted_rename)
        CheckpointManager(Path(directory), CheckpointConfig()).save(chunks, optimizer, info_of(1))
    return noted


def test_a_checkpoint_is_on_disk_before_it_has_its_name(one_rank: RankPool, tmp_path: Path) -> None:
    """Its files, whole, then their names in the folder, then the folder's own name: a machine that loses power leaves a
    checkpoint or none."""
    noted = one_rank.run(save_and_note, str(tmp_path))
    (folder,) = complete_checkpoints(tmp_path)
    ((place, temporary),) = [(i, path) for i, (what, path, _) in enumerate(noted) if what == "rename"]
    before, after = noted[:place], noted[place + 1 :]
    files = {("sync", f"{temporary}/{path.name}", path.stat().st_size) for path in folder.iterdir()}
    assert len(files) == 6
    assert files <= set(before)
    assert before[-1][:2] == ("sync", temporary)
    assert [entry[:2] for entry in after] == [("sync", str(tmp_path))]


def load_without(topology: Topology, platform: Platform, directory: str, *cases: list[str]) -> list[tuple[str, str]]:
    """Where and what is wrong with a checkpoint whose index has lost the tensors of each case."""
    chunks, optimizer = trained(platform)
    manager = CheckpointManager(Path(directory), CheckpointConfig())
    folder = manager.save(chunks, optimizer, info_of(1))
    whole = (folder / METADATA_FILE).read_bytes()
    found = []
    for keys in cases:
        index = pickle.loads(whole)
        for key in keys:
            del index.state_dict_metadata[key]
        index.storage_data = {place: where for place, where in index.storage_data.items() if place.fqn not in keys}
        (folder / METADATA_FILE).write_bytes(pickle.dumps(index))
        with pytest.raises(CheckpointError) as refusal:
            manager.load(folder, chunks, optimizer)
        found += [(problem.location, problem.message) for problem in refusal.value.problems]
    return found


def test_a_tensor_that_the_index_does_not_know_is_named(one_rank: RankPool, tmp_path: Path) -> None:
    weights = [f"decoder.layers.{layer}.mlp.linear_fc1.weight" for layer in (0, 1)]
    moment = f"optimizer.state.exp_avg_sq.{weights[0]}"
    found = one_rank.run(load_without, str(tmp_path), weights, [moment])
    assert {location for location, _ in found} == {str(tmp_path / "step_00000001" / METADATA_FILE)}
    assert [message for _, message in found] == [
        f"cannot be loaded: it lists no piece of tensor {weights[0]} (nor any of 1 others)",
        f"cannot be loaded: it lists no piece of tensor {moment}",
    ]


def save_on_a_full_disk(topology: Topology, platform: Platform, directory: str, asynchronous: bool) -> list[str | None]:
    """The last rank may write no file above 4 KB in its second save."""
    chunks, optimizer = trained(platform)
    manager = CheckpointManager(Path(directory), CheckpointConfig(asynchronous=asynchronous))
    errors = []
    for step in (1, 2, 3):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if step == 2 and topology.rank == topology.world_size - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        try:
            manager.begin(chunks, optimizer, info_of(step))
            errors.append(manager.finish().error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        if step == 2:
            assert [path.name for path in Path(directory).iterdir()] == ["step_00000001"]
            dist.barrier()
    return errors


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_keeps_the_old_checkpoint_and_the_next_save_works(
    one_rank: RankPool, two_ranks: RankPool, tmp_path: Path, asynchronous: bool
) -> None:
    for pool in (one_rank, two_ranks):  # of one rank it is the one that also writes the common files
        directory = tmp_path / str(pool.world_size)
        first, second, third = pool.run(save_on_a_full_disk, str(directory), asynchronous)
        assert first is None
        assert f"__{pool.world_size - 1}_0.distcp" in second
        assert "File too large" in second
        assert third is None
        assert pool.run(latest, str(directory)) == [(directory / "step_00000003", [])]


def keep_case(topology: Topology, platform: Platform, directory: str) -> list[str]:
    chunks, _ = trained(platform)
    config = CheckpointConfig(keep_last=2, keep_interval=4, keep_best=1, best_metric="val_ar_loss")
    manager = CheckpointManager(Path(directory), config)
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 5: float("nan"), 6: 4.0}  # none in steps 4, 7, 8 and 9
    for step in range(1, 10):
        metrics = {"val_ar_loss": losses[step]} if step in losses else {}
        manager.save(chunks, None, info_of(step, **metrics))
    return [path.name for path in complete_checkpoints(Path(directory))]


def test_the_last_ones_every_nth_and_the_best_are_kept(one_rank: RankPool, tmp_path: Path) -> None:
    found = one_rank.run(keep_case, str(tmp_path))
    assert found == [f"step_{step:08d}" for step in (2, 4, 8, 9)]


def unfinished_records(topology: Topology, platform: Platform, directory: str) -> str | None:
    chunks, _ = trained(platform)
    manager = CheckpointManager(Path(directory), CheckpointConfig())

    def refuse() -> None:
        raise NLDError("metrics.jsonl", "cannot be written", "free space")

    manager.begin(chunks, None, info_of(1))
    return manager.finish(refuse).error


def test_a_checkpoint_whose_records_are_not_on_file_is_not_completed(one_rank: RankPool, tmp_path: Path) -> None:
    assert "metrics.jsonl" in one_rank.run(unfinished_records, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def incomplete_state(topology: Topology, platform: Platform, directory: str, how: str) -> str:
    """Pieces that do not make up a tensor, as a mistake in the cutting would leave them."""
    chunks, optimizer = trained(platform)
    weights = {"0": chunks[0].module.sharded_state_dict(metadata={"non_homogeneous_layers": True})}
    state = rank_state(weights, optimizer)
    first, *rest = state.pieces
    pieces = [first, first, *rest]
    if how == "missing":
        pieces = [Piece(first.key, first.offsets, first.size, first.values[:-1]), *rest]
    writing = FileWriting(Path(directory), RankState(pieces, {}, {}), in_background=False, progress=lambda: None)
    try:
        write_common_files(Path(directory), {}, [writing.result()])
    except ValueError as error:
        return str(error)
    return "written"


@pytest.mark.parametrize("how", ["missing", "twice"])
def test_pieces_that_do_not_make_up_their_tensor_are_refused(one_rank: RankPool, tmp_path: Path, how: str) -> None:
    message = one_rank.run(incomplete_state, str(tmp_path), how)
    assert ("elements were written" if how == "missing" else "written twice") in message
