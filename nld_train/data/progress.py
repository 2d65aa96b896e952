"""What preparing a corpus tells the person who waits for it."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class PrepareProgress:
    """Receives the progress of :func:`nld_train.data.prepare.prepare`; this base ignores it."""

    def phase(self, name: str, *, total_documents: int, total_bytes: int) -> None:
        """A new phase begins (training the tokenizer, tokenising); the one before it is finished. 0 documents: their
        number is not known."""

    def advance(self, documents: int, num_bytes: int, tokens: int = 0) -> None:
        """So many more documents, bytes (of what the phase counts: text, or input) and tokens are done."""

    def message(self, text: str) -> None:
        """A line for people: a cache was found, rebuilt, another process is waited for."""


class RichProgress(PrepareProgress):
    """One bar per phase, with documents, MB/s, tokens/s and the time left; use as a context manager.

    Where the output is no terminal: a line every ``interval`` seconds.
    """

    def __init__(self, console: Console | None = None, interval: float = 10.0) -> None:
        self._console = console or Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._interval = interval
        self._name = ""
        self._total = self._bytes = self._documents = self._tokens = 0
        self._begin = self._printed = 0.0

    def __enter__(self) -> "RichProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def phase(self, name: str, *, total_documents: int, total_bytes: int) -> None:
        of = f"{total_documents:,} documents, " if total_documents else ""
        self._name = f"{name} ({of}{total_bytes / 1e6:.1f} MB)"
        self._task = self._progress.add_task(self._name, total=total_bytes, rate="")
        self._total, self._bytes, self._documents, self._tokens = total_bytes, 0, 0, 0
        self._begin = self._printed = time.monotonic()

    def advance(self, documents: int, num_bytes: int, tokens: int = 0) -> None:
        if self._task is None:
            raise RuntimeError("advance() before the first phase()")
        self._bytes += num_bytes
        self._documents += documents
        self._tokens += tokens
        now = time.monotonic()
        if self._console.is_terminal:
            self._progress.update(self._task, completed=self._bytes, rate=self._rate(now))
        elif now - self._printed >= self._interval:
            self._printed = now
            share = self._bytes / self._total if self._total else 0.0
            left = (now - self._begin) * (1 - share) / share if share else 0.0
            self.message(f"{self._name}: {share:.0%}, {self._rate(now)}, {left:.0f} s left")

    def message(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _rate(self, now: float) -> str:
        seconds = max(now - self._begin, 1e-9)
        tokens = f", {self._tokens / seconds / 1e6:.2f}M tokens/s" if self._tokens else ""
        return f"{self._documents:,} documents, {self._bytes / 1e6 / seconds:.1f} MB/s{tokens}"
