"""A micro-batch as it reaches the model, written out for people: documents, blocks, masks, weights, rows.

B sequences, L clean tokens, N noisy rows, S = N + L rows of the model's input.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.text import Text
from tokenizers import Tokenizer

from nld_train.config.schema import Config
from nld_train.data.blend import BlendStream
from nld_train.data.loader import LoaderBatch, TrainLoader
from nld_train.errors import ConfigError, Problem
from nld_train.objective.normalize import num_tokens, row_weights
from nld_train.objective.sequence import JointBatch
from nld_train.training.data import open_data, prepare_blends, prepare_chats
from nld_train.training.stages import Stage, plan_stages, stage_of_step
from nld_train.training.step import lay_out, noise_spec

# Marks that say the same as the colours, where there are none.
_MASKED, _UNSUPERVISED = ("⟦", "⟧"), ("‹", "›")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which micro-batch.

    Args:
        step: counted from 1, over the run or, with ``stage``, from the stage's first.
        stage: name; None: the stage of the run's ``step``.
        rank: data-parallel rank.
        data_parallel_size: ranks that share a global batch.
        micro_batch: number in the step, from 0.
    """

    step: int = 1
    stage: str | None = None
    rank: int = 0
    data_parallel_size: int = 1
    micro_batch: int = 0


def inspect_batch(config: Config, place: Place, *, num_sequences: int, num_blocks: int) -> Iterator[Text]:
    """Lines about one micro-batch: the same samples, noise and rows that a run of ``config`` has there.

    Args:
        num_sequences: shown in full, from the first.
        num_blocks: noisy blocks and lines of the row table shown of each.

    Raises:
        ConfigError: there is no such step, stage, rank or micro-batch.
        DataError: as a run would.
    """
    stage, step = _find_step(config, place)
    blends = prepare_blends(config, is_main=False)
    chats = prepare_chats(config, blends.tokenizer_folder, is_main=False)
    sources, _, _ = open_data(config, blends, chats, plan_stages(config))
    objective = config.objective
    noise = noise_spec(objective, seed=config.run.seed, global_batch_size=stage.global_batch_size)
    source = sources[stage.name]
    loader = TrainLoader(
        source,
        micro_batch_size=config.train.micro_batch_size,
        global_batch_size=stage.global_batch_size,
        data_parallel_rank=place.rank,
        data_parallel_size=place.data_parallel_size,
        consumed_samples=stage.consumed_samples(step),
        num_steps=1,
        noise=noise if stage.is_joint else None,
    )
    if not 0 <= place.micro_batch < loader.num_micro_batches:
        raise _no_such("--micro-batch", place.micro_batch, f"a step has 0..{loader.num_micro_batches - 1} on each rank")
    sample = list(loader)[place.micro_batch]
    batch = lay_out(sample, objective.block_size)
    normalization = objective.normalization.value
    weights = row_weights(batch, normalization, stage.config.diffusion_loss_weight, stage.config.ar_loss_weight)
    tokenizer = Tokenizer.from_file(str(blends.tokenizer_folder / "tokenizer.json"))

    layout = batch.layout
    yield Text(
        f"stage {stage.name}, step {step} of the run ({stage.step_in_stage(step)} of {stage.num_steps}), rank "
        f"{place.rank} of {place.data_parallel_size}, micro-batch {place.micro_batch} of {loader.num_micro_batches}",
        style="bold",
    )
    yield Text(
        f"{len(sample.tokens)} sequences of {layout.clean_length} clean tokens and {layout.num_noisy_rows} noisy rows: "
        f"{layout.num_rows} rows, {'with a row table' if layout.table is not None else 'plain layout'}; blocks of "
        f"{layout.block_size}; {int((weights != 0).sum())} rows with weight, divisor "
        f"{num_tokens(batch, normalization).item():g}"
    )
    yield (
        Text("masked", style="bold red")
        .append(f" {_MASKED[0]}{_MASKED[1]}, ")
        .append("not supervised", "dim")
        .append(f" {_UNSUPERVISED[0]}{_UNSUPERVISED[1]}, ¶ a document begins")
    )
    part_names = [entry.name for entry in blends.of_stages[stage.name].entries] if stage.name not in chats else []
    for number in range(min(num_sequences, len(sample.tokens))):
        yield Text("")
        index = int(sample.stream_positions[number]) - stage.first_position
        origin = f"sample {index}"
        if isinstance(source, BlendStream) and len(part_names) > 1:
            part, own = source.locate(index)
            origin += f", sample {own} of {part_names[part]}"
        yield from _sequence(sample, batch, weights, tokenizer, number, origin, num_blocks)


def _find_step(config: Config, place: Place) -> tuple[Stage, int]:
    """The stage, and the step counted over the run."""
    stages = plan_stages(config)
    if not 0 <= place.rank < place.data_parallel_size:
        raise _no_such("--rank", place.rank, f"there are ranks 0..{place.data_parallel_size - 1} (--ranks)")
    if place.stage is None:
        if not 1 <= place.step <= stages[-1].last_step:
            raise _no_such("--step", place.step, f"the run has steps 1..{stages[-1].last_step}")
        return stage_of_step(stages, place.step), place.step
    for stage in stages:
        if stage.name == place.stage:
            if not 1 <= place.step <= stage.num_steps:
                raise _no_such("--step", place.step, f"stage {stage.name} has steps 1..{stage.num_steps}")
            return stage, stage.first_step + place.step - 1
    raise _no_such("--stage", place.stage, f"the run has {', '.join(stage.name for stage in stages)}")


