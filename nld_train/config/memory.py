"""How much memory a training step takes on each rank: a model on paper, from the configuration alone.

Parameters, gradients and optimizer state are exact but for the padding of Megatron's buffers. Activations are what
Megatron's layer and our attention, norms and head really keep for the backward pass, tensor by tensor; tests/config
compares them with a count of those tensors. What exists for a moment only (``workspace``) is the largest of a few sums.

Dimensions: B sequences in a micro-batch, S rows of the model's input, R rows that enter the loss, H query heads, K
key-value heads, D head dimension, F width inside the SwiGLU, V vocabulary. Everything is bytes of one rank.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from nld_train.config.schema import ModelConfig, ParallelConfig, Precision, Recompute
from nld_train.config.workload import Workload, num_head_chunks

PARTS = {
    "parameters": "weights, in the precision of the run",
    "gradients": "fp32 sums over micro-batches (main_grad)",
    "optimizer": "two moments, and fp32 weights for bf16: this rank's share over data and context ranks",
    "inputs": "of recomputed layers",
    "norms": "inputs of RMSNorm",
    "attention": "values, rotated queries and keys, output",
    "mlp": "SwiGLU",
    "head": "gradient of the rows that enter the loss; token ids of the embedding",
    "pipeline": "tensors between stages that wait for their backward pass",
    "workspace": "for a moment: a chunk of logits, or gradients inside a layer",
}
_BYTES = {Precision.fp32: 4, Precision.bf16: 2, Precision.fp8: 2}
# model.head on CUDA
_HEAD_CHUNK_ROWS = {Precision.fp32: 512, Precision.bf16: 2048, Precision.fp8: 2048}
_HEAD_PASS_BYTES = 32 << 20
_HEAD_PRODUCT_ROWS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Of the ranks of one pipeline stage.

    Args:
        pipeline_rank: from 0.
        layers: decoder layers there.
        micro_batches: whose activations are alive at once; with interleaved stages a fraction counts chunks.
        bytes_of: a number for each name in :data:`PARTS`.
    """

    pipeline_rank: int
    layers: int
    micro_batches: float
    bytes_of: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes_of.values())

    @property
    def activations(self) -> int:
        """All but weights, gradients and optimizer."""
        return self.total - sum(self.bytes_of[part] for part in ("parameters", "gradients", "optimizer"))


