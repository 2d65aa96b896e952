"""What a run reads: corpora and conversations prepared and opened, and their indices ahead of time."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nld_train.config.blends import blend_parts, same_data
from nld_train.config.schema import Config, DocumentMask, StageConfig
from nld_train.data.blend import (
    Blend,
    BlendStream,
    check_readable_together,
    prepare_blend,
    train_stream,
    validation_samples,
)
from nld_train.data.chat import ChatStream, ChatValidation, PreparedChat, chat_path, prepare_chat
from nld_train.data.dataset import SizedSource, TrainStream
from nld_train.data.progress import PrepareProgress, RichProgress
from nld_train.training.stages import Stage, plan_stages


@dataclass(frozen=True, slots=True, kw_only=True)
class RunBlends:
    """``of_run``: what is validated on, and what stages without a blend of their own read. ``of_stages``: by the name
    of each stage that reads corpora; stages with equal blends share one."""

    of_run: Blend
    of_stages: Mapping[str, Blend]

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer's, which all corpora share."""
        return self.of_run.tokenizer_folder


def prepare_blends(config: Config, *, is_main: bool) -> RunBlends:
    """Find or build every corpus: one process builds, the others wait for its file lock.

    Args:
        is_main: show progress.

    Raises:
        DataError: as :func:`~nld_train.data.blend.prepare_blend`; two corpora of the run with different tokenizers.
    """
    of_run = same_data(config.data, StageConfig())
    found: dict[object, Blend] = {}

    def prepared(key: str, stage: StageConfig | None, progress: PrepareProgress) -> Blend:
        return prepare_blend(
            key,
            blend_parts(config.data, stage),
            config.data,
            config.model.vocab_size,
            mask_token_id=config.objective.mask_token_id,
            progress=progress,
        )

    with _progress(is_main) as progress:
        found[of_run] = prepared("data.blend" if config.data.blend else "data", None, progress)
        of_stages = {}
        for name, stage in config.stages.items():
            if stage.chat is not None:
                continue
            data = same_data(config.data, stage)
            if data not in found:
                found[data] = prepared(f"stages.{name}.blend", stage, progress)
            of_stages[name] = found[data]
    check_readable_together([corpus for blend in found.values() for corpus in blend.corpora])
    return RunBlends(of_run=found[of_run], of_stages=of_stages)


def prepare_chats(config: Config, tokenizer_folder: Path, *, is_main: bool) -> dict[str, PreparedChat]:
    """The conversations of each stage that has its own, tokenised with the corpora's tokenizer."""
    found: dict[str, PreparedChat] = {}
    for name, stage in config.stages.items():
        if stage.chat is None:
            continue
        with _progress(is_main) as progress:
            found[name] = prepare_chat(
                chat_path(stage.chat), tokenizer_folder, Path(config.data.cache_dir), progress=progress
            )
        found[name].check_vocabulary(config.model.vocab_size)
    return found


@contextmanager
def _progress(is_main: bool) -> Iterator[PrepareProgress]:
    if not is_main:
        yield PrepareProgress()
        return
    with RichProgress() as progress:
        yield progress


def training_samples(
    config: Config, blend: Blend, *, seed: int | None = None, first_position: int = 0
) -> TrainStream | BlendStream:
    """The endless training samples of a blend.

    Args:
        seed: None: the run's.
        first_position: ``stream_position`` of sample 0.
    """
    return train_stream(
        blend,
        sequence_length=config.data.sequence_length,
        seed=config.run.seed if seed is None else seed,
        mask_token_id=config.objective.mask_token_id,
        cache_dir=Path(config.data.cache_dir),
        document_mask=config.data.document_mask is DocumentMask.boundary,
        first_position=first_position,
    )


def open_data(
    config: Config, blends: RunBlends, chats: Mapping[str, PreparedChat], stages: Sequence[Stage]
) -> tuple[dict[str, TrainStream | BlendStream | ChatStream], SizedSource, dict[str, ChatValidation]]:
    """Training samples of each stage, held-out samples of the run's blend, whatever a stage reads, and held-out
    conversations of stages with chat."""
    mask_token_id = config.objective.mask_token_id
    validation = validation_samples(
        blends.of_run,
        sequence_length=config.data.sequence_length,
        num_samples=config.train.validation_samples,
        mask_token_id=mask_token_id,
        document_mask=config.data.document_mask is DocumentMask.boundary,
    )
    streams: dict[int, TrainStream | BlendStream] = {}  # one for all stages that share their samples
    sources: dict[str, TrainStream | BlendStream | ChatStream] = {}
    validations: dict[str, ChatValidation] = {}
    for stage in stages:
        if stage.name not in chats:
            if stage.first_position not in streams:
                blend = blends.of_stages[stage.name]
                streams[stage.first_position] = training_samples(config, blend, first_position=stage.first_position)
            sources[stage.name] = streams[stage.first_position]
            continue
        chat, num_samples = chats[stage.name], stage.config.chat_validation_samples
        fraction = stage.config.chat_validation_fraction
        sources[stage.name] = ChatStream(
            chat,
            sequence_length=stage.sequence_length,
            seed=config.run.seed,
            mask_token_id=mask_token_id,
            first_position=stage.first_position,
            validation_fraction=fraction if num_samples else 0.0,
        )
        if num_samples:
            validations[stage.name] = ChatValidation(
                chat,
                sequence_length=stage.sequence_length,
                num_samples=num_samples,
                mask_token_id=mask_token_id,
                validation_fraction=fraction,
            )
    return sources, validation, validations


def build_indices(config: Config, progress: PrepareProgress) -> None:
    """Build every index on disk that a run will read, so that its processes only map them.

    An index is the order of one corpus in one epoch. Which corpus a sample of a blend is from needs none, and
    conversations are packed in memory.

    Raises:
        DataError: as a run would.
    """
    blends = prepare_blends(config, is_main=True)
    for stage in plan_stages(config):
        if stage.name not in blends.of_stages:
            continue
        first = stage.consumed_samples(stage.first_step)
        last = stage.consumed_samples(stage.last_step) + stage.global_batch_size
        training_samples(config, blends.of_stages[stage.name]).build_index(first, last)
        progress.message(f"stage {stage.name}: samples {first:,} to {last - 1:,} are indexed")
