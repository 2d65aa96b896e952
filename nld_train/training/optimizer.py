"""AdamW under Megatron's distributed optimizer, with or without NVIDIA's fused kernels."""

import math
from collections.abc import Iterable
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import megatron.core.optimizer.distrib_optimizer as distrib_optimizer
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from nld_train.config.schema import OptimConfig


class FusedAdam(torch.optim.Optimizer):
    """torch's fused AdamW kernel behind the interface of NVIDIA's FusedAdam (CPU and CUDA).

    Megatron's checkpoint code expects that interface: the step count in the parameter group, ``exp_avg`` and
    ``exp_avg_sq`` as the only per-parameter state. torch's own AdamW keeps the step as a tensor per parameter, and
    Megatron then saves an optimizer state that it cannot load.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled (AdamW).
        adam_w_mode: must be True; L2-coupled decay is not offered.
        capturable: must be False; recording the step in a CUDA graph is not offered (megatron-core 0.19 passes it).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("capturable=True: the step cannot be recorded in a CUDA graph")
        if not adam_w_mode:
            raise ValueError("adam_w_mode=False: only decoupled weight decay (AdamW) is offered")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One AdamW step of every parameter with a gradient."""
        if closure is not None:
            raise ValueError("closure: not supported; Megatron computes gradients before the step")
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
            # One for all, filled on the device: the kernel only reads it, and a copy would make the host wait.
            step = torch.full((), float(group["step"]), device=parameters[0].device)
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                parameters,
                [parameter.grad for parameter in parameters],
                [self.state[parameter]["exp_avg"] for parameter in parameters],
                [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
                [],
                [step] * len(parameters),
                amsgrad=False,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                grad_scale=None,
                found_inf=None,
            )


def choose_adam() -> str:
    """Let Megatron use Transformer Engine's or Apex's FusedAdam where it found one, else ours. Returns the name."""
    module: Any = megatron_optimizer
    if module.USING_PYTORCH_OPTIMIZER:
        module.Adam = FusedAdam
        module.USING_PYTORCH_OPTIMIZER = False
        distributed: Any = distrib_optimizer
        distributed.Adam = FusedAdam
        distributed.HAVE_APEX_OR_TE = True
    return f"{module.Adam.__module__}.{module.Adam.__qualname__}"


def build_optimizer(
    optim: OptimConfig, model_chunks: list[DistributedDataParallel], dtype: torch.dtype
) -> MegatronOptimizer:
    """Megatron's distributed optimizer over AdamW; bf16 parameters get fp32 main parameters.

    :func:`set_hyperparameters` must be called before each step.
    """
    choose_adam()
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=0.0,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=model_chunks[0].ddp_config.overlap_param_gather,
        ),
        model_chunks,
    )


def set_hyperparameters(optimizer: MegatronOptimizer, optim: OptimConfig, lr: float) -> None:
    """Set what a step uses; called before each one, so that the configuration wins over a loaded checkpoint.

    Megatron marks the groups of norm weights with ``wd_mult`` 0 and leaves the multiplication to its own scheduler,
    which is not used here.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
        group["betas"] = (optim.beta1, optim.beta2)
        group["eps"] = optim.eps


def step_with_norm(optimizer: MegatronOptimizer, optim: OptimConfig) -> float:
    """One optimizer step; returns the global gradient norm before clipping. Collective.

    Where the norm is not finite nothing is updated, on any rank: weights, moments and the count of steps stay as they
    were. What Megatron's own ``step`` does, which would clip by that norm and go on.
    """
    norm = gradient_norm(optimizer)
    if not math.isfinite(norm):
        return norm
    if optim.clip_grad > 0:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        clip_grad_by_total_norm_fp32(parameters, optim.clip_grad, norm)
    optimizer.step_with_ready_grads()
    return norm


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Global norm of the gradients at hand, without a step. Collective."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def reset_moments(optimizer: MegatronOptimizer) -> None:
    """Start the moments and the bias correction from zero (``reset_optimizer`` of a stage)."""
    inner: Any = optimizer
    for part in getattr(inner, "chained_optimizers", [inner]):
        for group in part.optimizer.param_groups:
            group.pop("step", None)
        for state in part.optimizer.state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
