"""The parts of a training step, each alone, against the whole step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nld_train.config.schema import AttentionBackend, Device, ModelConfig, OptimConfig, ParallelConfig
from nld_train.config.step_cost import OURS, OURS_CPU, OURS_FP32, Kernels
from nld_train.config.workload import Workload, public_workload
from nld_train.model.attention import joint_attention, resolve_backend
from nld_train.model.build import build_model
from nld_train.model.head import WeightedRows, fused_linear_cross_entropy, select_weighted_rows
from nld_train.objective.normalize import row_weights
from nld_train.platform.device import initialize_device
from nld_train.platform.topology import topology_of
from nld_train.testing.benchmarks.comparison import Comparison, Work
from nld_train.testing.benchmarks.conversion import without_results
from nld_train.testing.benchmarks.step import (
    STEP_RECIPE,
    STEP_SHAPES,
    StepSize,
    TrainingStep,
    loader_batch,
    step_model,
    step_text,
    step_title,
)
from nld_train.training.step import LossWeights, lay_out

WHOLE = "whole step"
PRODUCT_SIZE, COPIED_ELEMENTS = 1024, 2**24
PRODUCT, COPY = (
    f"a product of {PRODUCT_SIZE} x {PRODUCT_SIZE} x {PRODUCT_SIZE}",
    f"a copy of {COPIED_ELEMENTS} elements",
)
"""What the machine can do: cost_page takes its rates from these two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsCase:
    """One step whose parts are measured: what it is on paper. One micro-batch of ``num_sequences``."""

    title: str
    size: StepSize
    dtype: torch.dtype
    model: ModelConfig
    work: Workload
    kernels: Kernels
    num_sequences: int


def parts_cases(device: torch.device) -> list[PartsCase]:
    """Of the shapes of the step suite, in both dtypes."""
    cases = []
    for size in STEP_SHAPES[device.type]:
        length, batch = size[6:]
        work = replace(public_workload(length, STEP_RECIPE.block_size), weighted_rows=1.5 * length)
        for dtype in (torch.float32, torch.bfloat16):
            in_bf16 = OURS_CPU if device.type == "cpu" else OURS
            cases.append(
                PartsCase(
                    title=f"parts of a joint training step, {step_title(size, dtype, device)}",
                    size=size,
                    dtype=dtype,
                    model=step_model(size),
                    work=work,
                    kernels=in_bf16 if dtype is torch.bfloat16 else OURS_FP32,
                    num_sequences=batch,
                )
            )
    return cases


def parts_suite(device: torch.device) -> Iterator[Comparison]:
    """A joint training step, optimizer included, and each of its parts alone, on tensors of the step's shapes: all
    layers, forward and backward, with the addition to Megatron's gradient buffer. The ratio is the whole step's time to
    the part's, so its inverse is the part's share. Alone, a part may find in the caches what it would not find there in
    a step. [step_cost.md](step_cost.md) puts the shares beside those of the model on paper, at the rates of the two
    variants that come last."""
    with topology_of(ParallelConfig(), initialize_device(Device(device.type)), seed=0):
        for case in parts_cases(device):
            yield Comparison(
                title=case.title,
                variants={name: partial(without_results, work) for name, work in _works(case, device).items()},
                tolerance=0.0,
            )


def _works(case: PartsCase, device: torch.device) -> Mapping[str, Work]:
    shape = case.model
    model = build_model(shape, ParallelConfig(), dtype=case.dtype, device=device, seed=0)
    length, batch = case.size[6:]
    sample = loader_batch(step_text(case.size), STEP_RECIPE, torch.ones(batch, length, dtype=torch.bool))
    weights = LossWeights(diffusion=0.3)
    whole_step = TrainingStep(model, [sample], objective=STEP_RECIPE, weights=weights, optim=OptimConfig(), lr=1e-6)
    joint = lay_out(sample, STEP_RECIPE.block_size)
    of_rows = row_weights(joint, STEP_RECIPE.normalization.value, weights.diffusion, weights.ar)
    selected: WeightedRows = select_weighted_rows(joint, of_rows).to(device)
    joint = joint.to(device)
    rows, chosen = joint.layout.num_rows, len(selected.rows)
    backend = resolve_backend(AttentionBackend.auto, device)
    layers = list(model.decoder.layers)

    def tensor(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=torch.Generator().manual_seed(0)).to(device, case.dtype)

    hidden, heads, groups, dim = (
        shape.hidden_size,
        shape.num_attention_heads,
        shape.num_key_value_heads,
        shape.head_dim,
    )
    # Of all rows, and of those that leave the last layer.
    whole = tensor(rows, batch, hidden).requires_grad_()
    some = tensor(chosen, 1, hidden).requires_grad_()
    of_layers = [whole] * (len(layers) - 1) + [some]
    query, key, value = (tensor(rows, batch, count, dim).requires_grad_() for count in (heads, groups, groups))
    contexts = [tensor(*x.shape[:2], heads * dim).requires_grad_() for x in (whole, some)]
    of_contexts = [contexts[0]] * (len(layers) - 1) + [contexts[1]]

    gradients: dict[torch.Size, Tensor] = {}

    def back(output: Tensor) -> None:
        if output.shape not in gradients:
            gradients[output.shape] = tensor(*output.shape)
        torch.autograd.backward(output, gradients[output.shape])
        for leaf in (whole, some, query, key, value, *contexts):
            leaf.grad = None

    def embedding() -> Sequence[Tensor]:
        back(model.embedding(input_ids=joint.tokens, position_ids=None))
        return []

    def norms() -> Sequence[Tensor]:
        for layer, after in zip(layers, of_layers, strict=True):
            back(layer.input_layernorm(whole))
            back(layer.pre_mlp_layernorm(after))
        back(model.decoder.final_layernorm(some))
        return []

    def qkv() -> Sequence[Tensor]:
        for layer in layers:
            back(layer.self_attention.linear_qkv(whole)[0])
        return []

    def rope() -> Sequence[Tensor]:
        for layer in layers:
            for rotated in layer.self_attention.core_attention.rotary.apply(query, key, joint.layout):
                back(rotated)
        return []

    def attention() -> Sequence[Tensor]:
        for _ in layers:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            back(joint_attention(q, k, v, joint.layout, backend))
        return []

    def projection() -> Sequence[Tensor]:
        for layer, context in zip(layers, of_contexts, strict=True):
            back(layer.self_attention.linear_proj(context)[0])
        return []

    def mlp() -> Sequence[Tensor]:
        for layer, after in zip(layers, of_layers, strict=True):
            back(layer.mlp(after)[0])
        return []

    def head() -> Sequence[Tensor]:
        weight = model.output_layer.weight
        flat = some.squeeze(1)
        loss, _, _ = fused_linear_cross_entropy(flat, weight, selected.targets, selected.weights)
        loss.backward()
        some.grad = None
        return []

    def adam() -> Sequence[Tensor]:
        whole_step.zero_gradients()
        whole_step.update()
        return []

    square, source = tensor(PRODUCT_SIZE, PRODUCT_SIZE), tensor(COPIED_ELEMENTS)
    target = torch.empty_like(source)
    return {
        WHOLE: whole_step,
        "embedding": embedding,
        "norms": norms,
        "qkv": qkv,
        "rope": rope,
        "attention": attention,
        "output projection": projection,
        "MLP": mlp,
        "head and cross-entropy": head,
        "optimizer": adam,
        PRODUCT: lambda: [square @ square],
        COPY: lambda: [target.copy_(source)],
    }
