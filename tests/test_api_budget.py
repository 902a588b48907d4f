"""The budget: never over a limit in any window, first come first served, one pause for all. Minutes pass in no time here."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import AuthenticationFailed, QuotaExhausted, RateLimited, Stopped
from engine.models.api.budget import MAX_PAUSE_S, PROBE_S, PROBE_TOKENS, Budget
from engine.models.api.limits import Limits
from engine.models.api.port import Grant, Report
from engine.models.api.rate import BURST_S, PACE, SLOWER, Rate
from tests.api_servers import DIMENSION, assert_right, numbered

pytest_plugins = ("tests.api_servers",)

ANSWERED = Report(is_answer=True)


class Clock(asyncio.SelectorEventLoop):
    """A loop on which nobody really waits: when nothing is ready, it is later at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def time(self) -> float:
        """Return the time that it is here."""
        return self.now

    def monotonic(self) -> float:
        """Return the same, for modules that ask `time`."""
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            due = [handle.when() for handle in self._scheduled if not handle.cancelled()]
            self.now = max(self.now + 1e-6, min(due, default=self.now))  # time passes, or what rounds never ends
        super()._run_once()


@contextmanager
def virtual() -> Iterator[Clock]:
    """Let budgets go by a clock of ours."""
    clock = Clock()
    with patch("engine.models.api.rate.time", clock), patch("engine.models.api.budget.time", clock):
        yield clock
    clock.close()


@pytest.fixture
def clock() -> Iterator[Clock]:
    """A clock that budgets go by."""
    with virtual() as clock:
        yield clock


async def spend(
    budget: Budget, amounts: Iterator[float], until: float, report: Callable[[float], Report] | None = None
) -> list[tuple[float, float]]:
    """Ask for one amount after the other, until a time; return when each was granted."""
    loop, granted = asyncio.get_running_loop(), []
    while loop.time() < until:
        amount = next(amounts)
        grant = await budget.acquire(amount)
        granted.append((loop.time(), amount))
        await budget.report(grant, report(amount) if report else ANSWERED)
    return granted


def most(granted: list[tuple[float, float]], window_s: float) -> float:
    """Return the largest sum of amounts in any window."""
    found, start, total = 0.0, 0, 0.0
    for at, amount in granted:
        total += amount
        while granted[start][0] <= at - window_s:
            total -= granted[start][1]
            start += 1
        found = max(found, total)
    return found


