"""Files of the user to a prepared corpus: several processes, each of which writes whole shards, and goes on after an
interruption where it was.

What a shard holds is decided before the first one is written, by the inputs and the options alone. So any number of
processes, however often they are killed and started again, end with the same bytes.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from nld_train.data.corpora import Document
from nld_train.data.encoding import TextEncoder, check_encoder
from nld_train.data.files import fsync, locked, publish_folder, sha256_of_file, sha256_of_folder
from nld_train.data.inputs import Format, InputFile, Piece, PieceReader, ReadOptions, check_unchanged, plan_shards
from nld_train.data.prepared import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    TRAIN,
    VALIDATION,
    WORK_FOLDER,
    InputStats,
    PreparedCorpus,
    open_prepared,
    verify,
)
from nld_train.data.progress import PrepareProgress
from nld_train.data.shards import (
    ShardRecord,
    complete_shard,
    finish,
    has_complete_shards,
    is_held_out,
    json_text,
    remove_temporary,
    source_hash,
    utf8_size,
    write_json,
    write_shard,
)
from nld_train.data.tokenizer import convert_tekken, copy_tokenizer, save_tokenizer, train_tokenizer
from nld_train.errors import DataError

Result = TypeVar("Result")

# A tokenizer is trained on about so much text (bytes of input): it changes little with more, and memory is bounded.
_TRAIN_TOKENIZER_BYTES = 512 << 20
# The encoder is checked on so many documents of the corpus, of at most so many characters each.
_CHECK_DOCUMENTS, _CHECK_CHARACTERS = 200, 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """How files become a corpus.

    Args:
        name: of the corpus, in messages and in the manifest.
        tokenizer: Hugging Face tokenizer folder, tekken.json, or ``train:SIZE`` (trained on the corpus itself).
        read: which fields of the inputs are read.
        validation_fraction: share of the sources that is held out; the same in all corpora that are blended.
        shard_bytes: about so much input for each shard.
    """

    name: str
    tokenizer: str
    read: ReadOptions
    validation_fraction: float = 0.005
    shard_bytes: int = 512 * 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class _ShardJob:
    """What a worker needs to write a shard."""

    folder: Path
    number: int
    files: tuple[InputFile, ...]
    pieces: tuple[Piece, ...]
    read: ReadOptions
    eos_token_id: int
    vocab_size: int
    validation_fraction: float
    tokenizer_hash: str


def prepare_files(
    folder: Path,
    inputs: Sequence[InputFile],
    options: PrepareOptions,
    *,
    workers: int = 1,
    progress: PrepareProgress | None = None,
) -> PreparedCorpus:
    """Tokenise files into ``folder``. Called again after an interruption, it keeps the shards that are complete.

    Args:
        folder: of the corpus; new, or one that the same call has begun or finished.
        inputs: see :func:`nld_train.data.inputs.find_inputs`.
        options: how.
        workers: processes; no byte depends on it.
        progress: told what happens.

    Raises:
        DataError: something is wrong in an input (which, where); the folder is being or was prepared from other inputs
            or with other options (which); no usable tokenizer.
    """
    progress = progress or PrepareProgress()
    if not inputs:
        raise DataError(str(folder), "there are no inputs", "name files with --input")
    if not 0 < options.validation_fraction < 1:
        raise DataError(
            "--validation-fraction",
            f"{options.validation_fraction} leaves a part empty",
            "use a number between 0 and 1",
        )
    folder = folder.absolute()

    def refuse() -> None:
        raise DataError(str(folder), "another process is preparing this folder", "wait for it, or name another folder")

    with locked(folder.with_name(f".{folder.name}.lock"), on_wait=refuse):
        # Spawned, not forked: no thread and no lock of this process is copied into them.
        with _Pool(workers, progress) as pool:
            plan = _plan(folder, inputs, options, pool)
            if (folder / MANIFEST_NAME).is_file():
                return _found(folder, plan, progress)
            if folder.exists() and not (folder / WORK_FOLDER).is_dir() and any(folder.iterdir()):
                raise DataError(str(folder), "is not empty, and no corpus", "name a new folder")
            (folder / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
            _check_or_write_plan(folder, plan)
            for stale in (folder, folder / WORK_FOLDER):
                remove_temporary(stale)
            encoder = _make_tokenizer(folder, inputs, options, progress)
            records, eos_token_id, tokenizer_hash = _write_shards(folder, inputs, options, encoder, pool, progress)
        finish(
            folder,
            records,
            corpus=options.name,
            source=plan["source"],
            content_hash=plan["content_hash"],
            inputs=[InputStats(**stats) for stats in plan["inputs"]],
            num_skipped=0,
            options=plan["options"],
            vocab_size=encoder.vocab_size,
            eos_token_id=eos_token_id,
            tokenizer_hash=tokenizer_hash,
        )
        return open_prepared(folder)


# ---------------------------------------------------------------------------------------------- the plan


def _plan(folder: Path, inputs: Sequence[InputFile], options: PrepareOptions, pool: "_Pool") -> dict[str, Any]:
    """What the bytes of the corpus depend on: the options, and every input with its hash."""
    total = sum(file.size for file in inputs)
    pool.progress.phase("hashing the inputs", total_documents=0, total_bytes=total)
    hashes = pool.run(_hash_input, list(inputs))
    stats = [
        {"name": file.name, "size": file.size, "sha256": sha256} for file, sha256 in zip(inputs, hashes, strict=True)
    ]
    return {
        "format_version": FORMAT_VERSION,
        "name": options.name,
        "source": f"{len(inputs)} file{'s' if len(inputs) > 1 else ''}, {total} bytes",
        "content_hash": hashlib.sha256(json.dumps(stats).encode()).hexdigest(),
        "options": {
            "tokenizer": _tokenizer_key(options.tokenizer),
            "formats": ",".join(sorted({file.format for file in inputs})),
            "text_field": options.read.text_field,
            "source_field": options.read.source_field or "",
            "sample_by": str(options.read.sample_by),
            "split": options.read.split,
            "config_name": options.read.config_name,
            "shard_bytes": options.shard_bytes,
            "validation_fraction": options.validation_fraction,
        },
        "inputs": stats,
    }


def _hash_input(file: InputFile) -> str:
    if file.format is not Format.hub:
        digest = sha256_of_file(file.path)
        check_unchanged(file)
    elif file.revision:
        digest = file.revision
    else:
        digest = sha256_of_folder(file.path)
    _report(0, file.size, 0)
    return digest


def _tokenizer_key(tokenizer: str) -> str:
    """``train:SIZE``, or what the tokenizer's files hold, so that another tokenizer under the same name is noticed."""
    if tokenizer.startswith("train:"):
        size = tokenizer.removeprefix("train:")
        if not size.isdecimal():
            raise DataError("--tokenizer", f"{tokenizer!r} names no size", "write train:SIZE, such as train:32000")
        return tokenizer
    path = Path(tokenizer)
    if path.is_file():
        return f"tekken {sha256_of_file(path)}"
    json_path = path / "tokenizer.json"
    if not json_path.is_file():
        raise DataError(
            "--tokenizer",
            f"{tokenizer!r} is neither a folder with a tokenizer.json, a tekken.json nor train:SIZE",
            "correct the path",
        )
    return f"tokenizer.json {sha256_of_file(json_path)}"


