"""Memory of the output head."""

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nld_train.testing.benchmarks.comparison import Comparison, Work
from nld_train.testing.benchmarks.conversion import Conversion

HEAD_SHAPE = (2048, 131072, 1024)  # rows with weight, vocabulary, hidden size


def head_step(_source: Path, out: Path, *, is_fused: bool, dtype: torch.dtype) -> None:
    """Loss and gradients of the output head with Megatron's fp32 gradient buffer; writes what is compared."""
    from nld_train.model.head import fused_linear_cross_entropy

    num_rows, vocab_size, hidden_size = HEAD_SHAPE
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, hidden_size, generator=generator).to(dtype).requires_grad_()
    weight = torch.nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype).normal_(0, 0.02, generator=generator))
    targets = torch.randint(vocab_size, (num_rows,), generator=generator)
    weights = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    main_grad = torch.zeros(weight.shape)
    if is_fused:
        weight.main_grad = main_grad  # type: ignore[attr-defined]
        loss, _, _ = fused_linear_cross_entropy(hidden, weight, targets, weights)
        loss.backward()
    else:
        log_probabilities = F.log_softmax((hidden @ weight.t()).float(), dim=1)
        loss = -(log_probabilities.gather(1, targets[:, None]).squeeze(1) * weights.float()).sum()
        del log_probabilities
        loss.backward()
        assert weight.grad is not None
        main_grad.add_(weight.grad)
    weight.grad = None
    out.mkdir()
    torch.save([loss.detach(), hidden.grad, main_grad[::64].clone()], out / "result.pt")


def head_suite(device: torch.device) -> Iterator[Comparison]:
    """Peak anonymous memory (`RssAnon`, polled every 5 ms) of the head's forward and backward, against full logits and
    autograd, each in a process of its own, on the CPU. Everything counts: Python and torch, the weight, and Megatron's
    fp32 gradient buffer, which both have."""
    if device.type != "cpu":
        raise SystemExit("the head suite reads the memory of processes: use --device cpu")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            runs = {
                variant: Conversion(
                    partial(head_step, is_fused=variant == "fused", dtype=dtype), folder, folder / "out"
                )
                for variant in ("full logits", "fused")
            }

            def work(run: Conversion) -> Sequence[Tensor]:
                run.peak_bytes = 0
                run()
                results: list[Tensor] = torch.load(run.out / "result.pt")
                return results

            works: dict[str, Work] = {variant: partial(work, run) for variant, run in runs.items()}
            by_work = {id(works[variant]): run for variant, run in runs.items()}

            def peak(work: Work, by_work: dict[int, Conversion] = by_work) -> float:
                work()
                return by_work[id(work)].peak_bytes

            num_rows, vocab_size, hidden_size = HEAD_SHAPE
            shape = f"{num_rows} rows, V {vocab_size}, H {hidden_size}"
            yield Comparison(
                title=f"peak anonymous memory, {str(dtype).removeprefix('torch.')}, {shape}, with weight and main_grad",
                variants=works,
                tolerance=tolerance,
                required={"fused": 1 / 0.35},
                measure=peak,
                unit="MB",
                unit_scale=1e-6,
            )