def one_each(granted: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Count requests in place of tokens."""
    return [(at, 1) for at, _ in granted]


# Never more


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([30, 60, 500, 6000]),
    st.sampled_from([6_000, 60_000, 1_000_000]),
    st.lists(st.floats(0.0001, 0.2), min_size=1, max_size=30),
    st.floats(0, 130),
)
def test_no_window_of_a_minute_holds_more_than_the_limits(requests, tokens, shares, idle_s):
    """Requests of all sizes, without and after a time in which nothing was asked for; the first minute is one like any other."""
    with virtual() as clock:
        budget = Budget(Limits(requests, tokens))
        amounts = itertools.cycle([max(share * tokens, 1) for share in shares])
        first = clock.run_until_complete(spend(budget, amounts, clock.now + 70))
        clock.now += idle_s
        granted = first + clock.run_until_complete(spend(budget, amounts, clock.now + 70))
    assert most(one_each(granted), 60) <= requests
    assert most(granted, 60) <= tokens * (1 + 1e-6)


@pytest.mark.parametrize("requests", [30, 60, 600, 6000])
def test_no_second_holds_more_requests_than_its_share(clock, requests):
    """But for a burst of a fifth of a second's, or one request."""
    granted = clock.run_until_complete(spend(Budget(Limits(requests)), itertools.repeat(1), clock.now + 130))
    assert most(granted, 1) <= requests / 60 * (1 + BURST_S) + 1


@pytest.mark.parametrize("tokens", [6_000, 600_000])
def test_no_second_holds_more_tokens_than_its_share(clock, tokens):
    """But for a burst, and for the one request that was waited for before it."""
    amounts = itertools.cycle([tokens / 600, tokens / 60, tokens / 6000])
    granted = clock.run_until_complete(spend(Budget(Limits(None, tokens)), amounts, clock.now + 130))
    assert most(granted, 1) <= tokens / 60 * (1 + BURST_S) + tokens / 60


@pytest.mark.parametrize(
    ("limits", "amount"), [(Limits(600, None), 1), (Limits(None, 60_000), 500), (Limits(None, 60_000), 2000)]
)
def test_what_is_allowed_is_used(clock, limits, amount):
    """Whoever keeps under a limit by asking for little is not what is wanted."""
    granted = clock.run_until_complete(spend(Budget(limits), itertools.repeat(amount), clock.now + 600))
    used = sum(spent for _, spent in granted)
    assert used / 10 >= 0.95 * (limits.tokens or limits.requests)


def test_an_amount_of_more_than_a_minute_s_goes_alone(clock):
    """It has to go some time, and then nothing else for as long as it takes."""
    budget = Budget(Limits(None, 1000))
    amounts = iter([10, 10, 5000, 10, 10])
    granted = clock.run_until_complete(asyncio.wait_for(spend(budget, amounts, clock.now + 400), 4000))
    times = [at for at, _ in granted]
    assert times[2] - times[1] >= 60
    assert times[3] - times[2] >= 60


def test_a_share_is_kept(clock):
    """Of a job with several budgets, each has its part."""
    granted = clock.run_until_complete(spend(Budget(Limits(600), share=0.25), itertools.repeat(1), clock.now + 130))
    assert 0.95 * 150 <= most(granted, 60) <= 150


def test_without_limits_nobody_waits(clock):
    """A server of one's own has none."""
    budget = Budget()

    async def many() -> None:
        await budget.report(await budget.acquire(10), ANSWERED)
        for _ in range(1000):
            await budget.acquire(10_000)

    clock.run_until_complete(many())
    assert clock.now < 1001


# In turn


def test_first_come_first_served(clock):
    """A large request behind small ones has its turn, and those behind it do not overtake."""
    budget, order = Budget(Limits(None, 60_000)), []

    async def ask(number: int, amount: float) -> None:
        await budget.acquire(amount)
        order.append(number)

    async def all_at_once() -> None:
        amounts = [100, 200, 30_000, 1, 1, 5000, 1, 20_000, 1]
        await asyncio.gather(*(ask(number, amount) for number, amount in enumerate(amounts)))

    clock.run_until_complete(all_at_once())
    assert order == list(range(9))


def test_whoever_gives_up_waiting_is_in_nobody_s_way(clock):
    """A call that was cancelled leaves its place."""
    budget = Budget(Limits(60))

    async def one_of_them_leaves() -> None:
        tasks = [asyncio.create_task(budget.acquire(1)) for _ in range(5)]
        await asyncio.sleep(0.5)
        tasks[1].cancel()
        tasks[2].cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(answer, Grant) for answer in answers) == 3

    clock.run_until_complete(asyncio.wait_for(one_of_them_leaves(), 20))


# What was really spent


def used(share: float) -> Callable[[float], Report]:
    """Report that a share of what was asked for was used."""
    return lambda amount: Report(int(amount * share), is_answer=True)


def test_what_was_asked_for_too_much_is_given_back(clock):
    """Ten times as much, by those who cannot count: a tenth of the limit would be used."""
    budget = Budget(Limits(None, 60_000))
    granted = clock.run_until_complete(spend(budget, itertools.repeat(1000), clock.now + 300, used(0.1)))
    spent = [(at, amount * 0.1) for at, amount in granted]
    assert most(spent, 60) <= 60_000
    assert sum(amount for _, amount in spent) / 5 >= 0.9 * 60_000


def test_what_was_asked_for_too_little_is_owed(clock):
    """A server that counts more tokens than were thought slows down who comes after."""
    budget = Budget(Limits(None, 60_000))
    granted = clock.run_until_complete(spend(budget, itertools.repeat(500), clock.now + 300, used(3)))
    assert most([(at, amount * 3) for at, amount in granted], 60) <= 60_000 + 1500


def test_what_was_refused_was_not_spent(clock):
    """Nor what was sent in vain: its tokens are there for others."""
    budget = Budget(Limits(None, 60_000))

    async def in_vain() -> None:
        for _ in range(100):
            await budget.report(await budget.acquire(6000), Report(0))

    clock.run_until_complete(in_vain())
    assert clock.now < 1060


