"""Refusals: what real servers say, what it means, and that no text and no key gets past."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime
from email.utils import format_datetime

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from engine.models.api.limits import Limits, limits_of, seconds_of
from engine.models.api.refusals import MAX_WORDS, refusal, scrubbed, wait_of

TEXT = "My account 4929-1234 was charged twice in May"


def openai(message: str, code: str | None = None, kind: str = "invalid_request_error") -> dict:
    """An error of OpenAI's, Azure's, and of newer vLLM."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def vllm(message: str, kind: str = "BadRequestError", code: int = 400) -> dict:
    """An error of older vLLM."""
    return {"object": "error", "message": message, "type": kind, "param": None, "code": code}


def tei(message: str, kind: str = "Validation") -> dict:
    """An error of text-embeddings-inference."""
    return {"error": message, "error_type": kind}


def pydantic(message: str) -> dict:
    """An error of whatever is built on FastAPI: it quotes what it was given."""
    return {"detail": [{"type": "string_too_long", "loc": ["body", "input", 0], "msg": message, "input": TEXT}]}


def gemini(message: str, code: int, status: str) -> dict:
    """An error of Gemini's; behind OpenAI's form of its API it is the only one of a list."""
    return {"error": {"code": code, "message": message, "status": status}}


def llama(message: str, code: int, kind: str) -> dict:
    """An error of llama.cpp's server."""
    return {"error": {"code": code, "message": message, "type": kind}}


