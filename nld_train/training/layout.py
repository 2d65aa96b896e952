"""``parallel.auto``: the layout of a run, chosen when its ranks and their memory are known, the same on all of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nld_train.config.compose import load_resolved
from nld_train.config.plan import choose_layout, describe, evaluate
from nld_train.config.schema import Config, ParallelConfig
from nld_train.config.workload import workloads
from nld_train.errors import ConfigError, Problem
from nld_train.platform.device import Platform
from nld_train.platform.topology import join_ranks


def resolve_layout(config: Config, platform: Platform) -> tuple[Config, list[str]]:
    """The configuration with a layout in numbers, and what to say of it. Collective where ``parallel.auto`` is set.

    A run that is there keeps its layout as long as that fits the ranks and their memory. Rank 0 decides.

    Raises:
        ConfigError: no layout fits, or the memory of a rank is not known (on every rank).
    """
    if not config.parallel.auto:
        return config, []
    join_ranks(platform)
    memory_gb = _least_memory_gb(config, platform)
    decision: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            decision = [(*_decide(config, dist.get_world_size(), memory_gb), [])]
        except ConfigError as error:
            decision = [(None, [], list(error.problems))]
    dist.broadcast_object_list(decision, src=0, device=platform.device)
    parallel, lines, problems = decision[0]
    if problems:
        raise ConfigError(problems)
    return replace(config, parallel=parallel), lines


def _least_memory_gb(config: Config, platform: Platform) -> float:
    """Of all ranks: ``parallel.memory_gb``, or what the device has. Collective."""
    memory_gb = config.parallel.memory_gb
    if memory_gb is None and platform.is_cuda:
        memory_gb = torch.cuda.get_device_properties(platform.device).total_memory / 2**30
    known = torch.tensor([-1.0 if memory_gb is None else memory_gb], dtype=torch.float64, device=platform.device)
    dist.all_reduce(known, op=dist.ReduceOp.MIN)
    if known.item() < 0:
        remedy = "give the memory of one, as in parallel.memory_gb=80"
        raise ConfigError(
            [Problem("parallel.memory_gb", "null, and parallel.auto=true on ranks without a GPU", remedy)]
        )
    return float(known.item())


def _decide(config: Config, world_size: int, memory_gb: float) -> tuple[ParallelConfig, list[str]]:
    path = Path(config.run.dir) / "config.yaml"
    if path.is_file():
        given = config.parallel  # what may be said beside auto is said anew by each start
        kept = replace(
            load_resolved(path).parallel,
            auto=False,
            memory_gb=given.memory_gb,
            overlap_grad_reduce=given.overlap_grad_reduce,
            overlap_param_gather=given.overlap_param_gather,
        )
        plan = evaluate(config, workloads(config), kept, world_size, memory_gb)
        if plan.fits:
            return plan.parallel, ["parallel.auto: this run has its layout already", *describe(plan)]
    plan = choose_layout(config, world_size, memory_gb)
    return plan.parallel, [
        f"parallel.auto: chosen for {world_size} ranks with {memory_gb:.2f} GB each; the same words fix it",
        *describe(plan),
    ]
