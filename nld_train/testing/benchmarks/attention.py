"""Attention alone, under the joint mask and under tables."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nld_train.config.schema import (
    AttentionBackend,
)
from nld_train.model.attention import joint_attention, resolve_backend
from nld_train.objective.noise import Corruption
from nld_train.objective.sequence import SequenceLayout, build_joint_batch
from nld_train.testing.benchmarks.comparison import Comparison, Work, check_equal
from nld_train.testing.benchmarks.conversion import without_results


def forward_backward(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def attention_inputs(
    layout: SequenceLayout, batch: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """query, key, value (leaves) and the output's gradient, in Megatron's order."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(layout.num_rows, batch, count, dim, generator=generator)
        .to(device=device, dtype=dtype)
        .permute(1, 2, 0, 3)
        .requires_grad_(index < 3)
        for index, count in enumerate((heads, kv_heads, kv_heads, heads))
    ]


def attention_suite(device: torch.device) -> Iterator[Comparison]:
    """Forward and backward of the attention alone on tensors in Megatron's order: joint (the doubled sequence) against
    torch's kernel under the dense mask, AR against torch's causal kernel with repeated keys and values."""
    fast = resolve_backend(AttentionBackend.auto, device)
    shapes = [  # L, batch, query heads, key-value heads, head dimension
        (512, 4, 4, 1, 64),
        (1024, 2, 8, 2, 64),
    ]
    for length, batch, heads, kv_heads, dim in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            # Two roundings to bf16 (2^-9 each) of results that agree; gradients of keys add up rounded terms.
            tolerance = 1e-5 if dtype is torch.float32 else 2e-2
            for has_noisy_half in (True, False):
                layout = SequenceLayout(length, 32, has_noisy_half)
                *inputs, grad = attention_inputs(layout, batch, heads, kv_heads, dim, dtype, device)

                def ours(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, backend: AttentionBackend) -> Tensor:
                    return joint_attention(q, k, v, layout, backend)

                def sdpa_repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True)

                functions: dict[str, Callable[..., Tensor]]
                if has_noisy_half:
                    functions = {
                        backend.value: partial(ours, layout=layout, backend=backend)
                        for backend in (AttentionBackend.dense, fast)
                    }
                    required = {fast.value: 1.3} if length == 1024 else {}
                else:
                    causal = partial(ours, layout=layout, backend=fast)
                    functions = {"sdpa, repeated heads": sdpa_repeated, "causal": causal}
                    required = {}
                kind = "joint" if has_noisy_half else "AR"
                shape = f"L {length}, batch {batch}, heads {heads}/{kv_heads}, head dim {dim}"
                yield Comparison(
                    title=f"{kind}, {str(dtype).removeprefix('torch.')}, {shape}, on {device.type}",
                    variants={
                        name: partial(forward_backward, function, inputs, grad) for name, function in functions.items()
                    },
                    tolerance=tolerance,
                    required=required,
                )


def table_layout(
    batch: int,
    length: int,
    block_size: int,
    *,
    noisy_fraction: float = 1.0,
    prompt: float = 0.0,
    num_documents: int = 1,
) -> SequenceLayout:
    """A layout with a table: of the blocks after the prompt, the same number in each sequence, chosen at random.

    Args:
        noisy_fraction: share of those blocks.
        prompt: share of the sequence that is never noisy.
        num_documents: equal parts of the sequence, whole blocks each; the prompt is the beginning of the first.
    """
    generator = torch.Generator().manual_seed(0)
    num_blocks = length // block_size
    first = round(prompt * num_blocks)
    chosen = round(noisy_fraction * (num_blocks - first))
    blocks = torch.stack(
        [first + torch.randperm(num_blocks - first, generator=generator)[:chosen].sort().values for _ in range(batch)]
    )
    places = (blocks[:, :, None] * block_size + torch.arange(block_size)).flatten(1)
    tokens = torch.zeros(batch, length, dtype=torch.int64)
    corruption = Corruption(
        noisy_tokens=torch.zeros_like(places),
        places=places,
        blocks=blocks.repeat_interleave(block_size, dim=1),
        weights=torch.zeros(places.shape, dtype=torch.float64),
        mask_ratios=torch.zeros(places.shape),
        sequence_ratios=torch.zeros(batch, dtype=torch.float64),
    )
    document = num_blocks // num_documents * block_size
    starts = (torch.arange(length) // document).clamp_max(num_documents - 1) * document
    return build_joint_batch(
        tokens, tokens, tokens.bool(), corruption, block_size, document_starts=starts.repeat(batch, 1)
    ).layout


def layouts_suite(device: torch.device) -> Iterator[Comparison]:
    """Forward and backward of the attention under layouts with a table, against the plain joint one and the AR one.

    They compute different things, so each is compared with the dense backend first and returns nothing afterwards. At
    a noisy share rho a step may take 1.10 * (1 + rho) / 2 of the plain one's time.
    """
    fast = resolve_backend(AttentionBackend.auto, device)
    for length, batch, heads, kv_heads, dim in ((512, 4, 4, 1, 64), (1024, 2, 8, 2, 64)):
        layouts = {
            "plain joint": SequenceLayout(length, 32, has_noisy_half=True),
            "rho 0.5": table_layout(batch, length, 32, noisy_fraction=0.5),
            "rho 0.25": table_layout(batch, length, 32, noisy_fraction=0.25),
            "4 documents": table_layout(batch, length, 32, num_documents=4),
            "AR": SequenceLayout(length, 32, has_noisy_half=False),
            "90% prompt": table_layout(batch, length, 32, prompt=0.9),
        }
        for dtype in (torch.float32, torch.bfloat16):
            shape = f"L {length}, batch {batch}, heads {heads}/{kv_heads}, head dim {dim}, on {device.type}"
            title = f"layouts, {str(dtype).removeprefix('torch.')}, {shape}"
            works: dict[str, Work] = {}
            for name, on_cpu in layouts.items():
                layout = on_cpu.to(device)
                *inputs, grad = attention_inputs(layout, batch, heads, kv_heads, dim, dtype, device)
                backends = {
                    backend.value: partial(
                        forward_backward, partial(joint_attention, layout=layout, backend=backend), inputs, grad
                    )
                    for backend in (AttentionBackend.dense, fast)
                }
                tolerance = 1e-5 if dtype is torch.float32 else 2e-2
                check_equal(Comparison(title=f"{title}, {name}", variants=dict(backends), tolerance=tolerance))
                works[name] = partial(without_results, backends[fast.value])
            baselines: dict[str, dict[str, float]] = {
                "plain joint": {"rho 0.5": 1 / (1.1 * 0.75), "rho 0.25": 1 / (1.1 * 0.625), "4 documents": 1.0},
                "AR": {"90% prompt": 1 / 1.25},
            }
            for baseline, required in baselines.items():
                variants = {name: works[name] for name in (baseline, *required)}
                yield Comparison(
                    title=f"{title}, against {baseline}", variants=variants, tolerance=0, required=required
                )