MISTRAL = {
    "object": "error",
    "message": "Too many tokens overall, split into more batches.",
    "type": "invalid_request_prompt",
    "code": "3210",
}
VOYAGE = (
    "Request to model 'voyage-3' failed. The max allowed tokens per submitted batch is 120000. Your batch has 150000 "
    "tokens after truncation. Please lower the number of tokens in the batch."
)
LLAMA_CONTEXT = "request (9412 tokens) exceeds the available context size (8192 tokens), try increasing it"
LLAMA_BATCH = "input (992 tokens) is too large to process. increase the physical batch size (current batch size: 512)"
ON_TPM = (
    "Rate limit reached for text-embedding-3-small in organization org-x on tokens per min (TPM): Limit 1,000,000, "
    "Used 950000, Requested 60000. Please try again in 600ms. Visit https://platform.openai.com/account/rate-limits."
)
TOO_LARGE_FOR_TPM = (
    "Request too large for text-embedding-3-small in organization org-x on tokens per min (TPM): Limit 30000, "
    "Requested 50000. The input or output tokens must be reduced in order to run successfully."
)
NO_MONEY = "You exceeded your current quota, please check your plan and billing details."
PER_MINUTE = (
    f"{NO_MONEY} For more information on this error, head to: https://ai.google.dev/gemini-api/docs/rate-limits. "
    + "\n* Quota exceeded for metric: generativelanguage.googleapis.com/embed_content_free_tier_requests, limit: 100"
    * 5
    + "\nPlease retry in 11.665902715s."
)
CONTEXT = "This model's maximum context length is 8192 tokens, however you requested 9000 tokens."
AZURE = (
    "Requests to the Embeddings_Create Operation under Azure OpenAI API version 2024-02-01 have exceeded call rate "
    "limit of your current OpenAI S0 pricing tier. Please retry after 7 seconds."
)
TRIAL = (
    "You are using a Trial key, which is limited to 100 API calls / minute. You can continue to use the Trial key for "
    "free or upgrade to a Production key with higher rate limits at 'https://dashboard.cohere.com/api-keys'."
)


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (401, openai("Incorrect API key provided: sk-a***xyz.", "invalid_api_key"), AuthenticationFailed),
        (401, {"statusCode": 401, "message": "Access denied due to invalid subscription key."}, AuthenticationFailed),
        (401, {"message": "invalid api token"}, AuthenticationFailed),
        (403, openai("Country, region, or territory not supported"), AuthenticationFailed),
        (429, openai(NO_MONEY, "insufficient_quota", "insufficient_quota"), QuotaExhausted),
        (429, openai("x", "billing_hard_limit_reached"), QuotaExhausted),
        (400, openai("Your account is not active.", "billing_not_active"), QuotaExhausted),
        (402, b"", QuotaExhausted),
        (429, openai(NO_MONEY + " Please try again in 20s.", "insufficient_quota"), QuotaExhausted),
        (429, gemini(PER_MINUTE, 429, "RESOURCE_EXHAUSTED"), RateLimited),
        (429, [gemini(PER_MINUTE, 429, "RESOURCE_EXHAUSTED")], RateLimited),
        (429, [gemini(NO_MONEY, 429, "RESOURCE_EXHAUSTED")], QuotaExhausted),
        (429, openai(ON_TPM, "rate_limit_exceeded", "tokens"), RateLimited),
        (429, openai(AZURE, "429"), RateLimited),
        (429, {"message": TRIAL}, RateLimited),
        (429, tei("Model is overloaded", "Overloaded"), RateLimited),
        (429, b"Too Many Requests", RateLimited),
        (429, openai(TOO_LARGE_FOR_TPM, "rate_limit_exceeded", "tokens"), RequestTooLarge),
        (
            400,
            openai("Requested 300001 tokens, max 300000 tokens per request", "max_tokens_per_request"),
            RequestTooLarge,
        ),
        (400, openai("Invalid 'input': array too long.", "array_above_max_length"), RequestTooLarge),
        (422, tei("batch size 64 > maximum allowed batch size 32"), RequestTooLarge),
        (413, tei("batch size 64 > maximum allowed batch size 32"), RequestTooLarge),
        (400, {"message": "invalid request: total number of texts must be at most 96 - received 97"}, RequestTooLarge),
        (400, openai(CONTEXT), InputTooLong),
        (400, vllm("This model's maximum context length is 512 tokens. However, you requested 600"), InputTooLong),
        (413, tei("Input validation error: `inputs` must have less than 512 tokens. Given: 600"), InputTooLong),
        (422, tei("Input validation error: `inputs` must have less than 512 tokens. Given: 600"), InputTooLong),
        (400, {"error": "the input length exceeds the context length"}, InputTooLong),
        (400, llama(LLAMA_CONTEXT, 400, "exceed_context_size_error"), InputTooLong),
        (400, llama(LLAMA_CONTEXT.replace("available", "slot's"), 400, "exceed_context_size_error"), InputTooLong),
        (500, llama(LLAMA_BATCH, 500, "server_error"), InputTooLong),
        (400, llama(LLAMA_BATCH, 400, "invalid_request_error"), InputTooLong),
        (500, llama("input is too large to process. increase the physical batch size", 500, "x"), InputTooLong),
        (500, llama("failed to process", 500, "server_error"), Unavailable),
        (413, b"<html><h1>413 Request Entity Too Large</h1></html>", InputTooLong),
        (400, openai("'$.input' is invalid. Please check the API reference"), InputRejected),
        (422, pydantic("Input should be a valid string"), InputRejected),
        (400, b"", InputRejected),
        (498, {"message": "blocked input"}, InputRejected),
        (451, b"", InputRejected),
        (404, openai("The model `x` does not exist", "model_not_found"), ProviderError),
        (404, {"error": 'model "x" not found, try pulling it first'}, ProviderError),
        (404, {"detail": "Not Found"}, ProviderError),
        (405, {"detail": "Method Not Allowed"}, ProviderError),
        (301, b"", ProviderError),
        (500, openai("The server had an error while processing your request", None, "server_error"), Unavailable),
        (502, b"<html>Bad Gateway</html>", Unavailable),
        (503, {"message": "no healthy upstream"}, Unavailable),
        (529, b"", Unavailable),
        (424, tei("Backend error", "Backend"), ProviderError),
        (408, b"", Unavailable),
        (409, b"", Unavailable),
    ],
)
def test_what_servers_say_is_understood(status, body, expected):
    """By status, code and words, whatever the server."""
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    assert type(refusal(status, httpx.Headers(), raw, [TEXT])) is expected


@pytest.mark.parametrize(
    ("body", "of"),
    [
        (openai("Requested 300001 tokens, max 300000 tokens per request", "max_tokens_per_request"), "tokens"),
        (openai(TOO_LARGE_FOR_TPM), "tokens"),
        (openai("Invalid 'input': array too long.", "array_above_max_length"), "inputs"),
        (tei("batch size 64 > maximum allowed batch size 32"), "inputs"),
        ({"message": "invalid request: total number of texts must be at most 96 - received 97"}, "inputs"),
        (
            gemini("* BatchEmbedContentsRequest.requests: at most 100 requests can be in one batch\n", 400, "X"),
            "inputs",
        ),
        (MISTRAL, "tokens"),
        (MISTRAL | {"message": "Too many inputs in request, split into more batches."}, "inputs"),
        ({"detail": VOYAGE}, "tokens"),
        ({"detail": "The batch size limit is 1000. Your batch size is 2048."}, "inputs"),
    ],
)
def test_what_a_request_has_too_many_of_is_understood(body, of):
    """Fewer texts do not help where tokens are too many, and the other way round."""
    error = refusal(400, httpx.Headers(), orjson.dumps(body), [TEXT])
    assert isinstance(error, RequestTooLarge)
    assert error.of == of


