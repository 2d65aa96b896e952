"""What each part of a training step costs on paper: operations, bytes through a GPU's memory, bytes over the network.

Operations are the needed ones of forward and backward (3 times the forward's), of matrix products and attention alone;
everything else is bound by memory. Bytes are what kernels move that read each input once and write each output once;
weights are read once a product and micro-batch, and their gradients are added to Megatron's fp32 buffer by a kernel of
their own. The head is counted as :mod:`nld_train.model.head` has it: in chunks of rows, each of which reads the weight
twice and adds to its gradient, with the passes over the logits that are written there: all of them through the memory,
though a pass over a few rows may find in a cache what the one before has left.

Dimensions: L clean tokens of a sequence, N noisy rows, S = N + L rows of the model's input, R rows that enter the loss,
h hidden size, F width inside the SwiGLU, H query heads, K key-value heads, D head dimension, V vocabulary, n layers,
e bytes of an element, P parameters.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from nld_train.config.memory import num_parameters
from nld_train.config.schema import ModelConfig, ParallelConfig
from nld_train.config.workload import Workload, num_head_chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Peaks of one device, as its maker states them.

    Args:
        flops_per_s: dense products in the dtype of the run.
        bytes_per_s: of its memory.
        network_bytes_per_s: that it exchanges with the other ranks of a data-parallel ring.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    network_bytes_per_s: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """How a step is computed, as far as its traffic depends on it. The defaults are ours in bf16 on CUDA.

    Args:
        element_bytes: e.
        head_chunk_rows: rows of logits that exist at a time; None: all.
        head_product_bytes: of an element of a chunk's part of the head's weight gradient, which a kernel of its own
            reads and adds to the fp32 sum. None: the product adds to the sum itself.
        adds_in_products: so do the products of all other weight gradients.
        logit_bytes: what the passes over a logit move, without the products that make and read it.
        rope_passes: reads and writes of the rotated elements, forward and backward; 4 where one kernel does it.
        repeats_keys: keys and values are written out once for each query head.
        prunes_last_layer: after the attention of the last layer only the rows that enter the loss go on.
    """

    element_bytes: int = 2
    head_chunk_rows: int | None = 2048
    head_product_bytes: int | None = 4
    adds_in_products: bool = False
    logit_bytes: int = 36  # 2 read, 4 written; in fp32 maximum, softmax, its largest, scale: 24; 4 read, 2 written
    rope_passes: int = 4
    repeats_keys: bool = False
    prunes_last_layer: bool = True


OURS = Kernels()
OURS_SPLIT = replace(OURS, logit_bytes=50)
"""With tensor parallelism: the softmax is computed again when its normaliser is known, 6 to have it in fp32 and 8."""

OURS_FP32 = Kernels(element_bytes=4, head_chunk_rows=512, head_product_bytes=None, logit_bytes=24)
"""In fp32: the product is added in place, and the logits need no second copy, nor with tensor parallelism a second
softmax."""

OURS_CPU = replace(OURS, head_chunk_rows=1024, head_product_bytes=2)
"""In bf16 on the CPU, where products are rounded."""

PUBLIC = Kernels(
    head_chunk_rows=None,
    head_product_bytes=2,
    # The transposed copy 4 and its gradient 4; to fp32 6, maximum, subtraction, exp, sum, division 32; scale 8, 6 back.
    logit_bytes=60,
    rope_passes=21,  # separate products, rotation by concatenation, sum; and their gradients
    repeats_keys=True,
    prunes_last_layer=False,
)
"""The public Megatron recipe's way; its passes are counted from the operations it is written in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCost:
    """Of one sequence, forward and backward, summed over the ranks that share it.

    Args:
        flops: operations of matrix products and attention.
        bytes: through the memory.
        apart_bytes: of them those that kernels of their own move, which compute nothing.
        network_bytes: that each rank of a data-parallel ring sends, times the ranks that share a sequence.
    """

    flops: float = 0.0
    bytes: float = 0.0
    apart_bytes: float = 0.0
    network_bytes: float = 0.0

    def seconds(self, machine: Machine) -> float:
        """Roofline at the machine's peaks: the longer of computing and moving, then what is moved apart from it."""
        computing = max(self.flops / machine.flops_per_s, (self.bytes - self.apart_bytes) / machine.bytes_per_s)
        return computing + self.apart_bytes / machine.bytes_per_s + self.network_bytes / machine.network_bytes_per_s


