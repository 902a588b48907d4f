"""Errors: each is the provider's, the request's or a text's, and what is no text's fault never rejects one."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import time
import traceback
from datetime import UTC, datetime
from email.utils import format_datetime

import numpy as np
import pytest

import engine
from engine.errors import (
    AuthenticationFailed,
    EngineError,
    InputRejected,
    ProviderError,
    QuotaExhausted,
    Stopped,
)
from engine.models.base import PROBE
from tests.api_servers import DIMENSION, EXACT, KEY, OWN, assert_right, numbered
from tests.builders import free_port
from tests.strict_server import ROOT, vector

pytest_plugins = ("tests.api_servers",)

TEXTS = numbered(40)
ODD = 17
"""The text that faults are aimed at."""
BAD_MANNERS = {"retry_after_ignored", "retry_storm", "retried_non_retryable"}


def status(number: int, times: int = 1, **more) -> dict:
    """A fault: an answer with a status."""
    return {"kind": "status", "status": number, "times": times, **more}


# Asked to wait


@pytest.mark.parametrize(
    ("fault", "wait_s"),
    [
        ({"headers": {"retry-after-ms": "600"}}, 0.6),
        ({"headers": {"retry-after-ms": "600", "retry-after": "30"}}, 0.6),
        ({"headers": {"retry-after": "1"}}, 1.0),
        ({"headers": {"retry-after": "0.7"}}, 0.7),
        ({"message": "Rate limit reached for x on requests per min (RPM): Limit 3. Please try again in 1.2s."}, 1.2),
        ({"message": "Please try again in 700ms. Visit https://example.org to learn more."}, 0.7),
        ({"message": "Slow down. Please retry after 1 second."}, 1.0),
        ({"headers": {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "800ms"}}, 0.8),
    ],
)
def test_a_rate_limit_is_waited_out(server, connect, fault, wait_s):
    """For at least so long as the server says, in whatever form."""
    server.behave(faults=[status(429, **fault)])
    client = connect()
    answer = client.rows(TEXTS)
    assert_right(answer, TEXTS)
    refused, passed = client.books.sent
    assert passed.began - refused.ended >= wait_s
    assert (answer.num_requests, answer.num_refusals, answer.num_retries) == (2, 1, 0)


def test_a_rate_limit_until_a_date_is_waited_out(server, connect):
    """HTTP has no fractions of seconds."""
    until = int(time.time() + 0.3) + 1
    date = format_datetime(datetime.fromtimestamp(until, UTC), usegmt=True)
    server.behave(faults=[status(429, headers={"retry-after": date})])
    client = connect()
    offset = time.time() - time.monotonic()
    assert_right(client.rows(TEXTS), TEXTS)
    assert client.books.sent[1].began + offset >= until - 0.01


def test_one_refusal_pauses_all_requests(server, connect):
    """Those that are behind it would be refused too."""
    server.behave(faults=[status(429, headers={"retry-after-ms": "700"}, containing=TEXTS[5])])
    client = connect(model_batch_size=1, requests_per_minute=1200)
    assert_right(client.rows(TEXTS[:15]), TEXTS[:15])
    refused = next(sent for sent in client.books.sent if sent.error)
    behind = [sent.began for sent in client.books.sent if sent.began >= refused.ended]
    assert len(behind) >= 8
    assert min(behind) - refused.ended >= 0.7


def test_rate_limits_for_ever_end_the_run_and_reject_nobody(server, connect):
    """After the time for which nothing was answered."""
    server.behave(faults=[status(429, -1, headers={"retry-after-ms": "50"})])
    with pytest.raises(ProviderError, match=r"answered nothing for 0\.5 s"):
        connect(give_up_s=0.5).rows(TEXTS)


# At once


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (status(429, -1, code="insufficient_quota", message="You exceeded your current quota."), QuotaExhausted),
        (status(429, -1, type="insufficient_quota"), QuotaExhausted),
        (status(402, -1), QuotaExhausted),
        (status(401, -1, code="invalid_api_key"), AuthenticationFailed),
        (status(403, -1), AuthenticationFailed),
        (status(404, -1, message="The model `x` does not exist"), ProviderError),
        (status(405, -1), ProviderError),
    ],
)
def test_what_no_wait_mends_ends_the_run_at_once(server, connect, fault, error):
    """One request has shown it."""
    server.behave(faults=[fault])
    client = connect()
    with pytest.raises(error) as caught:
        client.rows(TEXTS)
    assert caught.type is error
    assert (len(client.books.sent), server.stats()["num_requests"]) == (1, 1)


def test_what_ends_the_run_ends_all_calls(server, connect):
    """Those that wait are told why."""
    server.behave(faults=[status(401, -1, containing=TEXTS[0])], latency_s=0.1)
    client = connect(n_concurrent_jobs=1, model_batch_size=40)
    answers = client.at_once(TEXTS, numbered(40, "more"), numbered(40, "most"))
    assert isinstance(answers[0], AuthenticationFailed)
    assert all(isinstance(answer, Stopped) for answer in answers[1:])
    assert all("does not accept the key" in answer.message for answer in answers[1:])
    assert len(client.books.sent) == 1


def test_a_model_that_is_kept_asks_again_after_what_ended_a_call(server, connect):
    """In a notebook quota is added, and the same model called again; a trouble that was given up does not count for the next call."""
    client = connect(give_up_s=0.3)
    for fault, error in (
        (status(429, code="insufficient_quota"), QuotaExhausted),
        (status(429, -1, headers={"retry-after-ms": "50"}), ProviderError),
    ):
        server.behave(faults=[fault])
        with pytest.raises(error):
            client.rows(TEXTS)
        server.behave(faults=[status(429, headers={"retry-after-ms": "50"})])
        assert_right(client.rows(TEXTS), TEXTS)


def test_embed_goes_by_the_key_that_there_is_after_an_error(server, key, monkeypatch):
    """A notebook lives on: what is put right in it counts for the next call, with the same options."""
    options = {"model": f"openai:{EXACT}", "base_url": server.url}
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a-wrong-one")
    server.behave(key=key)
    with pytest.raises(AuthenticationFailed):
        engine.embed(TEXTS, **options)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    np.testing.assert_allclose(engine.embed(TEXTS, **options), [vector(text, DIMENSION) for text in TEXTS], atol=1e-6)


def test_a_key_that_the_server_does_not_know_ends_the_run(server, connect):
    """As OpenAI says it."""
    server.behave(key="sk-another")
    with pytest.raises(AuthenticationFailed, match="HTTP 401"):
        connect().rows(TEXTS)


# Too large


def test_a_request_with_too_many_tokens_is_cut_in_two(server, connect):
    """The client does not know this model's limits; it learns them, and does not run into them again."""
    texts = [f"{number} " + "word " * 3000 for number in range(120)]
    client = connect(OWN)
    answer = client.rows(texts)
    assert_right(answer, texts)
    assert client.books.errors == ["RequestTooLarge"]
    others = [f"more {text}" for text in texts]
    assert_right(client.rows(others), others)
    assert client.books.errors == ["RequestTooLarge"]
    assert server.texts(texts) == [1] * 120


