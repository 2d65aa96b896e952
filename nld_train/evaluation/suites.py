"""The suites of ``scripts/evaluate.py``: each measures one model, writes JSON and pictures, and returns a table."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nld_train.checkpoint.convert import export_checkpoint
from nld_train.checkpoint.manager import INFO_FILE
from nld_train.config.compose import load_resolved
from nld_train.data.prepared import VALIDATION, PreparedCorpus, open_prepared
from nld_train.errors import DataError
from nld_train.evaluation import plots
from nld_train.evaluation.decoding import load_export
from nld_train.evaluation.likelihood import LikelihoodResult, measure_likelihood, tokenize
from nld_train.evaluation.modes import THRESHOLDS, WayRow, measure_ways, standard_ways
from nld_train.evaluation.prompts import Prompt, load_prompts
from nld_train.evaluation.speed_of_light import LimitRow, measure_limits
from nld_train.evaluation.tables import tables_of, to_json
from nld_train.training.data import prepare_blends

SUITES = ("likelihood", "decoding", "speed_of_light", "harness")

HELD_OUT_TOKENS = 64
"""Of a held-out document: the prompt."""

OnStep = Callable[[str, int], None]
"""Called with what is being done and how many steps of it there are in all, after each step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the suites measure; see ``scripts/evaluate.py --help``.

    Args:
        texts, corpora: of the likelihood; neither: the held-out documents of the run that the model lies in.
        prompts: JSONL files; empty: those that ship.
        num_held_out: also continue so many held-out documents of each corpus, behind their first
            :data:`HELD_OUT_TOKENS` tokens; of ``corpora``, or else of the run that the model lies in.
        block_length: of decoding; None: the model's block size.
        tasks, task_folder: of the harness.
    """

    texts: Sequence[Path] = ()
    corpora: Sequence[Path] = ()
    num_texts: int = 20
    num_windows: int | None = 1
    max_length: int = 512
    block_sizes: Sequence[int] = (4, 8, 16, 32)
    num_sweeps: int = 2
    seed: int = 1234
    prompts: Sequence[Path] = ()
    num_prompts: int | None = None
    num_held_out: int = 0
    max_new_tokens: int = 64
    block_length: int | None = None
    thresholds: Sequence[float] = THRESHOLDS
    eos_token_id: int | None = None
    num_blocks: int = 2
    budget: int = 5000
    tasks: Sequence[str] = ()
    task_folder: Path | None = None
    modes: Sequence[str] = ("ar",)
    limit: int | None = None
    model_arguments: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def as_export(folder: Path, tokenizer: Path | None, notify: Callable[[str], None]) -> Iterator[Path]:
    """``folder``, or where it is a training checkpoint of any layout, an export of it for as long as the context lives.

    Raises:
        CheckpointError: it is neither.
    """
    if not (folder / INFO_FILE).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="nld-evaluate-") as temporary:
        yield export_checkpoint(folder, Path(temporary) / "hf", tokenizer=tokenizer, notify=notify)


def run_folder_of(folder: Path) -> Path | None:
    """The run that an export (RUN/hf) or a checkpoint (RUN/checkpoints/step_*) lies in."""
    return next((parent for parent in folder.resolve().parents[:2] if (parent / "config.yaml").is_file()), None)


def likelihood(
    model: Any, tokenizer: PreTrainedTokenizerBase, settings: Settings, run: Path | None, on_step: OnStep
) -> LikelihoodResult:
    """AR likelihood and diffusion bound of held-out text."""
    texts = tokenize(tokenizer, _documents(settings, run), settings.max_length, settings.num_windows)
    return measure_likelihood(
        model,
        texts,
        block_sizes=settings.block_sizes,
        num_sweeps=settings.num_sweeps,
        seed=settings.seed,
        on_text=lambda: on_step("likelihood", len(texts)),
    )


def decoding(
    model: Any, tokenizer: PreTrainedTokenizerBase, settings: Settings, run: Path | None, on_step: OnStep
) -> list[WayRow]:
    """Every way of decoding on the prompts."""
    prompts = _prompts(tokenizer, settings, run)
    ways = standard_ways(settings.block_length or model.config.block_size, settings.thresholds)
    return measure_ways(
        model,
        prompts,
        ways,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=settings.eos_token_id,
        on_output=lambda way: on_step("decoding", len(prompts) * len(ways)),
    )


def speed_of_light(
    model: Any, tokenizer: PreTrainedTokenizerBase, settings: Settings, run: Path | None, on_step: OnStep
) -> list[LimitRow]:
    """The limits of denoising on the prompts."""
    prompts = _prompts(tokenizer, settings, run)
    total = len(prompts) * settings.num_blocks * len(settings.block_sizes)
    return measure_limits(
        model,
        [prompt.token_ids for prompt in prompts],
        block_lengths=settings.block_sizes,
        num_blocks=settings.num_blocks,
        budget=settings.budget,
        on_block=lambda: on_step("speed of light", total),
    )


def harness(
    model: Any, tokenizer: PreTrainedTokenizerBase, settings: Settings, run: Path | None, on_step: OnStep
) -> dict[str, Any]:
    """lm-evaluation-harness tasks, for each of the modes: {mode: {task: {metric: value}}}."""
    from nld_train.evaluation.harness import run_tasks  # lm-eval is optional

    found = {}
    for mode in settings.modes:
        found[mode] = run_tasks(
            model,
            tokenizer,
            settings.tasks,
            mode=mode,
            task_folder=settings.task_folder,
            limit=settings.limit,
            **settings.model_arguments,
        )
        on_step("harness", len(settings.modes))
    return found


_SUITES: dict[str, Callable[..., Any]] = {
    "likelihood": likelihood,
    "decoding": decoding,
    "speed_of_light": speed_of_light,
    "harness": harness,
}


def evaluate(
    folder: Path,
    suites: Sequence[str],
    settings: Settings,
    out: Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    eos: str = "none",
    tokenizer_folder: Path | None = None,
    on_step: OnStep = lambda name, total: None,
    notify: Callable[[str], None] = print,
) -> Iterator[tuple[str, str]]:
    """Run suites one after the other; yields (suite, its table in Markdown) when its files are written.

    Args:
        folder: an exported folder or a training checkpoint.
        out: folder for ``<suite>.json`` and pictures.
        eos: ``none``, ``auto`` (the tokenizer's) or an id: where the suite of decoding stops.
        tokenizer_folder: for a training checkpoint; None: the one its run was trained with.
        on_step, notify: progress, and what the user should know.

    Raises:
        NLDError: the folder, a text or prompt cannot be used.
    """
    run = run_folder_of(folder)
    with as_export(folder, tokenizer_folder, notify) as export:
        model, tokenizer = load_export(export, device, dtype)
        if eos != "none":
            eos_token_id = tokenizer.eos_token_id if eos == "auto" else int(eos)
            if eos_token_id is None:
                raise DataError("--eos", "auto: this tokenizer has no end-of-sequence token", "give its id, or none")
            settings = replace(settings, eos_token_id=eos_token_id)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError("--out", f"{out} cannot be a folder: {error.strerror}", "name another one") from error
        for suite in suites:
            result = _SUITES[suite](model, tokenizer, settings, run, on_step)
            _write_json(out / f"{suite}.json", _about(folder, model, settings), result)
            for name, figure in plots.figures(suite, result).items():
                plots.save(figure, out / f"{name}.png")
            yield suite, "\n\n".join(table.markdown() for table in tables_of(suite, result))


def _about(folder: Path, model: Any, settings: Settings) -> dict[str, Any]:
    return {
        "model": str(folder),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "settings": asdict(settings),
    }


def _write_json(path: Path, about: Mapping[str, Any], result: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    text = json.dumps(to_json({**about, "result": result}), indent=1, default=str, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def _prompts(tokenizer: PreTrainedTokenizerBase, settings: Settings, run: Path | None) -> list[Prompt]:
    """Those of files, then the beginnings of held-out documents, a category for each corpus."""
    prompts = load_prompts(tokenizer, settings.prompts or None, settings.num_prompts)
    if settings.num_held_out == 0:
        return prompts
    for name, corpus in _corpora(settings, run, "--held-out").items():
        found: list[Prompt] = []
        for document in _held_out(corpus):
            token_ids = tokenizer(document, add_special_tokens=False, verbose=False).input_ids
            if len(token_ids) > HELD_OUT_TOKENS and len(found) < settings.num_held_out:
                prompt_ids = token_ids[:HELD_OUT_TOKENS]
                found.append(Prompt(f"held-out {name}", str(tokenizer.decode(prompt_ids)), torch.tensor(prompt_ids)))
        if not found:
            what = f"no held-out document is longer than {HELD_OUT_TOKENS} tokens"
            raise DataError(str(corpus.folder), what, "leave out --held-out, or name another corpus")
        prompts += found
    return prompts


def _documents(settings: Settings, run: Path | None) -> list[str]:
    """The texts to be scored: files, or the held-out documents of corpora, the same number of each corpus."""
    documents = []
    for path in settings.texts:
        try:
            documents.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(str(path), f"cannot be read as UTF-8 text: {error}", "name text files") from error
    if not documents or settings.corpora:
        corpora = _corpora(settings, run, "--text").values()
        for corpus in corpora:
            documents += islice(_held_out(corpus), -(-settings.num_texts // len(corpora)))
    return documents


def _corpora(settings: Settings, run: Path | None, key: str) -> dict[str, PreparedCorpus]:
    """The corpora whose held-out documents are read, by name: those that are named, or else the run's.

    Args:
        key: what asks for them.

    Raises:
        DataError: none is named, and the model does not lie in a run; or one cannot be read.
    """
    if settings.corpora:
        return {folder.name: open_prepared(folder) for folder in settings.corpora}
    if run is None:
        raise DataError(
            key,
            "no corpus is named, and the model does not lie in the folder of a run",
            "name prepared corpora with --corpus (or text files with --text, for the likelihood)",
        )
    entries = prepare_blends(load_resolved(run / "config.yaml"), is_main=False).of_run.entries
    return {
        entry.name if len(entry.corpora) == 1 else f"{entry.name}/{corpus.folder.name}": corpus
        for entry in entries
        for corpus in entry.corpora
    }


def _held_out(corpus: PreparedCorpus) -> Iterator[str]:
    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_folder, local_files_only=True)
    documents = corpus.documents(VALIDATION)
    for index in range(len(documents)):
        yield str(tokenizer.decode(documents.get(index).tolist(), skip_special_tokens=True))
