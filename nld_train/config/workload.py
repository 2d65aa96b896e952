"""How much a stage computes: rows, attention pairs and floating-point operations, from the configuration alone.

Dimensions: L clean tokens of a sequence, N noisy rows, S = N + L rows of the model's input, R rows that enter the
loss, H query heads, K key-value heads, D head dimension, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nld_train.config.schema import Config, DocumentMask, ModelConfig, ObjectiveConfig, Sampler

_ROW_MULTIPLE = 128  # numbers of noisy rows that depend on the data are rounded up to it (objective.noise)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What one sequence of a stage is, on average where a draw decides.

    Args:
        stage: its name.
        length: L.
        noisy_rows: N; the most there can be where documents or conversations decide (``is_bound``).
        weighted_rows: R, expected.
        pairs: of a query and a key that it may attend to, all of them in one document.
        has_table: rows bring tables of their own (:class:`nld_train.objective.sequence.RowTable`).
        is_bound: the numbers are upper bounds.
        block_size: tokens of a noisy block.
        global_batch_size: sequences of a step.
    """

    stage: str
    length: int
    noisy_rows: int
    weighted_rows: float
    pairs: float
    has_table: bool
    is_bound: bool
    block_size: int
    global_batch_size: int

    @property
    def rows(self) -> int:
        """S."""
        return self.noisy_rows + self.length

    def noisy_rows_of_a_share(self, num_shares: int) -> int:
        """Noisy rows of a context-parallel rank; the most likely among some sequences where blocks are drawn."""
        if num_shares == 1 or not self.has_table:
            return self.noisy_rows // num_shares
        chosen, share = self.noisy_rows / self.block_size, 1 / num_shares
        deviation = math.sqrt(chosen * share * (1 - share) * max(0.0, 1 - self.noisy_rows / (2 * self.length)))
        rows = (chosen * share + 2 * deviation) * self.block_size
        return min(math.ceil(rows / _ROW_MULTIPLE) * _ROW_MULTIPLE, self.noisy_rows)


def workload(config: Config, name: str) -> Workload:
    """The stage's workload.

    Args:
        name: of the stage, a key of ``config.stages``.
    """
    stage, objective = config.stages[name], config.objective
    length = stage.sequence_length or config.data.sequence_length
    has_documents = stage.chat is not None or config.data.document_mask is DocumentMask.boundary
    is_joint = stage.diffusion_loss_weight > 0
    copies = 2 if objective.complementary else 1
    is_bound = has_documents and is_joint and (stage.chat is not None or objective.noisy_fraction < 1)
    noisy = copies * _chosen_tokens(objective, length) if is_joint else 0
    if is_bound:
        noisy = min(math.ceil(noisy / _ROW_MULTIPLE) * _ROW_MULTIPLE, copies * length)
    return Workload(
        stage=name,
        length=length,
        noisy_rows=noisy,
        weighted_rows=(length if stage.ar_loss_weight > 0 else 0) + noisy * masked_share(objective),
        pairs=length * (length + 1) / 2 + noisy * _keys_of_a_noisy_row(length, objective.block_size),
        has_table=has_documents or noisy not in (0, length) or (noisy > 0 and copies > 1),
        is_bound=is_bound,
        block_size=objective.block_size,
        global_batch_size=stage.global_batch_size or config.train.global_batch_size,
    )


def workloads(config: Config) -> list[Workload]:
    """Of every stage, in their order."""
    return [workload(config, name) for name in config.stages]


def _chosen_tokens(objective: ObjectiveConfig, length: int) -> int:
    num_blocks = math.ceil(length / objective.block_size)
    chosen = max(1, math.ceil(round(objective.noisy_fraction * num_blocks, 9)))
    return min(length, chosen * objective.block_size)


def _keys_of_a_noisy_row(length: int, block_size: int) -> float:
    """Mean over the blocks: its own block and the clean tokens before it."""
    return block_size + max(0.0, (length - block_size) / 2)


def masked_share(objective: ObjectiveConfig) -> float:
    """Expected share of the noisy rows that are masked, in whole blocks."""
    size = objective.block_size
    if objective.complementary:
        return 0.5  # what one copy leaves, the other masks
    if objective.sampler in (Sampler.uniform_count, Sampler.power_count):
        exponent = 0.0 if objective.sampler is Sampler.uniform_count else -0.5
        chances = [count**exponent for count in range(1, size + 1)]
        return sum(count * chance for count, chance in enumerate(chances, start=1)) / (size * sum(chances))
    return (1 + objective.eps) / 2


def public_workload(length: int, block_size: int) -> Workload:
    """A joint stage as the public Megatron recipe computes it: a whole noisy copy, the head on every row."""
    pairs = length * (length + 1) / 2 + length * _keys_of_a_noisy_row(length, block_size)
    return Workload(
        stage="public recipe",
        length=length,
        noisy_rows=length,
        weighted_rows=2 * length,
        pairs=pairs,
        has_table=False,
        is_bound=False,
        block_size=block_size,
        global_batch_size=1,
    )


def num_head_chunks(rows: float, usual: int) -> int:
    """Of rows that enter the loss, where a chunk usually has so many: each reads the weight of the head and the sum of
    its gradient, so up to 0.3 of a chunk that would be left over is shared by the others."""
    return max(1, math.ceil(rows / usual - 0.3))


def forward_flops(model: ModelConfig, work: Workload, *, prunes_last_layer: bool = True) -> Mapping[str, float]:
    """Floating-point operations of one sequence's forward pass, by part; forward and backward together cost 3 times it.

    Args:
        prunes_last_layer: after the attention of the last layer only the rows with weight go on.

    Returns:
        ``layer``: of each layer but the last. ``attention``: the share of it that attention cores have (scores and
        weighted sums). ``last_layer``. ``head``.
    """
    hidden, heads, groups, dim = model.hidden_size, model.num_attention_heads, model.num_key_value_heads, model.head_dim
    qkv = 2 * hidden * (heads + 2 * groups) * dim * work.rows
    attention = 4 * heads * dim * work.pairs
    per_row_after = 2 * hidden * heads * dim + 6 * hidden * model.ffn_hidden_size
    rows_after = work.weighted_rows if prunes_last_layer else work.rows
    return {
        "layer": qkv + attention + per_row_after * work.rows,
        "attention": attention,
        "last_layer": qkv + attention + per_row_after * rows_after,
        "head": 2 * hidden * model.vocab_size * work.weighted_rows,
    }


def flops_per_token(model: ModelConfig, work: Workload, *, prunes_last_layer: bool = True) -> float:
    """Forward and backward pass of the whole model, per clean token."""
    flops = forward_flops(model, work, prunes_last_layer=prunes_last_layer)
    total = (model.num_layers - 1) * flops["layer"] + flops["last_layer"] + flops["head"]
    return 3 * total / work.length
