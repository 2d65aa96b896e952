"""What the trainer announces of a step before it reads it: the noise's batch and the rows of a micro-batch."""

from types import SimpleNamespace
from typing import Any

import pytest

from nld_train.config.schema import Config, DataConfig, DocumentMask, ObjectiveConfig, StageConfig
from nld_train.testing.steps import tiny_model
from nld_train.training.stages import plan_stages
from nld_train.training.trainer import Trainer


def trainer(fraction: float, document_mask: DocumentMask = DocumentMask.none) -> Any:
    """Enough of a trainer to plan: two ranks, stages ``ar`` (alpha 0), ``joint`` and ``chat``."""
    stage = {"tokens": 1000, "lr": 1.0, "min_lr": 0.1}
    config = Config(
        model=tiny_model(),
        data=DataConfig(corpus="stdlib", sequence_length=64, document_mask=document_mask),
        objective=ObjectiveConfig(block_size=8, noisy_fraction=fraction),
        stages={
            "ar": StageConfig(diffusion_loss_weight=0.0, **stage),
            "joint": StageConfig(diffusion_loss_weight=0.3, **stage),
            "chat": StageConfig(
                diffusion_loss_weight=0.3, chat="stdlib_chat", sequence_length=96, global_batch_size=6, **stage
            ),
        },
    )
    config.train.global_batch_size = 16
    config.train.micro_batch_size = 1
    found = object.__new__(Trainer)
    found.config, found.stages = config, plan_stages(config)
    found.topology = SimpleNamespace(data_parallel_size=2, context_parallel_size=1)  # type: ignore[assignment]
    return found


def test_noise_is_spread_over_the_batch_of_the_stage() -> None:
    planner = trainer(1.0)
    assert [planner._noise(stage).global_batch_size for stage in planner.stages] == [16, 16, 6]


@pytest.mark.parametrize(
    ("fraction", "document_mask", "rows"),
    [
        (1.0, DocumentMask.none, 128),
        (0.5, DocumentMask.none, 96),
        (1.0, DocumentMask.boundary, 128),
        (0.5, DocumentMask.boundary, None),
    ],
)
def test_rows_are_announced_only_where_all_micro_batches_have_as_many(
    fraction: float, document_mask: DocumentMask, rows: int | None
) -> None:
    """A pipeline allocates its buffers by them; conversations have as many noisy rows as their answers need."""
    planner = trainer(fraction, document_mask)
    shapes = [planner._shape(stage) for stage in planner.stages]
    assert [shape.num_rows for shape in shapes] == [64, rows, None]
    assert [shape.num_microbatches for shape in shapes] == [8, 8, 3]