# What limits are learned


def test_the_limits_of_the_answers_are_gone_by(clock):
    """From the first on."""
    budget = Budget()
    learned = Report(limits=Limits(60, 90_000), is_answer=True)
    granted = clock.run_until_complete(spend(budget, itertools.repeat(10), clock.now + 120, lambda _: learned))
    assert 57 <= most(one_each(granted), 60) <= 60
    standing = clock.run_until_complete(budget.standing())
    assert (standing.limits, budget.request_tokens) == (Limits(60, 90_000), 90_000 / 30)


def test_the_limits_that_were_given_win(clock):
    """The user may have others beside the job; what was not given is learned."""
    budget = Budget(Limits(requests=30))
    budget.learn(Limits(60_000, 90_000))
    granted = clock.run_until_complete(spend(budget, itertools.repeat(1), clock.now + 120))
    assert most(one_each(granted), 60) <= 30
    assert clock.run_until_complete(budget.standing()).limits == Limits(30, 90_000)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(None, 90_000), 3000),
        (Limits(10_000, 90_000), 3000),
        (Limits(15, 90_000), 9000),
        (Limits(1, 90_000), 90_000),
        (Limits(600, None), float("inf")),
    ],
)
def test_requests_are_a_share_of_a_minute_s_tokens(limits, expected):
    """Small enough to be spread evenly, large enough that the requests suffice."""
    assert Budget(limits).request_tokens == expected


def test_a_small_request_goes_first_while_limits_are_not_known(clock):
    """The others wait for what its answer tells."""
    budget = Budget()

    async def probing() -> None:
        assert budget.request_tokens == PROBE_TOKENS
        first = await budget.acquire(10)
        others = [asyncio.create_task(budget.acquire(10)) for _ in range(3)]
        await asyncio.sleep(5)
        assert not any(other.done() for other in others)
        await budget.report(first, Report(limits=Limits(6000), is_answer=True))
        for other in others:
            await asyncio.wait_for(other, 1)

    clock.run_until_complete(probing())


def test_another_goes_first_where_the_first_has_failed_or_is_lost(clock):
    """A worker may have died with it."""
    budget = Budget()

    async def probing() -> None:
        first = await budget.acquire(10)
        second = asyncio.create_task(budget.acquire(10))
        third = asyncio.create_task(budget.acquire(10))
        await asyncio.sleep(1)
        await budget.report(first, Report())
        await asyncio.wait_for(second, 1)
        await asyncio.sleep(1)
        assert not third.done(), "the second has not been heard of"
        await asyncio.wait_for(third, PROBE_S)

    clock.run_until_complete(probing())


def test_it_is_quiet_when_nothing_is_heard_and_nobody_is_made_to_wait(clock):
    """What waits for its turn, or for the end of a pause, is alive, however long that takes; what died is heard of no more."""
    budget = Budget(Limits(None, 600))

    async def quiet_s() -> float:
        return (await budget.standing()).quiet_s

    async def going_quiet() -> None:
        await budget.admit(3000)
        waits = asyncio.create_task(budget.acquire(3000))
        await asyncio.sleep(200)
        assert not waits.done()
        assert await quiet_s() == 0
        grant = await waits
        await asyncio.sleep(50)
        assert await quiet_s() == pytest.approx(50)
        await refused(budget, grant, wait_s=250)
        await asyncio.sleep(240)
        assert await quiet_s() == 0
        await asyncio.sleep(30)
        assert await quiet_s() == pytest.approx(20)
        await budget.dismiss(3000, 3000, is_done=True)
        assert await quiet_s() == 0

    clock.run_until_complete(going_quiet())


# Refused


async def refused(budget: Budget, *grants: Grant, wait_s: float | None = 0.0, of: str = "", limit: float | None = None):
    """Report that requests were refused."""
    for grant in grants:
        await budget.report(grant, Report(refusal=RateLimited("no", wait_s, of=of, limit=limit)))


@pytest.mark.parametrize(("asked_s", "waited_s"), [(7.0, 7.0), (None, 2.0), (10**6, MAX_PAUSE_S)])
def test_a_refusal_pauses_everybody(clock, asked_s, waited_s):
    """For as long as the provider asks, within reason."""
    budget = Budget(Limits(6000))

    async def times() -> list[float]:
        await refused(budget, await budget.acquire(1), wait_s=asked_s)
        began = clock.now
        waits = [asyncio.create_task(budget.acquire(1)) for _ in range(5)]
        await asyncio.gather(*waits)
        return [began, clock.now]

    began, ended = clock.run_until_complete(times())
    assert waited_s <= ended - began <= waited_s + 1


