"""Refusals: what a provider means by a status, headers and a body. No text and no key gets past here."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import orjson

from engine.errors import (
    AuthenticationFailed,
    InputRejected,
    InputTooLong,
    ProviderError,
    QuotaExhausted,
    RateLimited,
    RequestTooLarge,
    Unavailable,
)
from engine.models.api.limits import seconds_of

NO_QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
OVER_QUOTA = "exceeded your current quota"
"""As OpenAI says of money, and Gemini of a minute's requests: only where it does not say how long to wait, it is the end."""
TOO_LARGE = (
    "max_tokens_per_request", "array_above_max_length", "tokens per request", "array too long", "request too large",
    "maximum allowed batch size", "batch size", "too many inputs", "total number of texts", "too many tokens in",
    "in one batch", "too many tokens overall", "tokens per submitted batch",
)  # fmt: skip
OF_INPUTS = ("array", "batch size", "inputs", "number of texts", "in one batch")
TOO_LONG = (
    "maximum context length", "must have less than", "too long", "maximum input length", "exceeds the maximum",
    "longer than the model", "max_model_len", "context length", "input length", "exceed_context_size",
    "available context size",
)  # fmt: skip
TOO_LONG_FOR_A_BATCH = "too large to process"
"""As llama.cpp says of one text, with HTTP 400 or 500: "increase the physical batch size" is no hint that it takes fewer of them."""
OF_NO_TEXT = (405, 424)
"""Statuses that end the job, without a plain sentence being sent to see whether others pass."""
_PAIRS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"maximum context length is (?P<limit>\d{1,9})\D+(?P<given>\d{1,9})",
        r"less than (?P<limit>\d{1,9}) tokens\W+given\W+(?P<given>\d{1,9})",
        r"\((?P<given>\d{1,9}) tokens\) exceeds the available context size \((?P<limit>\d{1,9})",
        r"\((?P<given>\d{1,9}) tokens\) is too large to process\D+(?P<limit>\d{1,9})",
    )
)
"""How servers say how many tokens a text has, and how many it may have."""
MAX_MESSAGE = 500
"""Characters of what a server says that are looked at, but for how long to wait."""
MAX_WORDS = 160
"""Characters of what a server says that are passed on."""
WINDOW = 12
"""Characters in a row of a text that give it away."""
LEAST_QUOTED = 4
"""Characters of a short ASCII text that is looked for as a whole: shorter ones are words that servers use."""
_KEY = re.compile(r"\b(sk|pk|key|api)[-_][A-Za-z0-9_*.\-]{6,}|\b[A-Za-z0-9_\-]{32,}\b")
_ESCAPED = re.compile(
    r"""\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|U00((?:0[0-9a-fA-F]|10)[0-9a-fA-F]{4})|([abfnrtv"'/\\]))"""
)
_CONTROLS = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_TRY_AGAIN = re.compile(
    r"(?:try again|retry) (?:in|after) (\d[\dhms.]*)(?: ?(second|minute|millisecond))?", re.IGNORECASE
)
_UNITS = {"millisecond": "ms", "minute": "m", "second": "s"}
_LIMIT = re.compile(r"(requests|tokens) per min.{0,20}?limit:? ([\d,]+)", re.IGNORECASE | re.DOTALL)


def refusal(
    status: int, headers: Mapping[str, str], body: bytes, texts: Sequence[str], secrets: Sequence[str] = ()
) -> ProviderError:
    """
    Say what an answer that is no success means.

    Args:
        status: Of HTTP.
        headers: Names in any case, as HTTP libraries have them.
        body: As it came.
        texts: That were sent: none of them is quoted.
        secrets: That must not be passed on, whatever the server says.
    """
    said, code = _said(body)
    message = said[:MAX_MESSAGE]
    signals = f"{code} {message}".lower()
    anonymous = _anonymous(message, texts, secrets)
    words = _line(anonymous)
    wait_s = wait_of(headers, said)
    if status in (401, 403):
        return AuthenticationFailed(
            f"the provider does not accept the key (HTTP {status}): see to it where the workers run"
        )
    # this ends the job, so a text that is quoted must not have said it
    of_money = NO_QUOTA if wait_s is not None else (*NO_QUOTA, OVER_QUOTA)
    if status == 402 or any(signal in f"{code} {anonymous}".lower() for signal in of_money):
        return QuotaExhausted(
            f"the provider's quota is used up (HTTP {status}): add to it, then run the same command again; "
            "what was committed is kept"
        )
    if status in (400, 500) and TOO_LONG_FOR_A_BATCH in signals:
        return InputTooLong(f"the provider finds it too long (HTTP {status}): {words}", _share(anonymous))
    is_too_long = any(signal in signals for signal in TOO_LONG)
    is_too_large = status in (400, 413, 422, 429) and any(signal in signals for signal in TOO_LARGE)
    # without words it is from what stands before a server, and counts bytes
    if is_too_large or (status == 413 and len(texts) > 1 and not is_too_long):
        of = "inputs" if any(signal in signals for signal in OF_INPUTS) else "tokens"
        return RequestTooLarge(f"the provider takes no request of this size (HTTP {status}): {words}", of=of)
    if status == 429:
        named = _LIMIT.search(message)
        of, limit = (named[1].lower(), float(named[2].replace(",", ""))) if named else ("", None)
        return RateLimited(f"the provider asks to wait (HTTP 429): {words}", wait_s, of=of, limit=limit)
    if status == 413 or (status in (400, 422) and is_too_long):
        return InputTooLong(f"the provider finds it too long (HTTP {status}): {words}", _share(anonymous))
    if status in (408, 409, 425) or status >= 500:
        return Unavailable(f"the provider fails (HTTP {status}): {words}", wait_s)
    if status == 404:
        return ProviderError(
            f"the provider has no such model or address (HTTP 404): {words}. Mend --model or --base-url"
        )
    if 400 <= status < 500 and status not in OF_NO_TEXT:  # 400, 422, Cohere's 498 and whatever else there is
        return InputRejected(f"the provider refuses it (HTTP {status}): {words}")
    return ProviderError(f"the provider answers with HTTP {status}: {words}")