def _check_or_write_plan(folder: Path, plan: dict[str, Any]) -> None:
    path = folder / WORK_FOLDER / "plan.json"
    if not path.is_file() or not has_complete_shards(folder):
        # A first try that ended before its first shard (a wrong option, a wrong line) binds nobody.
        if not path.is_file() or path.read_text(encoding="utf-8") != json_text(plan):
            # In this order: killed in between, a folder without a plan is begun anew.
            path.unlink(missing_ok=True)
            fsync(path.parent)
            shutil.rmtree(folder / "tokenizer", ignore_errors=True)
            for stale in [*folder.glob(f"{TRAIN}-*"), *path.parent.glob(f"{VALIDATION}-*"), *path.parent.glob("*.npz")]:
                stale.unlink()
            write_json(path, plan)
        return
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(str(path), f"cannot be read: {error}", f"remove {folder} and prepare it again") from error
    _check_same(folder, begun, plan, "was begun")


def _check_same(folder: Path, begun: dict[str, Any], plan: dict[str, Any], verb: str) -> None:
    """Raises DataError: naming the options and the inputs that differ."""
    remedy = "name another folder, or remove this one; or give the options and inputs that it was prepared from"
    differs = [
        f"{key}: {before!r}, not {now!r}"
        for key, before, now in [
            ("format_version", begun["format_version"], plan["format_version"]),
            ("name", begun["name"], plan["name"]),
            *(
                (key, begun["options"].get(key), plan["options"].get(key))
                for key in {**begun["options"], **plan["options"]}
            ),
        ]
        if before != now
    ]
    if differs:
        raise DataError(str(folder), f"{verb} with other options: {'; '.join(differs)}", remedy)
    before, now = ({stats["name"]: stats for stats in side["inputs"]} for side in (begun, plan))
    changed = [f"{name} has changed" for name in before if name in now and now[name] != before[name]]
    changed += [f"{name} is missing" for name in before if name not in now]
    changed += [f"{name} is new" for name in now if name not in before]
    if not changed and begun["inputs"] != plan["inputs"]:
        changed = ["their order"]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise DataError(str(folder), f"{verb} from other inputs: {', '.join(changed[:5])}{more}", remedy)