@pytest.mark.parametrize("compat", [None, "tei"])
def test_a_request_with_too_many_texts_is_cut_in_two(server, connect, compat):
    """In OpenAI's words and in those of TEI."""
    server.behave(max_inputs=32, compat=compat)
    texts = numbered(100)
    client = connect(OWN)
    assert_right(client.rows(texts), texts)
    refused = client.books.errors
    assert set(refused) == {"RequestTooLarge"}
    assert_right(client.rows(numbered(100, "more")), numbered(100, "more"))
    assert client.books.errors == refused, "it does not run into it again"


# One text


@pytest.mark.parametrize("code", [400, 422, 498])
def test_a_text_that_is_refused_is_found_by_halving(server, connect, code):
    """It alone is rejected, with the server's words, and the others are paid for once."""
    texts = numbered(512)
    server.behave(faults=[status(code, -1, containing=texts[300], message="This input is unsafe, it seems.")])
    client = connect()
    answer = client.rows(texts)
    assert answer.rejects == {300: f"the provider refuses it (HTTP {code}): This input is unsafe, it seems."}
    assert_right(answer, texts)
    assert len(client.books.sent) <= 2 * 9 + 3
    assert server.texts(texts) == [number != 300 for number in range(512)]


def test_several_texts_that_are_refused_are_all_found(server, connect):
    """Next to each other, at the ends, and in several calls at once."""
    bad = [0, 1, 20, 39]
    server.behave(faults=[status(400, -1, containing=TEXTS[at]) for at in bad])
    others = numbered(30, "others")
    mine, theirs = connect().at_once(TEXTS, others)
    assert sorted(mine.rejects) == bad
    assert theirs.rejects == {}
    assert_right(mine, TEXTS)
    assert_right(theirs, others)


