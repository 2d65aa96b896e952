"""Which parallel layouts work, and the nearest one that does."""

import math
from collections.abc import Iterable
from itertools import product

from nld_train.config.rules import at_least, divisors, multiple_of, nearest
from nld_train.config.schema import FP8_MULTIPLE, Config, DocumentMask, Precision
from nld_train.errors import Problem


def layout_problems(config: Config, world_size: int) -> list[Problem]:
    """What keeps ``config.parallel`` from being the layout of ``world_size`` ranks; files are not looked at."""
    return [*parallel_problems(config, world_size), *launch_problems(config, world_size)]


def parallel_problems(config: Config, world_size: int | None) -> Iterable[Problem]:
    """Sizes that the model or its sequences cannot be cut by. ``world_size``: see :func:`~.validate.validate`."""
    yield from at_least(config, 1, *(f"parallel.{name}_parallel_size" for name in _GROUPS))
    tensor, _, context = _sizes(config)
    working_tensor, working_pipeline, working_context = _working_sizes(config, world_size)
    is_alone = config.parallel.sequence_parallel and working_tensor == 1
    if tensor >= 1 and (left_over := [f"{key}={size}" for key, size in _split_by_tensor(config) if size % tensor]):
        yield Problem(
            "parallel.tensor_model_parallel_size",
            f"{tensor} does not divide {', '.join(left_over)}",
            f"use parallel.tensor_model_parallel_size={working_tensor} "
            f"{'parallel.sequence_parallel=false ' if is_alone else ''}"
            f"(what works for this model: {_listing(_tensor_sizes(config))})",
        )
    yield from _sequence_parallel(config)
    yield from _fp8(config)
    yield from _pipeline(config, working_pipeline)
    if config.parallel.overlap_param_gather and config.parallel.overlap_grad_reduce is False:
        yield Problem(
            "parallel.overlap_param_gather",
            "True, but parallel.overlap_grad_reduce=false: Megatron overlaps both, gradients alone, or neither",
            "use parallel.overlap_param_gather=false",
        )
    uncut = [
        f"{key}={length}{f' of blocks of {unit}' if unit > 1 else ''}"
        for key, length, unit in _cut_by_context(config)
        if context > 1 and length % (2 * context * unit)
    ]
    if uncut:
        yield Problem(
            "parallel.context_parallel_size",
            f"{' and '.join(uncut)} cannot be cut into 2 x {context} equal chunks",
            f"use parallel.context_parallel_size={working_context} "
            f"(what works here: {_listing(_context_sizes(config))}), or another sequence length",
        )


_GROUPS = ("tensor_model", "pipeline_model", "context")


def _sequence_parallel(config: Config) -> Iterable[Problem]:
    tensor = config.parallel.tensor_model_parallel_size
    if not config.parallel.sequence_parallel or tensor < 1:
        return
    if tensor == 1:
        larger = next((size for size in _tensor_sizes(config) if size > 1), None)
        yield Problem(
            "parallel.sequence_parallel",
            "True shares rows among tensor-parallel ranks, and parallel.tensor_model_parallel_size=1",
            "use parallel.sequence_parallel=false"
            + (f", or parallel.tensor_model_parallel_size={larger}" if larger is not None else ""),
        )
        return
    has_whole_blocks = config.data.document_mask is DocumentMask.none and config.objective.block_size >= 1
    ranks = tensor * max(1, config.parallel.context_parallel_size)
    unit = math.lcm(ranks, config.objective.block_size) if has_whole_blocks else ranks
    for key, length in sequence_lengths(config).items():
        if length >= 1 and length % ranks:
            by_context = f" x parallel.context_parallel_size={ranks // tensor}" if ranks > tensor else ""
            yield Problem(
                key,
                f"{length} rows cannot be shared out to parallel.tensor_model_parallel_size={tensor}{by_context} ranks "
                "(parallel.sequence_parallel=true)",
                f"use {key}={multiple_of(length, unit)}, or parallel.sequence_parallel=false",
            )