def _no_such(option: str, value: object, available: str) -> ConfigError:
    return ConfigError([Problem(option, f"there is no {value}", available)])


def _sequence(
    sample: LoaderBatch,
    batch: JointBatch,
    weights: torch.Tensor,
    tokenizer: Tokenizer,
    number: int,
    origin: str,
    num_blocks: int,
) -> Iterator[Text]:
    tokens, is_supervised = sample.tokens[number], sample.is_supervised[number]
    length, num_noisy = batch.layout.clean_length, batch.layout.num_noisy_rows
    starts = torch.zeros_like(tokens) if sample.document_starts is None else sample.document_starts[number]
    firsts = sorted(set(starts.tolist()))
    yield Text(
        f"sequence {number}: {origin}, noise key {int(sample.stream_positions[number])}, {len(firsts)} document"
        f"{'s' if len(firsts) > 1 else ''} beginning at {', '.join(map(str, firsts))}; "
        f"{int(sample.loss_mask[number].sum())} supervised labels",
        style="bold",
    )
    names = [_shown(tokenizer, token) for token in tokens.tolist()]
    blocks: list[tuple[int, int]] = []  # rows of each noisy block
    if sample.corruption is not None:
        row_blocks = sample.corruption.blocks[number]
        for block in range(int(row_blocks.max()) + 1):
            rows = (row_blocks == block).nonzero().squeeze(1)
            blocks.append((int(rows[0]), int(rows[-1]) + 1))

    clean = Text("clean   ")
    for place in range(min(length, num_blocks * batch.layout.block_size)):
        if place in firsts:
            clean.append("¶", style="bold cyan")
        _append(clean, names[place], is_supervised=bool(is_supervised[place]), is_masked=False)
    yield clean.append(" …" if length > num_blocks * batch.layout.block_size else "")

    for block, (first, end) in enumerate(blocks[:num_blocks]):
        assert sample.corruption is not None
        places = sample.corruption.places[number, first:end].tolist()
        is_masked = (sample.corruption.weights[number, first:end] > 0).tolist()
        weight = max(sample.corruption.weights[number, first:end].tolist())
        line = Text(f"block {block}: tokens {places[0]}..{places[-1]}, {sum(is_masked)} masked, weight {weight:.3g}  ")
        for place, masked in zip(places, is_masked, strict=True):
            _append(line, names[place], is_supervised=bool(is_supervised[place]), is_masked=masked)
        yield line
    if len(blocks) > num_blocks:
        yield Text(f"… {len(blocks) - num_blocks} more noisy blocks", style="dim")

    yield Text("rows of the model's input: what they are, position ids, clean tokens seen, total weight in the loss")
    for row in _rows(batch, number, blocks[:num_blocks], firsts, weights[number]):
        yield Text(f"  {row}", style="dim")
    if sum(end - first for first, end in blocks) < num_noisy:
        yield Text(f"  {num_noisy - sum(end - first for first, end in blocks)} padding rows see themselves", "dim")


def _rows(
    batch: JointBatch, number: int, blocks: list[tuple[int, int]], firsts: list[int], weights: torch.Tensor
) -> Iterator[str]:
    """The noisy blocks' rows and each document's clean ones, from the layout that the attention reads."""
    layout = batch.layout
    length, num_noisy, size = layout.clean_length, layout.num_noisy_rows, layout.block_size
    positions = layout.position_ids()
    positions = positions[number] if layout.table is not None else positions
    for block, (first, end) in enumerate(blocks):
        if layout.table is not None:
            seen = (int(layout.table.first_keys[number, first]), int(layout.table.end_keys[number, first]))
        else:
            seen = (0, first // size * size)
        yield (
            f"{first}..{end - 1} noisy block {block}: positions {int(positions[first])}..{int(positions[end - 1])}, "
            f"sees {_range(*seen)} and its block, weight {weights[first:end].sum():.4g}"
        )
    for first, end in zip(firsts, [*firsts[1:], length], strict=True):
        row, last = num_noisy + first, num_noisy + end - 1
        yield (
            f"{row}..{last} clean tokens {first}..{end - 1}: positions {int(positions[row])}..{int(positions[last])}, "
            f"each sees from {first} to itself, weight {weights[row : last + 1].sum():.4g}"
        )


def _range(first: int, end: int) -> str:
    return f"clean {first}..{end - 1}" if end > first else "no clean token"


def _shown(tokenizer: Tokenizer, token: int) -> str:
    text = tokenizer.decode([token], skip_special_tokens=False)
    return text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


def _append(line: Text, name: str, *, is_supervised: bool, is_masked: bool) -> None:
    if is_masked:
        line.append(f"{_MASKED[0]}{name}{_MASKED[1]}", style="bold red")
    elif not is_supervised:
        line.append(f"{_UNSUPERVISED[0]}{name}{_UNSUPERVISED[1]}", style="dim")
    else:
        line.append(name)