def test_embed_says_which_text_is_refused(server, connect):
    """It has no other way."""
    server.behave(faults=[status(400, -1, containing=TEXTS[ODD], message="No.")])
    with pytest.raises(InputRejected, match=rf"text {ODD} cannot be embedded: the provider refuses it"):
        asyncio.run(connect().model.embed(TEXTS))


@pytest.mark.parametrize("code", [400, 413, 418, 422, 498])
def test_a_server_that_refuses_everything_ends_the_run(server, connect, code):
    """Before thousands of texts are tried one by one."""
    server.behave(faults=[status(code, -1, message="input cannot be processed")])
    client = connect()
    with pytest.raises(ProviderError, match=r"fails on every text: .*input cannot be processed"):
        client.rows(numbered(1000))
    assert len(client.books.sent) == 2


@pytest.mark.parametrize("fault", [status(500, -1), {"kind": "reset", "times": -1}])
def test_a_text_on_which_the_server_fails_is_rejected_alone(server, connect, hasty, fault):
    """It breaks down whenever it sees it, and answers all others."""
    server.behave(faults=[{**fault, "containing": TEXTS[ODD]}])
    answer = connect().rows(TEXTS)
    assert list(answer.rejects) == [ODD]
    assert_right(answer, TEXTS)


def test_a_text_on_which_the_server_hangs_is_rejected_alone(server, connect, hasty):
    """Each time costs its time-out."""
    texts = TEXTS[:8]
    server.behave(faults=[{"kind": "hang", "times": -1, "containing": texts[3]}])
    answer = connect(request_timeout_s=0.2).rows(texts)
    assert answer.rejects == {3: "the provider did not answer within 0.2 s"}
    assert_right(answer, texts)


# For now


@pytest.mark.parametrize("code", [408, 409, 500, 502, 503, 504, 529])
def test_a_server_that_fails_for_now_is_asked_again(server, connect, hasty, code):
    """Three times, here."""
    server.behave(faults=[status(code, 3)])
    client = connect()
    answer = client.rows(TEXTS)
    assert answer.rejects == {}
    assert_right(answer, TEXTS)
    assert answer.num_refusals == 0
    assert server.texts(TEXTS) == [1] * 40


def test_a_server_that_fails_and_asks_to_wait_is_waited_for(server, connect, hasty):
    """It knows best."""
    server.behave(faults=[status(503, headers={"retry-after": "1"})])
    client = connect()
    assert_right(client.rows(TEXTS), TEXTS)
    assert client.books.sent[1].began - client.books.sent[0].ended >= 1


def test_waits_grow_with_each_failure(server, connect, monkeypatch):
    """By a random share, so that not all come back together."""
    monkeypatch.setattr("engine.models.api.recovery.BACKOFF_S", (0.05, 0.2))
    server.behave(faults=[status(500, -1)])
    client = connect(give_up_s=1.0)
    with pytest.raises(ProviderError):
        client.rows(TEXTS[:1])
    sent = [one for one in client.books.sent if one.texts == TEXTS[:1]]
    waits = [after.began - before.ended for before, after in itertools.pairwise(sent)]
    assert len(waits) >= 4
    assert all(wait >= least for wait, least in zip(waits, (0.025, 0.05, 0.1, 0.1), strict=False))


@pytest.mark.parametrize("times", [1, 3])
def test_a_connection_that_breaks_is_made_again(server, connect, hasty, times):
    """Whether before the answer or within it."""
    server.behave(faults=[{"kind": "reset", "times": times}, {"kind": "truncated", "times": times}])
    assert_right(connect().rows(TEXTS), TEXTS)