def test_a_refusal_pauses_those_that_were_about_to_go(clock):
    """They have waited for tokens, and were refused had they gone."""
    budget = Budget(Limits(None, 6000))

    async def times() -> float:
        first = await budget.acquire(10)
        began, waiting = clock.now, asyncio.create_task(budget.acquire(300))
        await asyncio.sleep(1)
        await refused(budget, first, wait_s=10)
        await waiting
        return clock.now - began

    assert clock.run_until_complete(times()) >= 11


def rate_of(clock: Clock, budget: Budget, seconds: float = 2) -> float:
    """Return how many requests are granted in a second."""
    return len(clock.run_until_complete(spend(budget, itertools.repeat(1), clock.now + seconds))) / seconds


def test_requests_refused_together_slow_down_once(clock):
    """They were on their way before anybody knew."""
    budget = Budget(Limits(6000))

    async def together() -> None:
        await refused(budget, *[await budget.acquire(1) for _ in range(8)])

    before = rate_of(clock, budget)
    clock.run_until_complete(together())
    after = rate_of(clock, budget)
    assert before == pytest.approx(100 * PACE, rel=0.15)
    assert after == pytest.approx(SLOWER * 100 * PACE, rel=0.15)


def test_a_request_refused_after_that_slows_down_further(clock):
    """It was sent at the slower pace, and that was too fast."""
    budget = Budget(Limits(6000))
    for _ in range(2):
        clock.run_until_complete(refused_later(budget, 1))
    assert rate_of(clock, budget) == pytest.approx(SLOWER**2 * 100 * PACE, rel=0.15)


async def refused_later(budget: Budget, seconds: float) -> None:
    """Send a request, and be refused after a while."""
    grant = await budget.acquire(1)
    await asyncio.sleep(seconds)
    await refused(budget, grant)
    await asyncio.sleep(0.01)


def test_the_pace_comes_back(clock):
    """Slowly: what was refused once may be refused again."""
    budget = Budget(Limits(6000))
    clock.run_until_complete(refused_later(budget, 0.1))
    slow = rate_of(clock, budget)
    clock.now += 60
    assert slow < 80
    assert rate_of(clock, budget) == pytest.approx(100 * PACE, rel=0.15)


def test_only_what_was_short_is_slowed_down(clock):
    """Requests are plenty where tokens are not."""
    budget = Budget(Limits(6000, 60_000_000))

    async def of_tokens() -> None:
        await refused(budget, await budget.acquire(1), of="tokens")

    clock.run_until_complete(of_tokens())
    assert rate_of(clock, budget) == pytest.approx(100 * PACE, rel=0.15)


@pytest.mark.parametrize(("of", "limit"), [("requests", 120.0), ("", None)])
def test_a_refusal_tells_a_limit_that_nobody_else_told(clock, of, limit):
    """In its words, or by what had been taken until then."""
    budget = Budget()

    async def first() -> None:
        await budget.report(await budget.acquire(1), ANSWERED)
        for number in range(
            1 if of else 2
        ):  # a single one that tells nothing may be of a server that is busy for a moment
            grants = [await budget.acquire(1) for _ in range(60)]
            await asyncio.sleep(1)
            await refused(budget, grants[-1], of=of, limit=limit)
            await asyncio.sleep(1)
            assert (await budget.standing()).limits.is_known == bool(of or number)

    clock.run_until_complete(first())
    clock.now += 61
    granted = clock.run_until_complete(spend(budget, itertools.repeat(1), clock.now + 60))
    assert 80 <= len(granted) <= 200


# The end


