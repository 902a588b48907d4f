"""Threads with event loops: what is bound to a loop is closed there, by whoever ends it, and if nobody does."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import subprocess
import sys
import threading
import time

import pytest

import engine
from engine.errors import EngineError
from engine.models.loop_thread import LoopThread
from engine.models.openai import OpenAIEmbeddingModel
from tests.models import HashModel
from tests.scripted import PATIENCE_S
from tests.strict_server import serving

EMBED = """
import sys, engine
print(engine.embed(["one", "two"], model="openai:text-embedding-3-small", base_url=sys.argv[1]).shape)
"""
EMBED_BY_CLASS = """
import asyncio, sys, engine
print(len(asyncio.run(engine.OpenAIEmbeddingModel(base_url=sys.argv[1]).embed(["one", "two"]))))
"""


def threads_of(name: str) -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == name}


def wait_for_the_end_of(threads: set[threading.Thread]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
        assert not thread.is_alive(), f"{thread.name} has not ended"


@pytest.mark.parametrize("end", [lambda thread: thread.stop(), lambda thread: asyncio.run(thread.ended())])
def test_what_is_to_be_closed_is_closed_once_on_the_loop_before_it_ends(end):
    """Whichever way it is ended, and though one of them fails."""
    thread = LoopThread("test-closing")
    (own,) = threads_of("test-closing")
    closed_in: list[threading.Thread] = []

    async def close() -> None:
        await asyncio.sleep(0.01)
        closed_in.append(threading.current_thread())

    async def fail() -> None:
        raise OSError("gone already")

    def refuse() -> None:
        raise TypeError("no coroutine either")

    for one in (fail, refuse, close):
        thread.at_end(one)
    end(thread)
    end(thread)
    assert closed_in == [own]
    wait_for_the_end_of({own})


def test_an_ended_loop_refuses_work_and_does_not_wait_for_it_for_ever():
    """Its loop is closed."""
    thread = LoopThread("test-refusing")
    own = threads_of("test-refusing")
    thread.stop()
    wait_for_the_end_of(own)
    coroutine = asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="closed"):
        thread.submit(coroutine)
    coroutine.close()


@pytest.mark.parametrize("script", [EMBED, EMBED_BY_CLASS])
def test_a_process_that_closes_no_model_ends_without_a_word(script):
    """As notebooks and Kura's users do: their provider's connections are closed, and nothing complains on the screen."""
    with serving() as server:
        done = subprocess.run(
            [sys.executable, "-c", script, server.url],
            env=os.environ | {"OPENAI_API_KEY": "sk-nobody"}, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    assert done.stdout.strip() in ("2", "(2, 1536)")
    assert done.stderr == ""


def test_a_model_that_is_let_go_of_takes_its_thread_and_its_connections_with_it(monkeypatch):
    """However many a notebook makes, cell by cell."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-nobody")
    before = threads_of("api-loop")
    with serving(dimension=16) as server:
        for _ in range(3):
            model = OpenAIEmbeddingModel(base_url=server.url)
            assert len(asyncio.run(model.embed(["a text"]))) == 1
        made = threads_of("api-loop") - before
        assert made
        del model
        gc.collect()
        wait_for_the_end_of(made)


class Nested(HashModel):
    """A model whose `embed` calls `engine.embed`, as somebody may write it."""

    async def embed(self, texts):
        return engine.embed(texts, model="custom:tests.models.HashModel", model_args={"dimension": 4})


class NestedAside(HashModel):
    """The same, in a thread."""

    async def embed(self, texts):
        options = {"model": "custom:tests.models.HashModel", "model_args": {"dimension": 4}}
        return await asyncio.to_thread(functools.partial(engine.embed, texts, **options))


def test_a_model_that_embeds_by_engine_embed_is_told_what_to_do_and_does_not_hang():
    """It would wait on the one loop for what is to run there; in a thread it does not."""
    options = {"model_args": {"dimension": 4}}
    with pytest.raises(EngineError, match="have the model await another model's `embed`, or call"):
        engine.embed(["a text"], model=f"custom:{Nested.__module__}.Nested", **options)
    assert engine.embed(["a text"], model=f"custom:{Nested.__module__}.NestedAside", **options).shape == (1, 4)