@pytest.mark.parametrize(
    "said",
    [
        "upstream connect error or disconnect\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc",
        f"HTTP/1.1 200 OK\r\nX-Long: {'a' * 20_000}\r\nContent-Length: 0\r\n\r\n",
    ],
    ids=["no status", "a chunk's size", "a long header"],
)
def test_an_answer_that_is_not_http_is_asked_for_again(server, connect, hasty, said):
    """As one that breaks off: what stands before a server says such things while it is restarted."""
    server.behave(faults=[{"kind": "raw", "said": said}])
    client = connect()
    assert_right(client.rows(TEXTS), TEXTS)
    assert client.books.errors == ["Unavailable"]


def test_a_hung_request_costs_its_time_out_and_nobody_else_anything(server, connect, hasty):
    """Others are answered meanwhile."""
    server.behave(faults=[{"kind": "hang", "containing": TEXTS[0]}])
    client = connect(request_timeout_s=0.6, model_batch_size=4)
    assert_right(client.rows(TEXTS), TEXTS)
    hung = next(sent for sent in client.books.sent if sent.texts[0] == TEXTS[0])
    others = [sent for sent in client.books.sent if TEXTS[0] not in sent.texts]
    assert len(others) == 9
    assert max(sent.ended for sent in others) < hung.ended
    assert hung.ended - hung.began >= 0.6 - 0.01


def test_an_answer_that_trickles_is_as_good_as_none(server, connect, hasty):
    """Bytes come all the time, so that only the time of the whole answer can tell."""
    server.behave(faults=[{"kind": "slow", "seconds": 30, "containing": TEXTS[0]}])
    client = connect(request_timeout_s=1.0)
    assert_right(client.rows(TEXTS), TEXTS)
    assert server.texts(TEXTS[:1]) == [2], "it was computed twice"
    assert len(client.books.sent) == 2


def test_a_slow_server_is_sent_less_at_once_until_it_answers_in_time(server, connect, hasty):
    """It computes also what was given up, so that full requests would never be in time; when it is quick again, they are full again."""
    server.behave(texts_per_s=400)
    client = connect(OWN, request_timeout_s=0.15, give_up_s=5.0, model_batch_size=64, n_concurrent_jobs=2)
    texts = numbered(128)
    answer = client.rows(texts)
    assert answer.rejects == {}
    assert_right(answer, texts)
    assert client.books.sizes[-1] < 64
    client.books.sent.clear()
    server.behave(texts_per_s=None)
    assert_right(client.rows(more := numbered(1280, "more")), more)
    assert max(client.books.sizes) == 64


def test_the_first_answer_tells_how_much_is_in_time(server, connect):
    """Eight full requests at once would take a second here; no time-out has to show it."""
    server.behave(texts_per_s=2000)
    client = connect(OWN, request_timeout_s=0.5, model_batch_size=256, requests_per_minute=None)
    texts = numbered(512)
    assert_right(client.rows(texts), texts)
    assert client.books.sizes[0] == 256
    assert max(client.books.sizes[1:]) < 64


def test_a_server_that_is_down_is_given_up_after_a_while(connect, hasty):
    """Nothing is rejected for it."""
    client = connect(base_url=f"http://127.0.0.1:{free_port()}/v1", give_up_s=0.5)
    with pytest.raises(ProviderError, match=r"answered nothing for 0\.5 s .*cannot be reached"):
        client.rows(TEXTS)
    assert client.books.sent[-1].began - client.books.sent[0].began >= 0.4


@pytest.mark.parametrize("code", [500, 503])
def test_a_server_that_fails_for_ever_is_given_up_after_a_while(server, connect, hasty, code):
    """Nothing is rejected for it."""
    server.behave(faults=[status(code, -1)])
    with pytest.raises(ProviderError, match=rf"answered nothing for 0\.5 s .*HTTP {code}"):
        connect(give_up_s=0.5).rows(TEXTS)