def _share(words: str) -> float | None:
    """Return which share of a text's tokens the model takes, if a server says both numbers."""
    found = next((pair for pattern in _PAIRS if (pair := pattern.search(words))), None)
    limit, given = (int(found["limit"]), int(found["given"])) if found else (0, 0)
    return limit / given if 0 < limit < given else None


def wait_of(headers: Mapping[str, str], message: str = "") -> float | None:
    """Return for how many seconds a server asks to wait, in any of the forms that there are; None if it does not say."""
    if (num_ms := _number(headers.get("retry-after-ms"))) is not None:
        return num_ms / 1000
    if (given := headers.get("retry-after")) is not None:
        seconds = _number(given)
        if (seconds := _until(given) if seconds is None else seconds) is not None:
            return seconds
    if said := _TRY_AGAIN.search(message):
        unit = _UNITS[said[2].lower()] if said[2] else ""
        if (seconds := seconds_of(said[1].rstrip(".") + unit)) is not None:
            return seconds
    spent = [of for of in ("requests", "tokens") if headers.get(f"x-ratelimit-remaining-{of}") == "0"]
    resets = [seconds_of(headers.get(f"x-ratelimit-reset-{of}", "")) for of in spent]
    return max((reset for reset in resets if reset is not None), default=None)


def scrubbed(message: str, texts: Sequence[str], secrets: Sequence[str] = ()) -> str:
    """Return a server's words without anything that stands in a text or looks like a key, on one line, and not too long."""
    return _line(_anonymous(message, texts, secrets))


def _line(words: str) -> str:
    line = " ".join(words.split())
    return line if len(line) <= MAX_WORDS else f"{line[:MAX_WORDS]}…"


def _anonymous(message: str, texts: Sequence[str], secrets: Sequence[str]) -> str:
    message = _unescaped(message)
    for secret in secrets:
        message = message.replace(secret, "…") if secret else message
    message = _KEY.sub("…", message)
    plain = [_unescaped(text) for text in texts]  # or a text in which "\\n" stands would not be found in the message
    for text in plain:
        if len(text) < WINDOW and (len(text) >= LEAST_QUOTED or not text.isascii()):
            message = message.replace(text, "…")
    return _without(message, "\0".join(text for text in plain if len(text) >= WINDOW))


def _unescaped(words: str) -> str:
    """Return words as they were before they were written as JSON or as Python's repr, however often: servers quote texts so."""
    while "\\" in words:
        before, words = words, _ESCAPED.sub(_meant, words)
        words = words.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # JSON's pairs of halves
        if words == before:
            break
    return words


def _meant(escaped: re.Match[str]) -> str:
    digits = escaped[1] or escaped[2] or escaped[3]
    return chr(int(digits, 16)) if digits else _CONTROLS.get(escaped[4], escaped[4])


def _number(value: str | None) -> float | None:
    """Return seconds or milliseconds; None if they are none."""
    try:
        number = float(value or "")
    except ValueError:
        return None
    return max(number, 0.0) if math.isfinite(number) else None


def _without(message: str, text: str) -> str:
    """Leave out whatever stands in a text too, for `WINDOW` characters in a row and more."""
    kept, at = [], 0
    while at < len(message):
        window = message[at : at + WINDOW]
        if len(window) == WINDOW and window in text:
            end = at + WINDOW
            while end < len(message) and message[at : end + 1] in text:
                end += 1
            kept.append("…")
            at = end
        else:
            kept.append(message[at])
            at += 1
    return "".join(kept)


def _said(body: bytes) -> tuple[str, str]:
    """Return the message and the code of an error's body; of what is not JSON, nothing."""
    try:
        answer = orjson.loads(body)
    except ValueError:
        return "", ""
    if isinstance(answer, list) and len(answer) == 1:  # Gemini's
        answer = answer[0]
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    if isinstance(error, str):
        return error, ""
    if not isinstance(error, dict):
        return "", ""
    found = error.get("message") or error.get("detail") or ""
    if isinstance(found, list):  # pydantic's, behind FastAPI: its `input` is the text, so only `msg` is taken
        found = "; ".join(str(item.get("msg", "")) for item in found if isinstance(item, dict))
    return str(found), f"{error.get('code') or ''} {error.get('type') or ''}"


def _until(date: str) -> float | None:
    try:
        when: datetime = parsedate_to_datetime(date)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max((when - datetime.fromtimestamp(time.time(), UTC)).total_seconds(), 0.0)
