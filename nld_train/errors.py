"""Errors a user can act on: what is wrong, where it is, and what to do about it.

Every error raised for bad input carries a *message* (what is wrong, with the value found), a *location* (the
configuration key, file or tensor) and a *remedy* (what to change). Standard library only: this module is imported
before anything heavy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

EXIT_RESTART = 75
"""Exit status of a run that is to be started again (EX_TEMPFAIL): stopped with a checkpoint, stalled, a rank lost."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Args:
        location: configuration key (``objective.block_size``), path or tensor name.
        message: what is wrong, with the value that was found.
        remedy: what the user should do.
    """

    location: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.location}: {self.message}\n    remedy: {self.remedy}"


class NLDError(Exception):
    """Base of all errors that a user can act on; ``train.py`` and the scripts print it without a traceback."""

    def __init__(self, location: str, message: str, remedy: str) -> None:
        self.problems: tuple[Problem, ...] = (Problem(location, message, remedy),)
        super().__init__(str(self.problems[0]))

    def __reduce__(self) -> tuple[object, ...]:  # errors of loader workers and of other ranks cross processes
        problem = self.problems[0]
        return (type(self), (problem.location, problem.message, problem.remedy))


class ConfigError(NLDError):
    """The configuration is refused; holds every problem that was found, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        if not problems:
            raise ValueError("ConfigError needs at least one problem")
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{count} problem{'s' if count > 1 else ''} in the configuration:"
        Exception.__init__(self, "\n".join([head, *(f"  {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.problems,))


class DataError(NLDError):
    """A corpus, tokenizer or prepared data file cannot be used."""


class TrainingError(NLDError):
    """A run cannot go on: a number is not finite."""


class CheckpointError(NLDError):
    """A checkpoint or Hugging Face folder cannot be read, written or converted."""