def layers_of_stages(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Decoder layers of each pipeline rank; those that divide evenly must (the configuration is checked elsewhere)."""
    size = parallel.pipeline_model_parallel_size
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    given = [number for number in (first, last) if number is not None]
    others = size - len(given)
    middle = (num_layers - sum(given)) // others if others > 0 else 0
    stages = [middle] * size
    if first is not None:
        stages[0] = first
    if last is not None:
        stages[-1] = last
    return stages


def num_parameters(model: ModelConfig, parallel: ParallelConfig, pipeline_rank: int) -> int:
    """Parameters on one rank. The head is never tied to the embedding."""
    hidden, tensor = model.hidden_size, parallel.tensor_model_parallel_size
    heads, groups, dim = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    attention = hidden * (2 * heads + 2 * groups) * dim
    layer = (attention + 3 * hidden * model.ffn_hidden_size) // tensor + 2 * hidden
    number = layers_of_stages(model.num_layers, parallel)[pipeline_rank] * layer
    vocabulary = model.vocab_size // tensor * hidden
    if pipeline_rank == 0:
        number += vocabulary
    if pipeline_rank == parallel.pipeline_model_parallel_size - 1:
        number += vocabulary + hidden
    return number


def micro_batches_alive(parallel: ParallelConfig, pipeline_rank: int, num_micro_batches: int) -> float:
    """Micro-batches whose activations a pipeline rank holds at once (1F1B, or interleaved in parts of one)."""
    size, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    if chunks == 1:
        return min(size - pipeline_rank, num_micro_batches)
    warm_up = 2 * (size - pipeline_rank - 1) + (chunks - 1) * size
    return min(warm_up + 1, num_micro_batches * chunks) / chunks


def estimate_memory(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    work: Workload,
    *,
    micro_batch_size: int,
    data_parallel_size: int,
    head_chunk_rows: int | None = None,
    head_pass_bytes: int = _HEAD_PASS_BYTES,
) -> list[RankMemory]:
    """Of each pipeline rank.

    Args:
        work: the stage's rows.
        data_parallel_size: ranks with other samples, without the context ranks.
        head_chunk_rows: rows of logits that exist at a time; None: as many as on CUDA.
        head_pass_bytes: of half-precision logits that are there in fp32, too.
    """
    if head_chunk_rows is None:
        head_chunk_rows = _HEAD_CHUNK_ROWS[precision]
    num_micro_batches = max(1, work.global_batch_size // (micro_batch_size * data_parallel_size))
    return [
        _rank_memory(
            model,
            parallel,
            precision,
            work,
            rank,
            micro_batch_size=micro_batch_size,
            optimizer_shards=data_parallel_size * parallel.context_parallel_size,
            alive=micro_batches_alive(parallel, rank, num_micro_batches),
            head_chunk_rows=head_chunk_rows,
            head_pass_bytes=head_pass_bytes,
        )
        for rank in range(parallel.pipeline_model_parallel_size)
    ]


def _rank_memory(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    work: Workload,
    pipeline_rank: int,
    *,
    micro_batch_size: int,
    optimizer_shards: int,
    alive: float,
    head_chunk_rows: int,
    head_pass_bytes: int,
) -> RankMemory:
    size = _BYTES[precision]
    is_first = pipeline_rank == 0
    is_last = pipeline_rank == parallel.pipeline_model_parallel_size - 1
    layers = layers_of_stages(model.num_layers, parallel)[pipeline_rank]
    parameters = num_parameters(model, parallel, pipeline_rank)
    of_layer = _Layer(model, parallel, size, work, micro_batch_size)
    hidden = model.hidden_size

    # What one micro-batch keeps after its forward pass. The last layer of the model goes on with R rows alone.
    recompute = parallel.recompute_granularity
    kept = Counter({part: number * (layers - is_last) for part, number in of_layer.kept(recompute).items()})
    kept["head"] += 8 * of_layer.rows if is_first else 0  # token ids, kept by the embedding
    kept["attention"] += of_layer.rotary_tables if of_layer.has_table else 0
    if not is_last:
        kept["pipeline"] += size * hidden * of_layer.shard  # what was sent
    # And at most, while its backward pass runs: a layer that is computed again is there in full.
    moments = []
    if is_last:
        if layers > 1:
            moments.append(kept + of_layer.computed_again(recompute, is_last=False))
        kept.update(of_layer.kept(recompute, is_last=True))
        moments.append(kept + of_layer.computed_again(recompute, is_last=True))
        kept["norms"] += of_layer.norm(of_layer.selected_shard)
        kept["head"] += size * hidden * of_layer.selected
        moments.append(kept)
    else:
        moments.append(kept + of_layer.computed_again(recompute, is_last=False))
    activations = Counter({part: round(number * (alive - 1)) for part, number in kept.items()})
    peak: Counter[str] = max(moments, key=Counter.total)
    activations.update(peak)
    activations["attention"] += 0 if of_layer.has_table else of_layer.rotary_tables

    workspace = of_layer.backward_workspace
    if is_last:
        chunk = math.ceil(of_layer.selected / num_head_chunks(of_layer.selected, head_chunk_rows))
        workspace = max(workspace, of_layer.head_workspace(chunk, head_pass_bytes))
    # The embedding's gradient comes last, when the activations are gone.
    if is_first and alive <= 1:
        workspace = max(workspace, of_layer.embedding_gradient - activations.total())
    return RankMemory(
        pipeline_rank=pipeline_rank,
        layers=layers,
        micro_batches=alive,
        bytes_of=dict.fromkeys(PARTS, 0)
        | activations
        | {
            # In FP8 also a copy of each layer's matrices as they are and one transposed (embedding and head: none).
            "parameters": (size + (2 if precision is Precision.fp8 else 0)) * parameters,
            "gradients": 4 * parameters,
            # fp32 weights are their own main weights.
            "optimizer": (8 if precision is Precision.fp32 else 12) * parameters // optimizer_shards,
            "workspace": workspace,
        },
    )


class _Layer:
    """Bytes that one decoder layer keeps for one micro-batch.

    Args:
        size: bytes of an element.
    """

    def __init__(
        self, model: ModelConfig, parallel: ParallelConfig, size: int, work: Workload, micro_batch_size: int
    ) -> None:
        context = parallel.context_parallel_size
        self.size = size
        self.tensor = parallel.tensor_model_parallel_size
        self.hidden, self.ffn, self.vocab_size = model.hidden_size, model.ffn_hidden_size, model.vocab_size
        self.dim = model.head_dim
        self.heads = model.num_attention_heads // self.tensor
        self.groups = model.num_key_value_heads // self.tensor
        self.is_shared = context > 1
        self.noisy = work.noisy_rows_of_a_share(context) * micro_batch_size
        self.rows = self.noisy + work.length * micro_batch_size // context
        self.clean_keys = work.length * micro_batch_size
        self.selected = math.ceil(work.weighted_rows * micro_batch_size / context)
        # Between the matrices, with sequence parallelism, a tensor-parallel rank has its share of the rows.
        shares = self.tensor if parallel.sequence_parallel else 1
        self.shard, self.selected_shard = self.rows // shares, -(-self.selected // shares)
        # Of a micro-batch's own rows, or of positions 0..L-1 for all micro-batches.
        self.has_table = work.has_table or self.is_shared
        self.rotary_tables = 2 * self.dim * size * (self.rows if self.has_table else work.length)

    def norm(self, rows: int) -> int:
        """The input, and one number a row. The output is kept by what reads it."""
        return rows * (self.hidden * self.size + 4)

    def kept(self, recompute: Recompute, *, is_last: bool = False) -> Counter[str]:
        """Between the forward pass and the backward pass of the layer.

        Args:
            is_last: after the attention only the rows with weight go on.
        """
        size = self.size
        if recompute is Recompute.full:
            return Counter({"inputs": size * self.hidden * self.shard})
        after, after_shard = (self.selected, self.selected_shard) if is_last else (self.rows, self.shard)
        queries = self.rows * self.heads * self.dim
        out = after * self.heads * self.dim  # read by the output projection
        inside = 3 * after * self.ffn // self.tensor  # gate and up; silu(gate) * up
        keys = 2 * self.rows * self.groups * self.dim  # and values
        if recompute is Recompute.selective:  # attention cores keep their inputs alone
            return Counter({
                "norms": self.norm(self.shard) + self.norm(after_shard),
                "attention": size * (self.hidden * self.shard + queries + keys + out),
                "mlp": size * (self.hidden * after_shard + inside),
            })  # fmt: skip
        whole_out = queries if is_last else 0  # before the rows were chosen
        if self.is_shared:
            # Every clean key and value and the own noisy ones, laid out anew; the output in groups of heads and whole.
            keys = 2 * (self.noisy + self.clean_keys) * self.groups * self.dim
            whole_out = queries
        return Counter({
            "norms": self.norm(self.shard) + self.norm(after_shard),
            "attention": size * (self.hidden * self.shard + queries + keys + whole_out + out)
            + 4 * self.heads * self.rows,
            "mlp": size * (self.hidden * after_shard + inside),
        })  # fmt: skip

    def computed_again(self, recompute: Recompute, *, is_last: bool) -> Counter[str]:
        """What is there besides while a layer's backward pass runs."""
        if recompute is Recompute.none:
            return Counter()
        again = self.kept(Recompute.none, is_last=is_last)
        if recompute is Recompute.selective:
            core = self.size * self.rows * (self.heads + self.groups) * self.dim + 4 * self.heads * self.rows
            return Counter({"attention": core})
        again["norms"] -= self.size * self.hidden * self.shard  # the layer's input, which is there already
        return again

    @property
    def backward_workspace(self) -> int:
        """Inside the SwiGLU: gradients of the product and of its factors, while little of the layer is let go; those
        of its input and output; and of one matrix."""
        inside = self.ffn // self.tensor
        return self.size * (3 * self.rows * inside + 2 * self.hidden * self.rows + inside * self.hidden)

    def head_workspace(self, chunk_rows: int, pass_bytes: int) -> int:
        """Logits; besides those in half precision some rows in fp32, and later some rows of the weight's gradient."""
        num_local = self.vocab_size // self.tensor
        logits = chunk_rows * num_local * self.size
        if self.size == 4:
            return logits
        in_fp32 = min(max(pass_bytes, 4 * num_local), 4 * chunk_rows * num_local)
        return logits + max(in_fp32, 4 * min(_HEAD_PRODUCT_ROWS, num_local) * self.hidden)

    @property
    def embedding_gradient(self) -> int:
        return self.size * self.vocab_size // self.tensor * self.hidden


def largest(ranks: Sequence[RankMemory]) -> RankMemory:
    """The rank that needs most."""
    return max(ranks, key=lambda rank: rank.total)
