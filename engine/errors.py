"""
The errors of the engine: one tree, drawn before the code that raises them.

    EngineError                 1   anything unexpected
    ├── ConfigError             2   the command or the config is wrong
    │   └── SourceError         2   an input is missing, unreadable, or not what the config says
    ├── Refused                 3   going on would mix or lose something
    │   ├── FingerprintMismatch 3   the output belongs to another model or setting
    │   ├── SourceChanged       3   an input is no longer what was planned or committed
    │   └── OutputInUse         3   a live run owns the output
    ├── ProviderError           4   the model or its provider fails, whatever the text
    │   ├── AuthenticationFailed, QuotaExhausted
    │   ├── RateLimited, Unavailable, RequestTooLarge    a provider's, which the same text may pass later, or in smaller company
    │   ├── InputRejected           this one text is refused; its neighbours are not
    │   │   └── InputTooLong        … because it is too long
    │   └── Stopped                 the run is ending, and this was not begun
    └── CorruptOutput           6   what is stored is not what was written
        └── CommitConflict      6   two different answers for one shard

An error is one message that says what is wrong and what to do. It never carries a text or a key, and it survives pickling,
because most are raised in one process and read in another.
"""

from __future__ import annotations

from typing import ClassVar


class EngineError(Exception):
    """
    The root of every error that the engine raises on purpose.

    Args:
        message: What is wrong, and what to do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @property
    def message(self) -> str:
        """What is wrong, and what to do about it."""
        return str(self.args[0])


class ConfigError(EngineError):
    """The command or the configuration is wrong."""

    exit_code = 2


class SourceError(ConfigError):
    """An input is missing, unreadable, or not what the configuration says."""


class Refused(EngineError):
    """Going on would mix, double or lose something, so nothing was touched."""

    exit_code = 3


class FingerprintMismatch(Refused):
    """The output belongs to another model or setting."""


class SourceChanged(Refused):
    """An input is no longer what was planned, or what was committed."""


class OutputInUse(Refused):
    """A live run owns the output."""


class ProviderError(EngineError):
    """The model or its provider fails, whatever the text."""

    exit_code = 4


class AuthenticationFailed(ProviderError):
    """The provider does not accept the key."""


class QuotaExhausted(ProviderError):
    """The account has nothing left to spend."""


class RateLimited(ProviderError):
    """
    The provider asks to wait.

    Args:
        message: What is wrong, and what to do about it.
        wait_s: Seconds for which the provider asks; None if it does not say.
        of: Which limit it was, `requests` or `tokens`; empty if that is not known.
        limit: Of that per minute, as the provider words it.
    """

    def __init__(self, message: str, wait_s: float | None = None, *, of: str = "", limit: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s
        self.of = of
        self.limit = limit


class Unavailable(ProviderError):
    """
    The provider does not answer now, or not sensibly.

    Args:
        message: What is wrong.
        wait_s: Seconds for which the provider asks; None if it does not say.
    """

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class RequestTooLarge(ProviderError):
    """
    A request has more texts or tokens than the provider takes at once; in pieces it may pass.

    Args:
        message: What is wrong.
        of: What it has too many of, `inputs` or `tokens`.
    """

    def __init__(self, message: str, *, of: str = "tokens") -> None:
        super().__init__(message)
        self.of = of


class InputRejected(ProviderError):
    """One text is refused; its neighbours are not. The message becomes the reject's reason."""


class InputTooLong(InputRejected):
    """
    One text is longer than the model takes.

    Args:
        message: What is wrong.
        share: Of its tokens, that the model takes of the longest one; None if the provider does not say.
    """

    def __init__(self, message: str, share: float | None = None) -> None:
        super().__init__(message)
        self.share = share


class Stopped(ProviderError):
    """The run is ending (its money is spent, its quota used up), and what was asked for was not begun."""


class CorruptOutput(EngineError):
    """What is stored is not what was written."""

    exit_code = 6


class CommitConflict(CorruptOutput):
    """Two different answers are stored for one shard."""