@pytest.mark.parametrize(
    ("body", "texts", "expected"),
    [
        (b"<html><h1>413 Request Entity Too Large</h1></html>", [TEXT, "other"], RequestTooLarge),
        (b"<html><h1>413 Request Entity Too Large</h1></html>", [TEXT], InputTooLong),
        (b'{"error": "`inputs` must have less than 512 tokens. Given: 600"}', [TEXT, "other"], InputTooLong),
    ],
)
def test_a_request_of_too_many_bytes_is_not_one_text_s_fault(body, texts, expected):
    """What stands before a server has no other words for it; the server itself says what it means."""
    assert type(refusal(413, httpx.Headers(), body, texts)) is expected


@pytest.mark.parametrize(
    ("body", "share"),
    [
        (openai(CONTEXT), 8192 / 9000),
        (vllm("This model's maximum context length is 512 tokens. However, you requested 600 tokens in"), 512 / 600),
        (
            vllm("This model's maximum context length is 512 tokens. However, your request has 600 input tokens"),
            512 / 600,
        ),
        (tei("Input validation error: `inputs` must have less than 512 tokens. Given: 600"), 512 / 600),
        (llama(LLAMA_CONTEXT, 400, "exceed_context_size_error"), 8192 / 9412),
        (llama(LLAMA_BATCH, 400, "server_error"), 512 / 992),
        (llama("input is too large to process. increase the physical batch size", 400, "x"), None),
        ({"error": "the input length exceeds the context length"}, None),
        (openai("This model's maximum context length is 512 tokens, however you requested 12"), None),
        (openai("This model's maximum context length is 0 tokens, however you requested 0"), None),
    ],
)
def test_how_much_of_a_text_is_taken_is_understood(body, share):
    """Where the server says how many tokens there are, and may be; and that makes sense."""
    error = refusal(400, httpx.Headers(), orjson.dumps(body), [TEXT])
    assert isinstance(error, InputTooLong)
    assert error.share == share


@pytest.mark.parametrize(
    ("message", "of", "limit", "wait_s"),
    [
        (ON_TPM, "tokens", 1_000_000, 0.6),
        (
            "Rate limit reached for x on requests per min (RPM): Limit 3, Used 3. Please try again in 20s.",
            "requests",
            3,
            20,
        ),
        ("Rate limit reached for x on requests per day (RPD): Limit 200. Please try again in 7m12s.", "", None, 432),
        (AZURE, "", None, 7),
        (PER_MINUTE, "", None, 11.665902715),
        (TRIAL, "", None, None),
    ],
)
def test_a_rate_limit_tells_what_was_short(message, of, limit, wait_s):
    """Where it does: a limit per day is none per minute."""
    error = refusal(429, httpx.Headers(), orjson.dumps(openai(message)), [TEXT])
    assert isinstance(error, RateLimited)
    assert (error.of, error.limit, error.wait_s) == (of, limit, wait_s)


# Waits


