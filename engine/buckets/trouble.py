"""
What errors of a store mean: which may pass, and what to do about the others.

Of what a store says only its codes are looked at, and nothing is shown: it may quote what was sent.
"""

from __future__ import annotations

import re

from engine.errors import ConfigError, EngineError, Refused

_PASSING = {408, 429, 500, 502, 503, 504}


class TurnedAway(Exception):
    """An object could not be created and is not there: of several that write at once all may be turned away."""


def may_pass(error: BaseException) -> bool:
    """Say whether what failed may work in a moment."""
    from obstore.exceptions import AlreadyExistsError, GenericError

    if isinstance(error, (TurnedAway, AlreadyExistsError)):  # the second, 409, also where no condition was asked for
        return True
    if not isinstance(error, GenericError) or _has_no_keys(error):
        return False
    status = _status(error)
    return status in _PASSING if status else "HTTP error" in str(error)


def is_known(error: Exception) -> bool:
    """Say whether the store named an error that there is advice for."""
    return _code(error) in _ADVICE


def _status(error: BaseException) -> int:
    found = re.search(r"status code: (\d{3})", str(error))
    return int(found.group(1)) if found else 0


def _code(error: Exception) -> str:
    """Return the name that the store has for an error; empty if it gave none."""
    found = re.search(r"<Code>(\w+)</Code>", str(error))
    return found.group(1) if found else ""


def _has_no_keys(error: BaseException) -> bool:
    """Say whether it was the role of the machine that was asked for keys, in vain: the last place that a library looks at."""
    said = str(error)
    return any(sign in said for sign in ("/latest/api/token", "/latest/meta-data", "token request", "MissingAccount"))


_EXPIRED = "its credentials have expired: renew them where the engine and its workers run"
_UNKNOWN = "the store does not accept the credentials: set the right ones where the engine and its workers run"
_DENIED = "permission denied: the credentials need the right to list, read, create and delete there"
_NO_BUCKET = "there is no such bucket: create it, or check the name, the endpoint and the region"
_REGION = "the bucket is in another region, or at another endpoint: set AWS_REGION, or AWS_ENDPOINT_URL"
_CLOCK = "the clock of this machine is wrong: set it"
_BUSY = "the store did not answer, or asked to slow down, for {patience:g} s: let it recover"
_NO_KEYS = (
    "no credentials were found: set them in the environment of the engine and its workers (docs/object-stores.md), "
    "or give the machines a role"
)
_ADVICE = {
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"), _EXPIRED),
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthenticationFailed"), _UNKNOWN),
    **dict.fromkeys(("NoSuchBucket", "ContainerNotFound", "InvalidBucketName"), _NO_BUCKET),
    **dict.fromkeys(
        ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"), _REGION
    ),
    "RequestTimeTooSkewed": _CLOCK,
}
_NO_CONDITIONS = (
    "the store cannot refuse to overwrite an object (PUT with If-None-Match): use one that can, or --unsafe-single-writer if only "
    "one run will ever write there at a time"
)
_OF_STATUS = {401: _UNKNOWN, 403: _DENIED, 301: _REGION, 507: "the store is full: free some space"}


def explanation(error: Exception, verb: str, root: str, patience_s: float) -> EngineError:
    """Say what is wrong, and what to do, without a word of what the store said."""
    code, status = _code(error), _status(error)
    what = f"{code or type(error).__name__}{f', {status}' if status else ''}"
    if _has_no_keys(error):
        return ConfigError(f"cannot {verb} {root}: {_NO_KEYS}")
    advice = _ADVICE.get(code) or _OF_STATUS.get(status)
    if advice is None and "redirect without LOCATION" in str(error):
        advice = _REGION
    if advice is None and (isinstance(error, FileNotFoundError) or status == 404):
        advice = _NO_BUCKET
    if advice is None and isinstance(error, ValueError):
        advice = "an object's name has an empty, `.` or `..` step, which cannot be asked for: rename it"
    if advice is None:
        advice = _BUSY.format(patience=patience_s) if may_pass(error) else "the store refuses the request: see its logs"
    if status == 501:
        return Refused(f"cannot {verb} {root} ({what}): {_NO_CONDITIONS}")
    if advice in (_NO_BUCKET, _REGION):
        return ConfigError(f"cannot {verb} {root} ({what}): {advice}")
    return EngineError(
        f"cannot {verb} {root} ({what}): {advice}, then run the same command again; all that was committed is kept"
    )