def _fp8(config: Config) -> Iterable[Problem]:
    """Whether each side of each rank's matrices is a multiple of what FP8 products take; noisy rows and those of the
    last layer are padded."""
    parallel, model = config.parallel, config.model
    tensor, context = max(1, parallel.tensor_model_parallel_size), max(1, parallel.context_parallel_size)
    if config.train.precision is not Precision.fp8:
        return
    shares = context * (tensor if parallel.sequence_parallel else 1)
    rows = [(key, length, FP8_MULTIPLE * shares) for key, length in sequence_lengths(config).items()]
    widths = [("model.hidden_size", model.hidden_size, FP8_MULTIPLE)]
    widths += [("model.ffn_hidden_size", model.ffn_hidden_size, FP8_MULTIPLE * tensor)]
    for key, size, unit in (*rows, *widths):
        if size >= 1 and size % unit:
            ranks = f" ({unit // FP8_MULTIPLE} ranks share it)" if unit > FP8_MULTIPLE else ""
            yield Problem(
                key,
                f"{size} is no multiple of {unit}, as train.precision=fp8 needs{ranks}",
                f"use {key}={multiple_of(size, unit)}, or train.precision=bf16",
            )
    heads = (("queries", model.num_attention_heads), ("queries, keys and values", _num_heads(config)))
    for what, count in heads:
        width = count * model.head_dim // tensor
        if count >= 1 and model.head_dim >= 1 and width % FP8_MULTIPLE:
            yield Problem(
                "model.head_dim",
                f"{model.head_dim}: a tensor-parallel rank's {what} are {width} wide, no multiple of {FP8_MULTIPLE}, "
                "as train.precision=fp8 needs",
                f"use model.head_dim={multiple_of(model.head_dim, FP8_MULTIPLE)}, or train.precision=bf16",
            )
            return


def _num_heads(config: Config) -> int:
    return config.model.num_attention_heads + 2 * config.model.num_key_value_heads