@pytest.mark.parametrize(
    ("headers", "message", "wait_s"),
    [
        ({}, "", None),
        ({"Retry-After-Ms": "1500"}, "", 1.5),
        ({"Retry-After": "2"}, "", 2),
        ({"retry-after": "2.5"}, "", 2.5),
        ({"retry-after": "-1"}, "", 0),
        ({"retry-after-ms": "250", "retry-after": "1"}, "try again in 9s", 0.25),
        ({"retry-after-ms": "soon", "retry-after": "3"}, "", 3),
        ({"retry-after": "nan"}, "", None),
        ({"retry-after": "inf"}, "try again in 9s", 9),
        ({"retry-after": "later"}, "", None),
        ({"retry-after": "later"}, "Please try again in 4s.", 4),
        ({"retry-after": ""}, "", None),
        ({}, "Please try again in 1.5s.", 1.5),
        ({}, "Please try again in 6m0s.", 360),
        ({}, "try again in 120ms", 0.12),
        ({}, "Please retry after 7 seconds.", 7),
        ({}, "Please retry after 1 second. Thank you", 1),
        ({}, "Try again in 2 minutes", 120),
        ({}, "Retry in 10 milliseconds", 0.01),
        ({}, "try again in a while", None),
        ({}, "Please try again in 5 elephants", None),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1m1s"}, "", 61),
        ({"x-ratelimit-remaining-tokens": "5", "x-ratelimit-reset-tokens": "1m1s"}, "", None),
        (
            {
                "x-ratelimit-remaining-tokens": "0",
                "x-ratelimit-reset-tokens": "2s",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "8.64s",
            },
            "",
            8.64,
        ),
    ],
)
def test_waits_are_read_in_all_of_their_forms(headers, message, wait_s):
    """The most exact of them wins, and nonsense is none."""
    assert wait_of(httpx.Headers(headers), message) == wait_s


@pytest.mark.parametrize(("seconds", "low", "high"), [(100, 98, 100), (-100, 0, 0)])
def test_a_wait_until_a_date_ends_then(seconds, low, high):
    """One that is past is none."""
    date = format_datetime(datetime.fromtimestamp(int(time.time()) + seconds, UTC), usegmt=True)
    assert low <= wait_of(httpx.Headers({"retry-after": date})) <= high


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        ("6m0s", 360),
        ("1.5s", 1.5),
        ("120ms", 0.12),
        ("1h2m3s", 3723),
        ("0s", 0),
        ("59.999s", 59.999),
        ("17ms", 0.017),
        ("", None),
        ("5", None),
        ("s", None),
        ("5 s", None),
        ("1.5sec", None),
        ("-1s", None),
        ("soon", None),
    ],
)
def test_durations_of_go_are_read(duration, seconds):
    """And what is none is not half read."""
    found = seconds_of(duration)
    assert found == (None if seconds is None else pytest.approx(seconds))


# Limits


@pytest.mark.parametrize(
    ("of_requests", "of_tokens", "limits"),
    [
        (("3000", "2999", "20ms"), ("1000000", "999000", "60ms"), Limits(3000, 1_000_000)),
        (("3000", None, None), None, Limits(3000)),
        (None, ("1000000", None, None), Limits(None, 1_000_000)),
        (("100", "99", "14m24s"), ("40000", "39000", "1.5s"), Limits(None, 40_000)),
        (("10000", "9999", "8.64s"), None, None),
        (("60", "30", "30s"), None, Limits(60)),
        (("60", "60", "0s"), None, Limits(60)),
        (("0", "0", "0s"), None, None),
        (("many", "few", "soon"), None, None),
        (None, None, None),
    ],
)
def test_limits_per_minute_are_told_from_those_per_day(of_requests, of_tokens, limits):
    """By how long what was used takes to come back."""
    headers = httpx.Headers()
    for name, values in (("Requests", of_requests), ("Tokens", of_tokens)):
        for word, value in zip(("Limit", "Remaining", "Reset"), values or (), strict=False):
            if value is not None:
                headers[f"X-RateLimit-{word}-{name}"] = value
    assert limits_of(headers) == limits


# Nothing that is not ours


KEY = "sk-canary-5Zq81LwX0vBn27TdRk93"


@pytest.mark.parametrize(
    ("message", "texts", "expected"),
    [
        ("The server said no", [TEXT], "The server said no"),
        (f"Bad input: {TEXT}!", [TEXT], "Bad input: …!"),
        (f"Bad input: {TEXT[5:30]}…", ["other", TEXT], "Bad input: ……"),
        ("bad word 'ship'", ["ship"], "bad word '…'"),
        ("a text is too long", ["a"], "a text is too long"),
        ("two\n lines\t here", [TEXT], "two lines here"),
        (f"key {KEY} is wrong", [TEXT], "key … is wrong"),
        ("key sk-proj-aBcDeF1234567890 is wrong", [TEXT], "key … is wrong"),
        ("Incorrect API key provided: sk-a***wxyz.", [TEXT], "Incorrect API key provided: …"),
        ("token 0123456789abcdef0123456789abcdef", [TEXT], "token …"),
        ("", [TEXT], ""),
        ("no texts", [], "no texts"),
    ],
)
def test_words_are_passed_on_without_texts_and_keys(message, texts, expected):
    """What a person needs is left."""
    assert scrubbed(message, texts, [KEY]) == expected


