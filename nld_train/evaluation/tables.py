"""Results of the suites as tables. No torch: a report reads them from files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nld_train.evaluation.likelihood import Likelihood, LikelihoodResult
    from nld_train.evaluation.modes import WayRow
    from nld_train.evaluation.speed_of_light import LimitRow


@dataclass(frozen=True, slots=True)
class Table:
    """``lines`` are as wide as ``header``; ``caption`` stands above."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    caption: str = ""

    def markdown(self) -> str:
        rows = [self.header, ["---"] * len(self.header), *self.lines]
        text = "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
        return f"{self.caption}\n\n{text}" if self.caption else text


def to_json(result: Any) -> Any:
    """A copy in which null stands for numbers that are not finite, which JSON does not have."""
    if isinstance(result, dict):
        return {key: to_json(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [to_json(value) for value in result]
    return None if isinstance(result, float) and not math.isfinite(result) else result


def from_json(result: Any) -> Any:
    """The suite's result that :func:`to_json` wrote, with nan for null: a result holds numbers, text and no None."""
    if isinstance(result, dict):
        return {key: from_json(value) for key, value in result.items()}
    if isinstance(result, list):
        return [from_json(value) for value in result]
    return math.nan if result is None else result


def tables_of(suite: str, result: Any) -> list[Table]:
    """The tables of a suite's result."""
    if suite == "likelihood":
        return _likelihood(result)
    if suite == "decoding":
        return [_decoding(result)]
    if suite == "speed_of_light":
        return [_limits(result)]
    lines = [
        [mode, task, metric, f"{value:.4f}" if isinstance(value, float) else str(value)]
        for mode, tasks in result.items()
        for task, metrics in tasks.items()
        for metric, value in metrics.items()
    ]
    return [Table(["mode", "task", "metric", "value"], lines)]


def _likelihood(result: "LikelihoodResult") -> list[Table]:
    def line(name: str, part: "Likelihood") -> list[str]:
        return [
            name,
            f"{part['nats_per_token']:.4f}",
            f"{part['error_over_texts']:.4f}",
            f"{part['error_of_estimate']:.4f}",
            f"{part['bits_per_token']:.4f}",
            f"{part['nats_per_byte']:.4f}",
            f"{part['bits_per_byte']:.4f}",
        ]

    lines = [line("AR", result["ar"])]
    lines += [line(f"bound, blocks of {part['block_size']}", part) for part in result["diffusion"]]
    header = ["", "nats/token", "± texts", "± masks", "bits/token", "nats/byte", "bits/byte"]
    buckets = [
        [
            f"blocks of {part['block_size']}",
            f"({bucket['low']:.1f}, {bucket['high']:.1f}]",
            f"{bucket['nats_per_masked_token']:.4f}",
            f"{bucket['num_masked']:,}",
        ]
        for part in result["diffusion"]
        for bucket in part["buckets"]
    ]
    caption = f"{result['num_tokens']:,} tokens, {result['num_bytes']:,} bytes of {result['num_sources']} documents"
    return [
        Table(header, lines, caption),
        Table(["", "masked share", "nats/masked token", "masked tokens"], buckets),
    ]


def _decoding(rows: "Sequence[WayRow]") -> Table:
    return Table(
        ["", "way", "tokens/forward", "acceptance", "agreement", "equal", "AR nats/token", "tokens/s"],
        [
            [
                f"{row['category']} ({row['num_prompts']})",
                row["way"],
                f"{row['tokens_per_forward']:.2f}",
                f"{row['acceptance']:.2f}",
                f"{row['agreement']:.0%}",
                f"{row['equals_ar']:.0%}",
                f"{row['ar_nats_per_token']:.3f}",
                f"{row['tokens_per_second']:.0f}",
            ]
            for row in rows
        ],
    )


def _limits(rows: "Sequence[LimitRow]") -> Table:
    return Table(
        ["block", "sampler", "tokens/step", "tokens/forward", "ends as target", "violations/block", "over budget"],
        [
            [
                str(row["block_length"]),
                row["sampler"],
                f"{row['acceptance']:.3f}",
                f"{row['tokens_per_forward']:.3f}",
                f"{row['target_share']:.0%}",
                f"{row['violations_per_block']:.2f}",
                f"{row['num_exhausted']} of {row['num_blocks']}",
            ]
            for row in rows
        ],
    )