FORMULAS: Mapping[str, tuple[str, str]] = {
    "embedding": ("", "e h (3 S + V) + a V h"),
    "norms, residuals": ("", "e h (5 S + 11 S') a layer, 5 e h R at the end"),
    "qkv": ("6 S h (H + 2K) D", "3 e S (h + (H + 2K) D) + (3 e + a) h (H + 2K) D"),
    "rope": ("", f"{OURS.rope_passes} e S (H + K) D; public {PUBLIC.rope_passes} e S (H + K) D"),
    "attention": ("12 H D pairs", "6 e S D (H + K) + 8 H S; public + e S D (10 H - 2 K)"),
    "output projection": ("6 S' H D h", "3 e S' (H D + h) + (3 e + a) H D h"),
    "MLP products": ("18 S' h F", "3 e S' (2 h + 3 F) + (3 e + a) 3 h F"),
    "SwiGLU": ("", "8 e S' F"),
    "head": (
        "6 R h V",
        "c V h (2 e + 4 + 4 + 8) + 3 e R (V + h); public V h (2 e + e + a) + 3 e R (V + h)",
    ),
    "cross-entropy": (
        "",
        f"{OURS.logit_bytes} R V, {OURS_SPLIT.logit_bytes} R V where V is split; public {PUBLIC.logit_bytes} R V",
    ),
    "optimizer": ("", "(4 + 34 / d) P a step, d / batch of it for a sequence"),
    "gradient reduction": ("", "(4 + e) P (d - 1) / d a step over the network, d / batch of it for a sequence"),
}
"""Operations and bytes of each part, for people: of a layer and a sequence where nothing else is said. S' is S, in the
last layer R where it is pruned; a = e + 8, what adds a gradient to its fp32 sum; c chunks of the head; d
data-parallel ranks."""


def step_cost(
    model: ModelConfig,
    work: Workload,
    kernels: Kernels,
    *,
    data_parallel_size: int = 1,
    sequences_per_micro_batch: int = 1,
    sequences_per_step: int = 1,
) -> dict[str, PartCost]:
    """Cost of one sequence by part, in the order of :data:`FORMULAS`, which says what is counted.

    Args:
        work: the stage's rows.
        kernels: how it is computed.
        data_parallel_size: ranks (or groups of tensor-parallel ones) with other sequences.
        sequences_per_micro_batch: that share one reading of the weights.
        sequences_per_step: of all ranks, that share one optimizer step.
    """
    hidden, ffn, vocabulary, layers = model.hidden_size, model.ffn_hidden_size, model.vocab_size, model.num_layers
    heads, groups, dim = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    size, share = kernels.element_bytes, 1 / sequences_per_micro_batch
    rows, weighted = work.rows, work.weighted_rows
    every = layers * rows
    after = (layers - 1) * rows + (weighted if kernels.prunes_last_layer else rows)  # behind the attention
    last = weighted if kernels.prunes_last_layer else rows

    # A weight's gradient is written and then added to its fp32 sum, or added at once.
    written, added = (8, 0) if kernels.adds_in_products else (size, size + 8)

    def product(num_rows: float, width_in: int, width_out: int) -> PartCost:
        """All layers' products with a weight [in, out] of ``num_rows`` rows in all."""
        weights = layers * width_in * width_out * share
        moved = 3 * size * num_rows * (width_in + width_out) + (2 * size + written) * weights
        return PartCost(
            flops=6 * num_rows * width_in * width_out, bytes=moved + added * weights, apart_bytes=added * weights
        )

    up, down = product(after, hidden, 2 * ffn), product(after, ffn, hidden)
    repeated = every * size * dim * (10 * heads - 2 * groups) if kernels.repeats_keys else 0
    chunks = 1 if kernels.head_chunk_rows is None else num_head_chunks(weighted / share, kernels.head_chunk_rows)
    of_chunks = chunks * share * vocabulary * hidden  # weights that all chunks read, and gradients that they write
    head_written, head_added = 8, 0.0
    if kernels.head_product_bytes is not None:
        head_written, head_added = kernels.head_product_bytes, (kernels.head_product_bytes + 8) * of_chunks
    embedded = vocabulary * hidden * share
    parameters = num_parameters(model, ParallelConfig(), 0)
    shards = data_parallel_size
    steps = shards / sequences_per_step  # optimizer steps of a rank for each sequence of its own
    return {
        "embedding": PartCost(bytes=size * (3 * hidden * rows + embedded) + (size + 8) * embedded),
        "norms, residuals": PartCost(bytes=size * hidden * (5 * every + 11 * after + 5 * last)),
        "qkv": product(every, hidden, (heads + 2 * groups) * dim),
        "rope": PartCost(bytes=kernels.rope_passes * size * (heads + groups) * dim * every),
        "attention": PartCost(
            flops=12 * heads * dim * work.pairs * layers,
            bytes=every * (6 * size * (heads + groups) * dim + 8 * heads) + repeated,
            apart_bytes=repeated,
        ),
        "output projection": product(after, heads * dim, hidden),
        "MLP products": PartCost(
            flops=up.flops + down.flops,
            bytes=up.bytes + down.bytes,
            apart_bytes=up.apart_bytes + down.apart_bytes,
        ),
        "SwiGLU": PartCost(bytes=8 * size * ffn * after),
        "head": PartCost(
            flops=6 * weighted * hidden * vocabulary,
            bytes=of_chunks * (2 * size + head_written) + head_added + 3 * size * weighted * (vocabulary + hidden),
            apart_bytes=head_added,
        ),
        "cross-entropy": PartCost(bytes=kernels.logit_bytes * weighted * vocabulary),
        "optimizer": PartCost(bytes=(4 + 34 / shards) * parameters * steps),
        "gradient reduction": PartCost(network_bytes=(4 + size) * parameters * (shards - 1) / shards * steps),
    }
