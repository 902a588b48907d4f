"""The tree of errors."""

from __future__ import annotations

import copy
import pickle

import pytest

import engine
from engine import errors
from engine.errors import EngineError

CODES = {
    "EngineError": 1,
    "ConfigError": 2,
    "SourceError": 2,
    "Refused": 3,
    "FingerprintMismatch": 3,
    "SourceChanged": 3,
    "OutputInUse": 3,
    "ProviderError": 4,
    "AuthenticationFailed": 4,
    "QuotaExhausted": 4,
    "RateLimited": 4,
    "InputRejected": 4,
    "InputTooLong": 4,
    "RequestTooLarge": 4,
    "Stopped": 4,
    "Unavailable": 4,
    "CorruptOutput": 6,
    "CommitConflict": 6,
}


def every(kind: type[EngineError] = EngineError) -> list[type[EngineError]]:
    """List the tree; Ray makes hybrids of its classes and ours, which are not of it."""
    ours = [child for child in kind.__subclasses__() if child.__module__ == kind.__module__]
    return [kind, *(below for child in ours for below in every(child))]


@pytest.mark.parametrize("kind", every())
def test_an_error_survives_pickling_whole(kind):
    """Raised in an actor, read in the driver: class, message and all that it carries."""
    error = kind("what is wrong; what to do: é\n")
    for same in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(same) is kind
        assert same.message == str(same) == error.message
        assert vars(same) == vars(error)


def test_every_error_has_its_exit_code_and_is_exported():
    """What the command line ends with is fixed; `import engine` is enough to catch each."""
    ours = [kind for kind in every() if kind.__module__ == errors.__name__]
    assert {kind.__name__: kind.exit_code for kind in ours} == CODES
    assert all(getattr(engine, kind.__name__) is kind for kind in ours)
    assert {kind.__name__ for kind in ours} <= set(engine.__all__)


def test_every_error_says_in_its_docstring_when_it_is_raised():
    """The tree is documentation too."""
    assert all(kind.__doc__ for kind in every())
