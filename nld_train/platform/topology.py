"""Process groups: who holds which part of the model and of the batch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from nld_train.config.schema import ParallelConfig
from nld_train.platform.device import Platform


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """This process's place. Ranks count from 0; "stage" here is a pipeline stage.

    Context-parallel ranks of one data-parallel rank read the same samples; "data" does not count them.
    """

    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int
    tensor_parallel_rank: int
    tensor_parallel_size: int
    pipeline_rank: int
    pipeline_size: int
    context_parallel_rank: int
    context_parallel_size: int

    @property
    def is_first_pipeline_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_pipeline_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_main(self) -> bool:
        """Rank 0: writes metrics, prints, exports."""
        return self.rank == 0


def world_size_from_environment() -> int:
    """What torchrun (or srun with the same variables) announced; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Until a collective gives up; rank 0 may prepare a corpus while the others wait."""


def global_rank() -> int:
    """This process's number in the launch, before torch.distributed has started; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def join_ranks(platform: Platform, timeout: timedelta = COLLECTIVE_TIMEOUT) -> None:
    """Start torch.distributed, unless that was done.

    A single process needs no launcher and no free port: it meets itself in an in-memory store.
    """
    if dist.is_initialized():
        return
    if "RANK" in os.environ:
        dist.init_process_group(platform.distributed_backend, timeout=timeout)
    else:
        dist.init_process_group(
            platform.distributed_backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )


def initialize_topology(
    parallel: ParallelConfig, platform: Platform, *, seed: int, timeout: timedelta = COLLECTIVE_TIMEOUT
) -> Topology:
    """Start torch.distributed (also for one process) and Megatron's process groups, and seed its RNG tracker."""
    join_ranks(platform, timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=int(timeout.total_seconds() // 60),
    )
    # Megatron's tracker must exist before modules are built; weights are drawn elsewhere (model.build), by name.
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
    )


def shutdown_topology() -> None:
    """Undo :func:`initialize_topology`."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def topology_of(
    parallel: ParallelConfig, platform: Platform, *, seed: int, timeout: timedelta = COLLECTIVE_TIMEOUT
) -> Iterator[Topology]:
    """:func:`initialize_topology` for the length of a ``with`` block."""
    topology = initialize_topology(parallel, platform, seed=seed, timeout=timeout)
    try:
        yield topology
    finally:
        shutdown_topology()
