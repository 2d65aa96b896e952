"""What each way of decoding costs and gives, on a set of prompts."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypedDict

from torch import Tensor

from nld_train.evaluation.decoding import DecodingMode, decode
from nld_train.evaluation.prompts import Prompt
from nld_train.evaluation.reader import CleanPrefix

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
ALL = "all"
"""The category that stands for all of them."""


@dataclass(frozen=True, slots=True)
class Way:
    """A mode and what else its method is given."""

    name: str
    mode: DecodingMode
    arguments: dict[str, Any] = field(default_factory=dict)


def standard_ways(block_length: int, thresholds: Sequence[float] = THRESHOLDS) -> list[Way]:
    """AR first, which the others are compared with; then diffusion by threshold and by steps, then speculation."""
    block = {"block_length": block_length}
    ways = [Way("ar", DecodingMode.ar)]
    ways += [Way(f"diffusion, threshold {t:g}", DecodingMode.diffusion, {**block, "threshold": t}) for t in thresholds]
    ways += [
        Way(
            f"diffusion, {steps} step{'s' if steps > 1 else ''}",
            DecodingMode.diffusion,
            {**block, "threshold": 1.0, "steps_per_block": steps},
        )
        for steps in sorted({max(1, block_length // share) for share in (2, 4, 8)}, reverse=True)
    ]
    return [*ways, Way("linear", DecodingMode.linear, block), Way("quadratic", DecodingMode.quadratic, block)]


@dataclass(frozen=True, slots=True)
class Output:
    """One prompt continued in one way.

    Args:
        num_forwards: evaluations of the decoder stack, counted from outside.
        accepted: tokens that each round settled; of the speculative modes a round's accepted drafts and the verifier's
            token (the first token, which the prompt gives, is no round), of diffusion those of a denoising forward.
        agreement: share of positions with AR's token.
        nats: AR cross-entropy of the output given the prompt, summed.
    """

    token_ids: list[int]
    num_forwards: int
    seconds: float
    accepted: list[int]
    agreement: float
    nats: float


class WayRow(TypedDict):
    """One way on one category: sums over its prompts, divided once. ``histogram``: rounds by the tokens they settle."""

    way: str
    mode: str
    category: str
    arguments: dict[str, Any]
    num_prompts: int
    num_tokens: int
    num_forwards: int
    tokens_per_forward: float
    tokens_per_second: float
    acceptance: float
    agreement: float
    equals_ar: float
    ar_nats_per_token: float
    histogram: dict[str, int]


@contextmanager
def count_forwards(model: Any) -> Iterator[list[int]]:
    """The calls of the decoder stack inside the context, as a list of one number."""
    count = [0]

    def add(*_: object) -> None:
        count[0] += 1

    handle = model.encoder.register_forward_hook(add)
    try:
        yield count
    finally:
        handle.remove()


def continue_with(model: Any, prompt_ids: Tensor, way: Way, ar_ids: Sequence[int] | None, **shared: Any) -> Output:
    """Continue one prompt int64 [P].

    Args:
        ar_ids: AR's output, to compare with; None: this is AR's.
        **shared: ``max_new_tokens``, ``eos_token_id`` and the like, for every way alike.
    """
    settled: list[int] = []
    mask_token_id = model.config.mask_token_id
    begin = time.perf_counter()
    with count_forwards(model) as count:
        output_ids, num_forwards = decode(
            model,
            prompt_ids[None],
            way.mode,
            on_update=lambda new_ids, _: settled.append(int((new_ids != mask_token_id).sum())),
            **{**shared, **way.arguments},
        )
    seconds = time.perf_counter() - begin
    if count[0] != num_forwards:
        raise AssertionError(f"{way.name} reports {num_forwards} forwards and made {count[0]}")
    new_ids = output_ids[0, len(prompt_ids) :]
    token_ids = new_ids.tolist()
    before = [0, *settled] if way.mode in (DecodingMode.ar, DecodingMode.diffusion) else settled
    # What stands behind an eos token is filling, not output.
    accepted = [b - a for a, b in pairwise(min(count, len(token_ids)) for count in before) if b > a]
    other = token_ids if ar_ids is None else ar_ids
    agreeing = sum(a == b for a, b in zip(token_ids, other, strict=False))
    log_p = CleanPrefix(model).read(output_ids[0])[len(prompt_ids) - 1 : -1]
    return Output(
        token_ids=token_ids,
        num_forwards=num_forwards,
        seconds=seconds,
        accepted=accepted,
        agreement=agreeing / max(len(token_ids), len(other)),
        nats=-log_p.gather(1, new_ids[:, None]).double().sum().item(),
    )


def measure_ways(
    model: Any,
    prompts: Sequence[Prompt],
    ways: Sequence[Way],
    *,
    max_new_tokens: int,
    eos_token_id: int | None = None,
    on_output: Callable[[str], None] = lambda way: None,
) -> list[WayRow]:
    """Continue every prompt in every way, greedily; rows by way and category, :data:`ALL` first.

    Args:
        ways: AR must be the first.
        on_output: told the way's name after each continuation.
    """
    if ways[0].mode is not DecodingMode.ar:
        raise ValueError(f"ways: the first is {ways[0].name!r}; AR must come first, the others are compared with it")
    # Kernels choose their plans on first use, which is nobody's decoding time.
    decode(model, prompts[0].token_ids[None].to(model.device), DecodingMode.ar, max_new_tokens=2)
    outputs: dict[str, list[Output]] = {way.name: [] for way in ways}
    for prompt in prompts:
        prompt_ids = prompt.token_ids.to(model.device)
        ar_ids: list[int] | None = None
        for way in ways:
            output = continue_with(
                model, prompt_ids, way, ar_ids, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id
            )
            ar_ids = output.token_ids if ar_ids is None else ar_ids
            outputs[way.name].append(output)
            on_output(way.name)
    categories = list(dict.fromkeys(prompt.category for prompt in prompts))
    return [
        _row(
            way, category, [o for o, p in zip(outputs[way.name], prompts, strict=True) if category in (ALL, p.category)]
        )
        for category in [ALL, *categories]
        for way in ways
    ]


def _row(way: Way, category: str, outputs: Sequence[Output]) -> WayRow:
    num_tokens = sum(len(output.token_ids) for output in outputs)
    num_forwards = sum(output.num_forwards for output in outputs)
    accepted = [count for output in outputs for count in output.accepted]
    return WayRow(
        way=way.name,
        mode=way.mode.value,
        category=category,
        arguments=way.arguments,
        num_prompts=len(outputs),
        num_tokens=num_tokens,
        num_forwards=num_forwards,
        tokens_per_forward=num_tokens / num_forwards,
        tokens_per_second=num_tokens / sum(output.seconds for output in outputs),
        acceptance=sum(accepted) / max(1, len(accepted)),
        agreement=sum(output.agreement for output in outputs) / len(outputs),
        equals_ar=sum(output.agreement == 1.0 for output in outputs) / len(outputs),
        ar_nats_per_token=sum(output.nats for output in outputs) / num_tokens,
        histogram={str(length): count for length, count in sorted(Counter(accepted).items())},
    )