def test_a_server_that_comes_back_in_time_embeds_everything(connect, hasty):
    """It is started when the first request is sent."""
    port = free_port()
    client = connect(base_url=f"http://127.0.0.1:{port}/v1", give_up_s=60)
    command = [sys.executable, "-m", "tests.strict_server", "--port", str(port), "--dimension", str(DIMENSION)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        answer = client.rows(TEXTS)
    finally:
        process.terminate()
        process.wait(20)
    assert answer.rejects == {}
    assert_right(answer, TEXTS)
    assert client.books.errors[0] == "Unavailable"


# Nobody is blamed for what may pass


@pytest.mark.parametrize("of_text", [status(500, -1), status(400, -1), {"kind": "short", "times": -1}])
@pytest.mark.parametrize("of_all", [status(503, -1), {"kind": "reset", "times": -1}])
def test_no_text_is_rejected_while_nobody_is_answered(server, connect, hasty, of_text, of_all):
    """Of a server that went down after a good answer to others, nothing is known but that."""
    faults = [{**of_text, "containing": TEXTS[ODD]}, {**of_all, "containing": PROBE}]
    server.behave(faults=faults)
    client = connect(give_up_s=0.5, model_batch_size=1)
    with pytest.raises(ProviderError, match="answered nothing for"):
        client.rows(TEXTS[ODD : ODD + 1])


def test_no_text_is_rejected_for_an_outage_after_others_passed(server, connect, hasty):
    """Those that were on their way when it began were the first to fail, and others passed after that."""
    late = [{**status(503, -1), "containing": part} for part in (TEXTS[0], PROBE)]
    server.behave(faults=late)
    client = connect(give_up_s=1.0, model_batch_size=20)
    with pytest.raises(ProviderError, match="answered nothing for"):
        client.rows(TEXTS)
    smallest = min(len(sent.texts) for sent in client.books.sent if sent.texts != [PROBE])
    assert smallest == 20, "and none was tried in halves, which would only be more requests"


def test_no_text_is_rejected_while_most_requests_fail(server, connect, monkeypatch):
    """Four in five, whatever is in them, as behind a balancer with dead servers; nor are requests cut for it again and again."""
    monkeypatch.setattr("engine.models.api.recovery.BACKOFF_S", (0.005, 0.02))
    server.behave(faults=[status(503, -1, share=0.8)])
    client = connect(model_batch_size=16)
    texts = numbered(20 * 16)
    answer = client.rows(texts)
    assert answer.rejects == {}
    assert_right(answer, texts)
    assert sum(sent.texts != [PROBE] for sent in client.books.sent) <= 250, "100 would be so on average"


def test_no_text_is_rejected_when_the_run_is_ending(server, connect):
    """The sentence that would have told whether it is the text's fault was refused for a reason of its own."""
    server.behave(faults=[status(400, -1, containing=TEXTS[0]), status(401, -1, containing=PROBE)])
    with pytest.raises(AuthenticationFailed):
        connect().rows(TEXTS[:1])


def test_no_text_is_rejected_after_the_budget_was_stopped(server, connect):
    """Whoever stopped it: the text is left for the next run."""
    server.behave(faults=[status(400, -1, containing=TEXTS[0])], latency_s=0.3)
    client = connect()

    async def stopped_meanwhile():
        call = asyncio.create_task(client.model.embed_rows(TEXTS[:1]))
        await asyncio.sleep(0.15)
        await client.model._budget.stop(QuotaExhausted("the quota is used up"))
        return await call

    with pytest.raises(Stopped, match="the quota is used up"):
        asyncio.run(stopped_meanwhile())


# A server that grades


@pytest.fixture
def graded(llmock, connect, hasty):
    """A client of llmock's."""
    return connect(base_url=llmock.url, give_up_s=30)


@pytest.mark.parametrize(
    ("faults", "refused"),
    [
        ([{"status": 429, "retry_after": 0.6, "times": 2}], [429] * 2),
        ([{"status": 429, "times": 1}], [429]),
        ([{"status": 500, "times": 4}], [500] * 4),
        ([{"status": 503, "retry_after": 0.5, "times": 2}], [503] * 2),
        ([{"status": 502, "times": 1}, {"status": 529, "retry_after": 0.2, "times": 1}], [502, 529]),
        ([{"status": 400, "times": 1}], [400]),
    ],
)
def test_llmock_finds_nothing_wrong_with_how_faults_are_met(llmock, graded, faults, refused):
    """And each text has the vector that it has without them."""
    expected = graded.rows(TEXTS).vectors
    llmock.call("reset", {})
    for fault in faults:
        llmock.fail(**fault)
    answer = graded.rows(TEXTS)
    assert answer.rejects == {}
    np.testing.assert_array_equal(answer.vectors, expected)
    assert [code for code in llmock.statuses() if code >= 400] == refused
    assert not llmock.findings() & BAD_MANNERS


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"status": 401}, AuthenticationFailed),
        ({"status": 403}, AuthenticationFailed),
        ({"status": 404}, ProviderError),
        ({"status": 429, "code": "insufficient_quota"}, QuotaExhausted),
    ],
)
def test_llmock_finds_nothing_wrong_with_how_the_end_is_met(llmock, graded, fault, error):
    """Many requests are on their way: none of them is sent again."""
    llmock.fail(**fault, times=None)
    answers = graded.at_once(*(numbered(2000, f"call {number}") for number in range(6)))
    assert isinstance(answers[0], error)
    assert all(isinstance(answer, (error, Stopped)) for answer in answers)
    assert not llmock.findings() & BAD_MANNERS


