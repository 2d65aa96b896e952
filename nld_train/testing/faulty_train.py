"""``train.py`` with a fault put into it: ``python -m nld_train.testing.faulty_train FAULT STEP SAMPLE key=value ...``

FAULT ``embedding``: in step STEP the embedding of a token of sample SAMPLE (place in the stream) is NaN. ``stopped``:
the same, and a signal asks the run to stop in that step. ``always``:
from step STEP on that of some sample is. ``gradient``: in step STEP gradients are infinite and every loss is finite.
``skip``: the update of step STEP is left out, and nothing else is wrong. ``lost``: in step STEP a weight becomes NaN.
"""

import os
import signal
import sys
from typing import Any

import torch

from nld_train.config.compose import main
from nld_train.config.schema import Config


def put_in(fault: str, fault_step: int, sample: int) -> None:
    import nld_train.training.optimizer as optimizer_module
    import nld_train.training.step as step_module
    import nld_train.training.trainer as trainer_module

    step_of_now = [0]
    take_step, model_step, update = (
        trainer_module.Trainer._step,
        step_module.forward_step,
        trainer_module.step_with_norm,
    )

    def counted_step(self: Any, stage: Any, step: int, *more: Any) -> Any:
        step_of_now[0] = step
        return take_step(self, stage, step, *more)

    def faulty_model_step(data: Any, model: Any, *, normalization: str) -> Any:
        batch = next(data)
        is_due = step_of_now[0] == fault_step and sample in batch[2].tolist()
        if (
            hasattr(model.module, "embedding")
            and torch.is_grad_enabled()
            and (is_due or (fault == "always" and step_of_now[0] >= fault_step))
        ):
            row = batch[2].tolist().index(sample) if is_due else 0
            if fault == "stopped":
                os.kill(os.getpid(), signal.SIGUSR1)

            def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
                output = output.clone()  # [S, B, H]
                output[-5, row] = float("nan")
                return output

            with model.module.embedding.register_forward_hook(spoil):
                return model_step(iter([batch]), model, normalization=normalization)
        return model_step(iter([batch]), model, normalization=normalization)

    def lost_step(self: Any, stage: Any, step: int, *more: Any) -> Any:
        if step == fault_step:
            next(self.chunks[0].parameters()).data.fill_(float("nan"))
        return take_step(self, stage, step, *more)

    def no_update(optimizer: Any, optim: Any) -> float:
        if step_of_now[0] == fault_step:
            return optimizer_module.gradient_norm(optimizer)
        return update(optimizer, optim)

    def infinite_gradient(optimizer: Any, optim: Any) -> float:
        if step_of_now[0] == fault_step:
            optimizer_module.gradient_norm(optimizer)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.main_grad = parameter.grad
                    parameter.grad.view(-1)[:1] = float("inf")
            prepare, optimizer.prepare_grads = optimizer.prepare_grads, lambda: False
            try:
                return update(optimizer, optim)
            finally:
                optimizer.prepare_grads = prepare
        return update(optimizer, optim)

    trainer_module.Trainer._step = lost_step if fault == "lost" else counted_step  # type: ignore[method-assign, assignment]
    if fault in ("embedding", "always", "stopped"):
        step_module.forward_step = faulty_model_step  # type: ignore[assignment]
    elif fault == "skip":
        trainer_module.step_with_norm = no_update
    elif fault == "gradient":
        trainer_module.step_with_norm = infinite_gradient
    elif fault != "lost":
        raise ValueError(fault)


def run_training(config: Config) -> int:
    from nld_train.training.run import run

    put_in(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    return run(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[4:], run_training))