def _found(folder: Path, plan: dict[str, Any], progress: PrepareProgress) -> PreparedCorpus:
    corpus = open_prepared(folder)
    manifest = corpus.manifest
    begun = {
        "format_version": manifest.format_version,
        "name": manifest.corpus,
        "options": manifest.options,
        "inputs": [dataclasses.asdict(stats) for stats in manifest.inputs],
    }
    _check_same(folder, begun, plan, "was prepared")
    progress.phase("verifying", total_documents=0, total_bytes=sum(stats.size for stats in manifest.files.values()))
    verify(corpus, progress=progress)
    shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)  # killed between the manifest and this
    progress.message(f"{folder} is complete: nothing to do")
    return corpus


# ---------------------------------------------------------------------------------------------- the tokenizer


def _make_tokenizer(
    folder: Path, inputs: Sequence[InputFile], options: PrepareOptions, progress: PrepareProgress
) -> TextEncoder:
    """``tokenizer/``, whole or not at all; one that is there is kept. Returns its encoder, which takes a second."""
    target = folder / "tokenizer"
    if target.is_dir():
        return TextEncoder.from_folder(target)
    with publish_folder(target) as temporary:
        made = temporary / "made"
        if options.tokenizer.startswith("train:"):
            texts = _training_sample(inputs, options, progress)
            tokenizer = train_tokenizer(texts, vocab_size=int(options.tokenizer.removeprefix("train:")))
            save_tokenizer(tokenizer, made)
        elif Path(options.tokenizer).is_file():
            progress.message(f"converting {options.tokenizer}")
            convert_tekken(Path(options.tokenizer), made)
        else:
            copy_tokenizer(Path(options.tokenizer), made)
        encoder = TextEncoder.from_folder(made)
        encoder.location = str(target / "tokenizer.json")
        encoder.end_token_id(made)  # before it is kept: a rerun would not make it again
        for path in made.iterdir():
            path.rename(temporary / path.name)
        made.rmdir()
    return encoder