def test_llmock_finds_nothing_wrong_with_how_a_refusal_of_all_is_met(llmock, graded):
    """Many requests fail at once, and one sentence for all of them shows that it is not their texts."""
    llmock.fail(status=400, times=None)
    answers = graded.at_once(*(numbered(2000, f"call {number}") for number in range(6)))
    assert all(isinstance(answer, ProviderError) for answer in answers)
    assert not llmock.findings() & BAD_MANNERS


# No text and no key


SECRET = "Ms Featherstonehaugh's account is 4929-1234"


def told(error: BaseException) -> str:
    """Everything that an error, and those that it came from, would say to whoever logs it."""
    found, errors, seen = [], [error], set()
    while errors:
        one = errors.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        found += [str(one), repr(one), repr(one.args), "".join(traceback.format_exception(one))]
        errors += [other for other in (one.__cause__, one.__context__) if other is not None]
    return "\n".join(found)


QUOTING = f"bad input {SECRET!r} of key {KEY}"


@pytest.mark.parametrize(
    "fault",
    [
        status(400, -1, message=QUOTING),
        status(401, -1, message=QUOTING),
        status(404, -1, message=QUOTING),
        status(413, -1, message=QUOTING),
        status(418, -1, message=QUOTING),
        status(429, -1, message=QUOTING, headers={"retry-after-ms": "100"}),
        status(429, -1, message=QUOTING, code="insufficient_quota"),
        status(503, -1, message=QUOTING),
        {"kind": "html", "times": -1},
        {"kind": "reset", "times": -1},
        {"kind": "hang", "times": -1},
        {"kind": "raw", "said": f"{SECRET} {KEY}\r\n\r\n", "times": -1},
        {"kind": "short", "times": -1},
    ],
)
@pytest.mark.parametrize("provider", ["connect", "cohere"])
def test_no_error_tells_a_text_or_a_key(server, hasty, request, provider, fault):
    """Nor does what it was raised from, which a traceback may show."""
    server.behave(faults=[fault])
    client = request.getfixturevalue(provider)(give_up_s=0.3, request_timeout_s=0.2)
    with pytest.raises(EngineError) as caught:
        client.rows([SECRET, "another"])
    assert KEY not in told(caught.value)
    assert "Featherstonehaugh" not in told(caught.value)


@pytest.mark.parametrize("provider", ["connect", "cohere"])
def test_no_reason_tells_the_text_or_the_key(server, request, provider):
    """It keeps the server's words otherwise."""
    server.behave(faults=[status(400, -1, message=QUOTING, containing=SECRET)])
    answer = request.getfixturevalue(provider)().rows(["one", SECRET, "another"])
    assert list(answer.rejects) == [1]
    assert "bad input" in answer.rejects[1]
    assert KEY not in answer.rejects[1]
    assert "Featherstonehaugh" not in answer.rejects[1]


def test_no_log_tells_a_text_or_a_key(server, connect, hasty, caplog):
    """Not even at the level at which libraries show headers and bodies."""
    caplog.set_level("DEBUG")
    server.behave(faults=[status(500, 1), status(429, 1, message=QUOTING), status(400, 1, message=QUOTING)])
    connect().rows([SECRET, "another"])
    assert KEY not in caplog.text
    assert "Featherstonehaugh" not in caplog.text