def test_secrets_go_whatever_they_look_like():
    """A key of a server of one's own may be a word."""
    assert scrubbed("password swordfish is wrong", [], ["swordfish", ""]) == "password … is wrong"


def test_words_are_not_too_long():
    """A server may send a page."""
    assert len(scrubbed("word " * 5000, [TEXT])) <= MAX_WORDS + 1


@given(st.text("abcdef ", min_size=12, max_size=60), st.text("abcdef ", max_size=60), st.text("abcdef ", max_size=60))
def test_twelve_characters_of_a_text_are_never_passed_on(text, before, after):
    """Wherever they stand: that is enough to know it by."""
    said = scrubbed(f"{before}{text}{after}", [text])
    whole = " ".join(text.split())
    assert len(whole) < 12 or whole not in said


@pytest.mark.parametrize("status", [400, 413, 422, 429, 500, 404, 418])
@pytest.mark.parametrize(
    "body",
    [
        openai(f"cannot embed {TEXT!r}"),
        tei(f"cannot embed {TEXT!r}"),
        vllm(f"cannot embed {TEXT!r}"),
        pydantic("not a string"),
        {"message": f"cannot embed {TEXT}"},
        {"detail": f"cannot embed {TEXT}"},
        {"detail": {"input": TEXT}},
        {"error": {"message": {"input": TEXT}}},
        [TEXT],
        TEXT,
    ],
)
def test_no_error_quotes_a_text(status, body):
    """In whichever form the server does."""
    error = refusal(status, httpx.Headers(), orjson.dumps(body), ["other", TEXT], [KEY])
    assert "4929" not in error.message


@pytest.mark.parametrize(
    "text",
    [
        "Пациент Иванов, диагноз: рак лёгких, тел. 555-01-99",
        "John Q\nSSN 123-45-67\nHIV+ 2024\nMRN 998877",
        "Al\nHIV+",
        "李小龙",
        '😀 it\'s "me"',
        "print('\\n'), as in C:\\new\\u0041",
    ],
)
@pytest.mark.parametrize(
    "written",
    [str, repr, ascii, json.dumps, lambda text: json.dumps(json.dumps(text)), lambda text: repr([repr(text)])],
)
def test_no_error_quotes_a_text_that_was_escaped(text, written):
    """As JSON or as Python writes it, once or twice: of the quotation only its marks are left."""
    body = openai(f"invalid body: {written(text)} of request")
    error = refusal(400, httpx.Headers(), orjson.dumps(body), ["other", text], [KEY])
    assert re.fullmatch(r"the provider refuses it \(HTTP 400\): invalid body: \W*…\W* of request", error.message)


@given(st.text(max_size=40), st.lists(st.sampled_from([repr, ascii, json.dumps]), max_size=3))
def test_twelve_characters_of_an_escaped_text_are_never_passed_on(text, writers):
    """Whatever the text, and however it is written."""
    text, quoted = f"Ms Feather's {text} 4929-1234", f"Ms Feather's {text} 4929-1234"
    for write in writers:
        quoted = write(quoted)
    said = scrubbed(quoted, [text])
    assert "Feather" not in said
    assert "4929" not in said


def test_what_a_text_says_does_not_end_the_job():
    """It is quoted by a server that refuses it, and happens to be about quotas."""
    text = "Error: insufficient_quota, you exceeded your current quota"
    error = refusal(400, httpx.Headers(), orjson.dumps(openai(f"invalid input: {text}")), [text])
    assert type(error) is InputRejected


@given(st.binary(max_size=200), st.sampled_from([400, 401, 404, 413, 422, 429, 500]))
def test_no_body_is_too_odd(body, status):
    """Whatever comes, it is a refusal."""
    assert isinstance(refusal(status, httpx.Headers(), body, [TEXT]), ProviderError)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["error", "message", "detail", "code", "type", "msg"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(JSON, st.sampled_from([400, 422, 429, 500]))
def test_no_json_is_too_odd(body, status):
    """Fields of any type, or none."""
    assert isinstance(refusal(status, httpx.Headers(), orjson.dumps(body), [TEXT]), ProviderError)