def _training_sample(inputs: Sequence[InputFile], options: PrepareOptions, progress: PrepareProgress) -> Iterator[str]:
    """Texts for a tokenizer: all of a small corpus; of a large one the beginning of every shard. None is held out."""
    shards = plan_shards(inputs, options.read, options.shard_bytes)
    total = sum(piece.size for shard in shards for piece in shard)
    per_shard = max(1, min(_TRAIN_TOKENIZER_BYTES, total) // len(shards))
    progress.phase("training the tokenizer", total_documents=0, total_bytes=min(_TRAIN_TOKENIZER_BYTES, total))
    for shard in shards:
        read = 0
        for document in _documents(inputs, shard, options.read):
            if total > _TRAIN_TOKENIZER_BYTES and read > per_shard:
                break
            size = utf8_size(document)
            read += size
            progress.advance(1, size)
            if document.text and not is_held_out(source_hash(document), options.validation_fraction):
                yield document.text


def _documents(files: Sequence[InputFile], pieces: Iterable[Piece], read: ReadOptions) -> Iterator[Document]:
    for piece in pieces:
        yield from PieceReader(files[piece.file], piece, read)


def _sample(inputs: Sequence[InputFile], shards: Sequence[Sequence[Piece]], read: ReadOptions) -> list[str]:
    """Texts from the beginnings of a few shards."""
    texts: list[str] = []
    step = max(1, len(shards) // 4)
    for shard in shards[::step][:4]:
        documents = islice(_documents(inputs, shard, read), _CHECK_DOCUMENTS // 4)
        texts += [document.text[:_CHECK_CHARACTERS] for document in documents]
    return [text for text in texts if text.isascii() or _is_unicode(text)]


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False  # refused with its place when its shard is written
    return True


# ---------------------------------------------------------------------------------------------- the shards


def _write_shards(
    folder: Path,
    inputs: Sequence[InputFile],
    options: PrepareOptions,
    encoder: TextEncoder,
    pool: "_Pool",
    progress: PrepareProgress,
) -> tuple[list[ShardRecord], int, str]:
    """Returns what was written, the id of the end token, and the hash of the tokenizer."""
    tokenizer_folder = folder / "tokenizer"
    _keep_encoder((tokenizer_folder, encoder))  # for jobs in this process
    pool.begin(_keep_encoder, (tokenizer_folder, encoder))
    eos_token_id = encoder.end_token_id(tokenizer_folder)
    tokenizer_hash = sha256_of_folder(tokenizer_folder)
    shards = plan_shards(inputs, options.read, options.shard_bytes)
    if not shards:
        raise DataError(
            str(folder), f"corpus {options.name} is empty: its inputs hold nothing", "name inputs with text"
        )
    progress.message(
        f"{len(inputs)} input{'s' if len(inputs) > 1 else ''}, {len(shards)} shards, vocabulary {encoder.vocab_size}, "
        f"{'tiktoken' if encoder.is_fast else 'the tokenizers library'} encodes, {pool.workers} workers"
    )
    check_encoder(encoder, _sample(inputs, shards, options.read))
    jobs = []
    for number, pieces in enumerate(shards):
        used = sorted({piece.file for piece in pieces})
        jobs.append(
            _ShardJob(
                folder=folder,
                number=number,
                files=tuple(inputs[place] for place in used),
                pieces=tuple(dataclasses.replace(piece, file=used.index(piece.file)) for piece in pieces),
                read=options.read,
                eos_token_id=eos_token_id,
                vocab_size=encoder.vocab_size,
                validation_fraction=options.validation_fraction,
                tokenizer_hash=tokenizer_hash,
            )
        )
    progress.phase(
        "tokenising", total_documents=0, total_bytes=sum(piece.size for pieces in shards for piece in pieces)
    )
    return pool.run(_write_or_keep, jobs), eos_token_id, tokenizer_hash


_ENCODERS: dict[Path, TextEncoder] = {}
"""This process' encoder, by the folder: it takes a second to make."""


def _encoder(tokenizer_folder: Path) -> TextEncoder:
    if tokenizer_folder not in _ENCODERS:
        _ENCODERS.clear()
        _ENCODERS[tokenizer_folder] = TextEncoder.from_folder(tokenizer_folder)
    return _ENCODERS[tokenizer_folder]


def _keep_encoder(made: tuple[Path, TextEncoder]) -> None:
    _ENCODERS.clear()
    _ENCODERS.update([made])


def _write_or_keep(job: _ShardJob) -> ShardRecord:
    record = complete_shard(job.folder, job.number)
    if record is not None and record.tokenizer_hash == job.tokenizer_hash:
        _report(record.train_documents + record.validation_documents, sum(piece.size for piece in job.pieces), 0)
        return record
    readers = [PieceReader(job.files[piece.file], piece, job.read) for piece in job.pieces]
    reported = 0

    def report(documents: int, text_bytes: int, tokens: int) -> None:
        nonlocal reported
        consumed = sum(reader.consumed for reader in readers)
        _report(documents, consumed - reported, tokens)
        reported = consumed

    record = write_shard(
        (document for reader in readers for document in reader),
        _encoder(job.folder / "tokenizer"),
        folder=job.folder,
        number=job.number,
        eos_token_id=job.eos_token_id,
        vocab_size=job.vocab_size,
        validation_fraction=job.validation_fraction,
        tokenizer_hash=job.tokenizer_hash,
        report=report,
    )
    report(0, 0, 0)
    return record


# ---------------------------------------------------------------------------------------------- the processes


_report: Callable[[int, int, int], None] = lambda documents, num_bytes, tokens: None  # noqa: E731
"""Tells the progress of this process; set in each."""


def _begin_worker(reports: Any) -> None:
    global _report
    # As many processes as there are to be; none has threads of its own beside.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _report = lambda *numbers: reports.put(numbers)  # noqa: E731
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


class _Pool:
    """Runs jobs in ``workers`` processes (one worker, or one job: in this process) and hands their progress on; a
    context manager."""

    def __init__(self, workers: int, progress: PrepareProgress) -> None:
        if workers < 1:
            raise DataError("--workers", f"{workers} is too small", "use at least 1")
        self.workers = workers
        self.progress = progress
        self._executor: ProcessPoolExecutor | None = None
        self._reports: Any = None

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._executor is None:
            return
        processes = list((self._executor._processes or {}).values()) if kind is not None else []
        for process in processes:  # their shards are half done, and are begun again next time
            process.terminate()
        self._executor.shutdown(cancel_futures=True)

    def run(self, work: Callable[[Any], Result], jobs: Sequence[Any]) -> list[Result]:
        """The results of ``work`` on every job, in order. The first error ends all."""
        if self.workers == 1 or len(jobs) == 1:
            return self._run_here(work, jobs)
        executor = self._started()
        try:
            futures: list[Future[Result]] = [executor.submit(work, job) for job in jobs]
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                self._hand_on()
                for future in done:
                    future.result()
            self._hand_on()
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise DataError(
                "--workers",
                "a worker was killed from outside; the system may have been out of memory",
                "run the same command again, with fewer workers: complete shards are kept",
            ) from error

    def begin(self, work: Callable[[Any], object], job: Any) -> None:
        """Have the processes do ``work`` while this one goes on; its result, or error, is met again by :meth:`run`."""
        if self.workers > 1:
            executor = self._started()
            for _ in range(self.workers):
                executor.submit(work, job)

    def _started(self) -> ProcessPoolExecutor:
        if self._executor is None:
            context = multiprocessing.get_context("spawn")
            self._reports = context.SimpleQueue()  # a report is in the pipe before its job is done
            self._executor = ProcessPoolExecutor(
                self.workers, mp_context=context, initializer=_begin_worker, initargs=(self._reports,)
            )
        return self._executor

    def _run_here(self, work: Callable[[Any], Result], jobs: Sequence[Any]) -> list[Result]:
        global _report
        before, _report = _report, self.progress.advance
        try:
            return [work(job) for job in jobs]
        finally:
            _report = before

    def _hand_on(self) -> None:
        while not self._reports.empty():
            self.progress.advance(*self._reports.get())