def test_orders_stop_before_the_most_tokens_are_passed(clock):
    """What was admitted goes on, and is counted by what it really cost."""
    budget = Budget(Limits(6000), max_tokens=100)

    async def orders() -> None:
        await budget.admit(60, client="a")
        await budget.dismiss(60, 30, is_done=True, client="a")
        await budget.admit(60, client="b")
        assert not await budget.admit(11, client="a"), "it has to wait for what the other really costs"
        await budget.acquire(60)
        await budget.dismiss(60, 60, is_done=True, client="b")
        with pytest.raises(Stopped, match="--max-cost"):
            await budget.admit(11, client="a")
        with pytest.raises(Stopped, match="--max-cost"):
            await budget.admit(1, client="b")
        await budget.acquire(60)

    clock.run_until_complete(orders())
    standing = clock.run_until_complete(budget.standing())
    assert (standing.num_open, standing.num_done) == (0, 2)
    assert isinstance(standing.stopped_by, Stopped)


def test_orders_stop_when_those_that_they_wait_for_are_lost(clock):
    """An actor died with them: nothing is heard of them, and what they cost is not known."""
    budget = Budget(max_tokens=100)

    async def lost() -> None:
        await budget.admit(60, client="a")
        assert not await budget.admit(60, client="b")
        await asyncio.sleep(budget.lost_s + 1)
        with pytest.raises(Stopped, match="--max-cost"):
            await budget.admit(60, client="b")

    clock.run_until_complete(lost())


@pytest.mark.parametrize("began_again", [False, True])
def test_the_order_in_which_clients_are_heard_does_not_change_what_is_left(clock, began_again):
    """Ray keeps none: an order may come before the end of another that its client's books have already, or after its budget began again."""
    budget = Budget(max_tokens=1000)

    async def heard() -> None:
        if not began_again:
            await budget.admit(500, client="a", committed=0)
            await budget.admit(300, client="a", committed=500)
            await budget.admit(100, client="a", committed=400)
            await budget.dismiss(500, 100, is_done=True, client="a")
        else:
            await budget.dismiss(500, 100, is_done=True, client="a")
            await budget.admit(100, client="a", committed=400)
        assert await budget.admit(500, client="b", committed=0)
        assert not await budget.admit(1, client="b", committed=500)

    clock.run_until_complete(heard())


def test_the_most_tokens_may_all_be_spent(clock):
    """To the last."""
    budget = Budget(max_tokens=100)
    assert clock.run_until_complete(budget.admit(100))
    clock.run_until_complete(budget.dismiss(100, 100, is_done=True))
    with pytest.raises(Stopped):
        clock.run_until_complete(budget.admit(1))


def test_a_stop_is_for_all_that_comes_after(clock):
    """And the first reason is the one that is told."""
    budget = Budget(Limits(60))

    async def stopped() -> list[BaseException | Grant]:
        waiting = [asyncio.create_task(budget.acquire(1)) for _ in range(3)]
        await asyncio.sleep(0.1)
        await budget.stop(AuthenticationFailed("the key is not accepted"))
        await budget.stop(QuotaExhausted("another"))
        with pytest.raises(Stopped, match="the key is not accepted"):
            await budget.admit(1)
        with pytest.raises(Stopped, match="the key is not accepted"):
            await budget.acquire(1)
        return await asyncio.gather(*waiting, return_exceptions=True)

    granted, *late = clock.run_until_complete(stopped())
    assert isinstance(granted, Grant)
    assert all(isinstance(answer, Stopped) for answer in late)


def test_a_stop_ends_a_pause(clock):
    """Whoever waits five minutes for nothing would keep the job from ending."""
    budget = Budget(Limits(6000))

    async def stopped() -> float:
        await refused(budget, await budget.acquire(1), wait_s=300)
        waiting = asyncio.create_task(budget.acquire(1))
        await asyncio.sleep(1)
        await budget.stop(QuotaExhausted("the quota is used up"))
        with pytest.raises(Stopped):
            await waiting
        return clock.now

    assert clock.run_until_complete(stopped()) < 1010


def test_an_error_is_told_even_after_the_money_was_spent(clock):
    """Then what was admitted does not go on either."""
    budget = Budget(Limits(6000), max_tokens=10)

    async def both() -> None:
        with pytest.raises(Stopped):
            await budget.admit(11)
        await budget.stop(AuthenticationFailed("the key is not accepted"))
        with pytest.raises(Stopped, match="the key is not accepted"):
            await budget.acquire(1)

    clock.run_until_complete(both())


