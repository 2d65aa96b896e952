"""``parallel.auto`` on launched ranks: the least memory counts, all agree, and a run keeps the layout that it has."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from nld_train.config.compose import compose, save_resolved
from nld_train.config.schema import Config, ParallelConfig
from nld_train.errors import ConfigError
from nld_train.platform.device import Platform
from nld_train.platform.topology import Topology
from nld_train.testing.memory import gathered
from nld_train.testing.ranks import RankPool
from nld_train.training.layout import resolve_layout


def auto(run_dir: Path, memory_gb: float | None, *more: str) -> Config:
    options = [f"run.dir={run_dir}", "parallel=auto", "machine.reserved_gb=0", "machine.gpus_per_node=2", *more]
    config = compose(options, world_size=2)
    config.parallel.memory_gb = memory_gb
    return config


def resolve(topology: Topology, platform: Platform, config: Config, memory_gb: list[float | None]) -> list[Any]:
    """What each rank makes of it; ranks may differ in memory."""
    own = replace(config, parallel=replace(config.parallel, memory_gb=memory_gb[topology.rank]))
    try:
        resolved, lines = resolve_layout(own, platform)
    except ConfigError as error:
        return gathered(str(error))
    return gathered((resolved.parallel, lines))


def test_all_ranks_agree_on_the_least_memory(two_ranks: RankPool, tmp_path: Path) -> None:
    config = auto(tmp_path, None)
    roomy = two_ranks.run(resolve, config, [1.0, 1.0])
    assert roomy[0] == roomy[1]
    parallel, lines = roomy[0]
    assert parallel == ParallelConfig(memory_gb=1.0)  # data parallel is the fastest for 5M parameters
    assert "chosen for 2 ranks with 1.00 GB each" in lines[0]
    assert lines[1] == "layout: parallel=single"
    tight = two_ranks.run(resolve, config, [1.0, 0.085])
    assert tight[0] == tight[1]
    assert tight[0][0] != parallel
    assert "with 0.09 GB each" in tight[0][1][0]


def test_what_fits_nowhere_is_refused_on_every_rank(two_ranks: RankPool, tmp_path: Path) -> None:
    refused = two_ranks.run(resolve, auto(tmp_path, None), [1.0, 0.001])
    assert refused[0] == refused[1]
    assert "no layout of 2 ranks with 0.0 GB fits" in refused[0]


def test_memory_must_be_known_without_a_gpu(two_ranks: RankPool, tmp_path: Path) -> None:
    refused = two_ranks.run(resolve, auto(tmp_path, None), [None, 1.0])
    assert refused[0] == refused[1]
    assert "give the memory of one, as in parallel.memory_gb=80" in refused[0]


def test_a_run_keeps_its_layout_while_it_fits(two_ranks: RankPool, tmp_path: Path) -> None:
    config = auto(tmp_path, None)
    old = ParallelConfig(pipeline_model_parallel_size=2, memory_gb=3.0)
    save_resolved(replace(config, parallel=old), tmp_path / "config.yaml")
    # What may be said beside auto counts as it is said now.
    now = replace(config, parallel=replace(config.parallel, overlap_grad_reduce=False))
    (parallel, lines), _ = two_ranks.run(resolve, now, [1.0, 1.0])
    assert parallel == replace(old, memory_gb=1.0, overlap_grad_reduce=False)
    assert "has its layout already" in lines[0]
    save_resolved(replace(config, parallel=ParallelConfig(tensor_model_parallel_size=4)), tmp_path / "config.yaml")
    (parallel, _), _ = two_ranks.run(resolve, config, [1.0, 1.0])
    assert parallel == ParallelConfig(memory_gb=1.0)
