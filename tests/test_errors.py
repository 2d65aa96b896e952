"""Errors carry location, message and remedy, all problems at once, and cross process boundaries whole."""

import pickle

import pytest

from nld_train.errors import CheckpointError, ConfigError, DataError, NLDError, Problem


@pytest.mark.parametrize("kind", [NLDError, DataError, CheckpointError])
def test_message_and_pickle(kind: type[NLDError]) -> None:
    error = kind("some/file", "is 3 bytes short", "copy it again")
    for part in ("some/file", "is 3 bytes short", "copy it again"):
        assert part in str(error)
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert (str(back), back.problems) == (str(error), error.problems)


def test_config_error_holds_every_problem() -> None:
    problems = [Problem("a.b", "is 0", "use 1"), Problem("c", "is x", "use y")]
    error = ConfigError(problems)
    assert "2 problems" in str(error)
    assert all(text in str(error) for text in ("a.b", "is 0", "use 1", "c", "is x", "use y"))
    back = pickle.loads(pickle.dumps(error))
    assert (str(back), back.problems) == (str(error), tuple(problems))
    with pytest.raises(ValueError, match="at least one"):
        ConfigError([])
