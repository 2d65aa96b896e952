"""What preparing a corpus tells the person who waits for it."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class PrepareProgress:
    """Receives the progress of :func:`nld_train.data.prepare.prepare`; this base ignores it."""

    def phase(self, name: str, *, total_documents: int, total_bytes: int) -> None:
        """A new phase begins (training the tokenizer, tokenising); the one before it is finished."""

    def advance(self, documents: int, text_bytes: int) -> None:
        """So many more documents and bytes of UTF-8 text are done in this phase."""

    def message(self, text: str) -> None:
        """A line for people: a cache was found, rebuilt, another process is waited for."""


class RichProgress(PrepareProgress):
    """One bar per phase, with documents, MB/s and elapsed time; use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("documents  {task.fields[rate]}"),
            TimeElapsedColumn(),
            console=console or Console(stderr=True),
        )
        self._task: TaskID | None = None
        self._text_bytes = 0

    def __enter__(self) -> "RichProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def phase(self, name: str, *, total_documents: int, total_bytes: int) -> None:
        description = f"{name} ({total_bytes / 1e6:.1f} MB)"
        self._task = self._progress.add_task(description, total=total_documents, rate="")
        self._text_bytes = 0

    def advance(self, documents: int, text_bytes: int) -> None:
        if self._task is None:
            raise RuntimeError("advance() before the first phase()")
        self._text_bytes += text_bytes
        elapsed = self._progress.tasks[self._task].elapsed
        rate = f"{self._text_bytes / 1e6 / elapsed:.1f} MB/s" if elapsed else ""
        self._progress.update(self._task, advance=documents, rate=rate)

    def message(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)