def _pipeline(config: Config, working_size: int) -> Iterable[Problem]:
    """Layers over pipeline ranks and their chunks. ``working_size``: the nearest number of ranks that works."""
    parallel, num_layers = config.parallel, config.model.num_layers
    pipeline, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    uneven = _ends(config)
    if pipeline < 1 or num_layers < 1:
        return
    if virtual is not None and (virtual < 2 or pipeline == 1):
        sizes = _pipeline_sizes(config) if virtual > 1 else []
        other = f", or parallel.pipeline_model_parallel_size={sizes[0]}" if sizes else ""
        yield Problem(
            "parallel.virtual_pipeline_model_parallel_size",
            f"{virtual} is too small: a pipeline rank has one chunk without it"
            if virtual < 2
            else f"{virtual}, but parallel.pipeline_model_parallel_size=1: there are no stages to interleave",
            f"use parallel.virtual_pipeline_model_parallel_size=null{other}",
        )
        return
    if uneven and pipeline == 1:
        for key, size in uneven.items():
            yield Problem(
                key, f"{size}, but parallel.pipeline_model_parallel_size=1: one rank has all layers", f"use {key}=null"
            )
        return
    if _layers_fit(config, pipeline, uneven.values()):
        return
    chunks = f" x {virtual} virtual stages" if virtual is not None else ""
    if not uneven and virtual is not None and num_layers % pipeline == 0:
        fitting = [size for size in divisors(num_layers // pipeline) if size > 1]
        yield Problem(
            "parallel.virtual_pipeline_model_parallel_size",
            f"{virtual} does not divide the {num_layers // pipeline} layers of a pipeline rank "
            f"(model.num_layers={num_layers}, parallel.pipeline_model_parallel_size={pipeline})",
            f"use parallel.virtual_pipeline_model_parallel_size={nearest(virtual, fitting) if fitting else 'null'}",
        )
        return
    if not uneven and virtual is not None and not _pipeline_sizes(config):
        without = nearest(pipeline, divisors(num_layers))
        yield Problem(
            "parallel.virtual_pipeline_model_parallel_size",
            f"{virtual}: no pipeline of model.num_layers={num_layers} has ranks with so many chunks each",
            "use parallel.virtual_pipeline_model_parallel_size=null"
            + (f" parallel.pipeline_model_parallel_size={without}" if without != pipeline else ""),
        )
        return
    if not uneven:
        yield Problem(
            "parallel.pipeline_model_parallel_size",
            f"{pipeline}{chunks} does not divide model.num_layers={num_layers}",
            f"use parallel.pipeline_model_parallel_size={working_size} "
            f"(what works with as many layers in each stage: {_listing(_pipeline_sizes(config))}), or give the first "
            "and the last stage other numbers of layers (parallel.num_layers_in_first_pipeline_stage, ..._last_...)",
        )
        return
    yield Problem(
        next(iter(uneven)),
        f"{', '.join(f'{key}={size}' for key, size in uneven.items())}: the rest of model.num_layers={num_layers} does "
        f"not make {pipeline} pipeline ranks{chunks} of as many layers each",
        _uneven_remedy(config, uneven),
    )


def _ends(config: Config) -> dict[str, int]:
    """The configured numbers of layers of the first and of the last pipeline rank, by key."""
    parallel = config.parallel
    sizes = {
        "parallel.num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_pipeline_stage,
        "parallel.num_layers_in_last_pipeline_stage": parallel.num_layers_in_last_pipeline_stage,
    }
    return {key: size for key, size in sizes.items() if size is not None}


def _layers_fit(config: Config, pipeline: int, ends: Iterable[int]) -> bool:
    """The layers fall into ``pipeline`` ranks, each of whole chunks with at least one layer, the others alike."""
    virtual = config.parallel.virtual_pipeline_model_parallel_size or 1
    if pipeline == 1:
        return virtual == 1
    sizes = list(ends)
    left, num_between = config.model.num_layers - sum(sizes), pipeline - len(sizes)
    if virtual < 1 or any(size < 1 or size % virtual for size in sizes):
        return False
    return left == 0 if num_between == 0 else left > 0 and left % (num_between * virtual) == 0


def _uneven_remedy(config: Config, uneven: dict[str, int]) -> str:
    """The nearest number of layers for one of the uneven stages that leaves the rest even."""
    fitting = [
        (abs(candidate - size), f"use {key}={candidate}")
        for key, size in uneven.items()
        for candidate in range(1, min(config.model.num_layers, 1000))
        if _layers_fit(config, config.parallel.pipeline_model_parallel_size, (uneven | {key: candidate}).values())
    ]
    return min(fitting)[1] if fitting else f"use {' '.join(f'{key}=null' for key in uneven)}"


def _pipeline_sizes(config: Config) -> list[int]:
    """What works for the layers and chunks of this configuration."""
    ends = _ends(config).values()
    return [
        size for size in range(1, min(max(1, config.model.num_layers), 1000) + 1) if _layers_fit(config, size, ends)
    ]


def _sizes(config: Config) -> tuple[int, int, int]:
    parallel = config.parallel
    return (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )


def _split_by_tensor(config: Config) -> list[tuple[str, int]]:
    """What Megatron cuts into equal parts, one for each tensor-parallel rank."""
    model = config.model
    sizes = [
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.num_key_value_heads", model.num_key_value_heads),
        ("model.ffn_hidden_size", model.ffn_hidden_size),
        ("model.vocab_size", model.vocab_size),
    ]
    return [(key, size) for key, size in sizes if size >= 1]


def _tensor_sizes(config: Config) -> list[int]:
    return divisors(math.gcd(*(size for _, size in _split_by_tensor(config))) or 1)


def _working_sizes(config: Config, world_size: int | None) -> tuple[int, int, int]:
    """The nearest tensor, pipeline and context sizes that work for this model. If one of those asked for does not, and
    ``world_size`` ranks (None: not known) are enough for them, sizes that share these out, too; others stay."""
    asked = _sizes(config)
    possible = (_tensor_sizes(config), _pipeline_sizes(config) or [1], _context_sizes(config))
    tensor, pipeline, context = (nearest(size, sizes) for size, sizes in zip(asked, possible, strict=True))
    alone = tensor, pipeline, context
    if world_size is not None and alone != asked and world_size >= math.prod(asked) and world_size % math.prod(alone):
        kept = [[size] if size in sizes else sizes for size, sizes in zip(asked, possible, strict=True)]
        fitting = [sizes for sizes in product(kept[0], kept[1], kept[2]) if world_size % math.prod(sizes) == 0]
        if fitting:
            return min(fitting, key=lambda sizes: (sum(abs(x - y) for x, y in zip(sizes, asked, strict=True)), sizes))
    return alone


def _cut_by_context(config: Config) -> list[tuple[str, int, int]]:
    """Sequence lengths that are cut into chunks for context-parallel ranks, and what a chunk must be a multiple of."""
    # Where there are documents, as in conversations, a block may go on beyond the chunk that it begins in.
    block_size = config.objective.block_size if config.data.document_mask is DocumentMask.none else 1
    units = {"data.sequence_length": block_size}
    lengths = [(key, length, units.get(key, 1)) for key, length in sequence_lengths(config).items()]
    return [item for item in lengths if min(item[1:]) >= 1]


def sequence_lengths(config: Config) -> dict[str, int]:
    """The run's sequence length and those that stages have of their own, by key."""
    of_stages = {
        f"stages.{name}.sequence_length": stage.sequence_length
        for name, stage in config.stages.items()
        if stage.sequence_length is not None
    }
    return {"data.sequence_length": config.data.sequence_length, **of_stages}


def _context_sizes(config: Config) -> list[int]:
    halves = [length // (2 * unit) for _, length, unit in _cut_by_context(config) if length % (2 * unit) == 0]
    return divisors(math.gcd(*halves)) if halves and len(halves) == len(_cut_by_context(config)) else [1]


def _listing(values: list[int]) -> str:
    shown = ", ".join(map(str, values[:8]))
    return shown if len(values) <= 8 else f"{shown}, ..."


def launch_problems(config: Config, world_size: int) -> Iterable[Problem]:
    """Sizes and batches that ``world_size`` ranks cannot share."""
    tensor, pipeline, context = _sizes(config)
    model_parallel = tensor * pipeline * context
    if min(tensor, pipeline, context) >= 1 and world_size % model_parallel == 0:
        yield from batch_problems(config, world_size // model_parallel)
        return
    # A size that was refused above must not end in a launch line that would be refused again: count with the
    # values that the other remedies propose.
    ranks = math.prod(_working_sizes(config, world_size))
    if min(tensor, pipeline, context) >= 1 and world_size % ranks:
        key = max(
            ("parallel.tensor_model_parallel_size", tensor),
            ("parallel.pipeline_model_parallel_size", pipeline),
            ("parallel.context_parallel_size", context),
            key=lambda item: item[1],
        )[0]
        yield Problem(
            key,
            f"tensor {tensor} x pipeline {pipeline} x context {context} = {model_parallel} does not divide "
            f"the {world_size} {'rank that is' if world_size == 1 else 'ranks that are'} launched",
            f"start `torchrun --nproc-per-node {ranks} train.py ...`"
            if ranks > 1
            else "use " + " ".join(f"parallel.{name}_parallel_size=1" for name in _GROUPS),
        )
    yield from batch_problems(config, data_parallel_size=max(1, world_size // ranks))


def batch_problems(config: Config, data_parallel_size: int) -> Iterable[Problem]:
    """Batches that do not make whole micro-batches, or too few of them for the pipeline."""
    yield from _validation_batch(config, data_parallel_size)
    totals = {"train.global_batch_size": config.train.global_batch_size}
    for name, stage in config.stages.items():
        if stage.global_batch_size is not None:
            totals[f"stages.{name}.global_batch_size"] = stage.global_batch_size
    for key, total in totals.items():
        yield from _batch_of(config.train.micro_batch_size, key, total, data_parallel_size)
        yield from _rounds(config, key, total, data_parallel_size)


def _rounds(config: Config, key: str, total: int, data_parallel_size: int) -> Iterable[Problem]:
    """Enough micro-batches for every pipeline stage; with interleaved stages whole rounds of them."""
    pipeline, micro = config.parallel.pipeline_model_parallel_size, config.train.micro_batch_size
    is_interleaved = config.parallel.virtual_pipeline_model_parallel_size is not None
    per_round = micro * data_parallel_size
    if pipeline < 2 or per_round < 1 or total < 1 or total % per_round:
        return
    count = total // per_round
    if count >= pipeline and not (is_interleaved and count % pipeline):
        return
    why = f"fewer than parallel.pipeline_model_parallel_size={pipeline}"
    if count >= pipeline:
        why = f"no multiple of parallel.pipeline_model_parallel_size={pipeline}, as interleaved stages need"
    smaller = [
        size
        for size in divisors(total // data_parallel_size)
        if size < micro and total // data_parallel_size // size % pipeline == 0
    ]
    remedy = f"use {key}={multiple_of(total, per_round * pipeline)}"
    if smaller:
        remedy += f", or train.micro_batch_size={smaller[-1]}"
    yield Problem(
        key,
        f"{total} is {count} micro-batch{'es' if count > 1 else ''} of train.micro_batch_size={micro} on each of "
        f"{data_parallel_size} data-parallel rank{'s' if data_parallel_size > 1 else ''}: {why}",
        remedy,
    )


def _batch_of(micro: int, key: str, total: int, data_parallel_size: int) -> Iterable[Problem]:
    if micro < 1 or total < 1 or total % (micro * data_parallel_size) == 0:
        return
    ranks = f" x {data_parallel_size} data-parallel ranks" if data_parallel_size > 1 else ""
    remedy = f"use {key}={multiple_of(total, micro * data_parallel_size)}"
    if total % data_parallel_size == 0:
        remedy = f"use train.micro_batch_size={nearest(micro, divisors(total // data_parallel_size))}, or {remedy[4:]}"
    yield Problem(
        "train.micro_batch_size",
        f"{micro}{ranks} {'do' if ranks else 'does'} not divide {key}={total}",
        remedy,
    )


def _validation_batch(config: Config, data_parallel_size: int) -> Iterable[Problem]:
    sizes = {"train.validation_samples": config.train.validation_samples}
    sizes |= {
        f"stages.{name}.chat_validation_samples": stage.chat_validation_samples for name, stage in config.stages.items()
    }
    # Interleaved pipeline stages work in rounds of as many micro-batches.
    parallel = config.parallel
    rounds = parallel.pipeline_model_parallel_size if parallel.virtual_pipeline_model_parallel_size is not None else 1
    unit = data_parallel_size * max(1, rounds)
    for key, samples in sizes.items():
        if samples >= 1 and samples % unit:
            stages = f" in rounds of {rounds} interleaved pipeline stages" if rounds > 1 else ""
            yield Problem(
                key,
                f"{samples} cannot be shared out to {data_parallel_size} data-parallel ranks{stages}",
                f"use {key}={multiple_of(samples, unit)}",
            )