def test_reports_of_lost_grants_are_let_go(clock):
    """Actors die with theirs: the books do not grow for ever."""
    with patch("engine.models.api.budget.MAX_OPEN_GRANTS", 100):
        budget = Budget(Limits(6_000_000))

        async def lose() -> None:
            for _ in range(500):
                await budget.acquire(1)

        clock.run_until_complete(lose())
    assert len(budget._open) == 100


# A rate


def test_a_rate_forgets_after_a_minute(clock):
    """What was spent before it does not matter."""
    rate = Rate()
    rate.set(100)

    async def spent() -> float:
        await rate.take(100)
        clock.now += 61
        began = clock.now
        await rate.take(1)
        return clock.now - began

    assert clock.run_until_complete(spent()) < 5


def test_a_rate_without_a_limit_has_none(clock):
    """Null and nought mean that it is not known."""
    rate = Rate()
    rate.set(None)
    rate.set(0)

    async def spent() -> None:
        for _ in range(100):
            await rate.take(10**9)

    clock.run_until_complete(spent())
    assert (rate.limit, clock.now) == (None, 1000.0)


# Against a server


def test_only_orders_that_are_paid_and_waited_for_are_told_as_done(server, connect):
    """Not those without a text, nor the probe that finds out the dimension for them: no part comes of what they paid."""
    client, budget = connect(), Budget(Limits(6000))
    client.model.share(budget)
    assert client.rows([]).vectors.size == 0
    assert asyncio.run(client.model.dimension()) == DIMENSION
    assert asyncio.run(budget.standing()).num_done == 0
    client.rows(numbered(3))
    standing = asyncio.run(budget.standing())
    assert (standing.num_open, standing.num_done) == (0, 1)


def test_money_that_is_reserved_for_others_is_waited_for(server, cohere, monkeypatch):
    """Where tokens can only be bounded, each order costs a quarter of what it is admitted for."""
    monkeypatch.setattr("engine.models.api.model.ADMIT_EVERY_S", 0.01)
    server.behave(latency_s=0.05)
    calls = [["many words and more of them " * 20 + f"{call}"] for call in range(6)]
    client, bound = cohere(), len(calls[0][0])
    client.model.share(Budget(Limits(6000), max_tokens=3 * bound))
    assert all(len(answer.vectors) == 1 for answer in client.at_once(*calls))
    assert server.stats()["tokens_paid"] <= 3 * bound


@pytest.mark.parametrize("given_limit", [True, False], ids=["given", "learned"])
def test_requests_are_paced_for_a_server(server, connect, given_limit):
    """Five a second, whoever said so: the server would have taken all at once, and refused later ones."""
    server.behave(rpm=300)
    client = connect(model_batch_size=1, requests_per_minute=300 if given_limit else None)
    texts = numbered(14)
    assert_right(client.rows(texts), texts)
    began = sorted(sent.began for sent in client.books.sent)
    assert began[-1] - began[1] >= 12 / 5 - 0.2 * 5 / 5 - 0.1
    assert server.stats()["num_refused"] == 0


def test_tokens_are_paced_for_a_server(server, connect):
    """The requests become as small as the tokens of a minute want it."""
    server.behave(tpm=60_000)
    texts = [f"{number} " + "word " * 48 for number in range(140)]
    client = connect(requests_per_minute=None)
    answer = client.rows(texts)
    assert_right(answer, texts)
    stats = server.stats()
    assert stats["num_refused"] == 0
    assert stats["tokens_paid"] == answer.num_tokens > 6500
    began = sorted(sent.began for sent in client.books.sent)
    assert began[-1] - began[0] >= 1.5
    assert len(began) >= 3


def test_a_limit_that_only_a_refusal_tells_is_gone_by(server, connect):
    """In its words: two requests a second, from then on."""
    words = "Rate limit reached for x on requests per min (RPM): Limit 120, Used 120. Please try again in 100ms."
    server.behave(faults=[{"kind": "status", "status": 429, "message": words, "containing": "text 00003"}])
    texts = numbered(8)
    client = connect(model_batch_size=1, requests_per_minute=None, n_concurrent_jobs=1)
    answer = client.rows(texts)
    assert_right(answer, texts)
    assert answer.num_refusals == 1
    began = [sent.began for sent in client.books.sent if sent.began > client.books.sent[3].ended]
    assert began[-1] - began[0] >= 1.9
