"""The worked example of CONTRIBUTING.md, which is what a contributor begins with."""

from __future__ import annotations

import asyncio
import re
import sys
import types

import numpy as np
import pytest

from engine.model_config import ModelConfig
from engine.models import registry
from tests.kills import ROOT
from tests.strict_server import serving, vector


@pytest.fixture
def example(monkeypatch):
    """A module that is the example, word for word."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[1]
    assert len(block.splitlines()) < 150
    module = types.ModuleType("voyage_example")
    monkeypatch.setitem(sys.modules, "voyage_example", module)
    monkeypatch.setenv("VOYAGE_API_KEY", "pa-example")
    exec(compile(block, "CONTRIBUTING.md", "exec"), vars(module))
    return module


def test_the_example_of_a_provider_embeds_splits_and_rejects(example):
    """By its name in a config: full requests, a vector for each text, and a poisoned text found and rejected alone."""
    with serving(dimension=16) as server:
        arguments = {"base_url": server.url, "model_name": "voyage-3.5"}
        config = ModelConfig(model="custom:voyage_example.VoyageEmbeddingModel", model_args=arguments)
        model = registry.build(config)
        assert model.slug() == "voyage:voyage-3.5"
        server.behave(faults=[{"kind": "status", "status": 400, "message": "odd", "times": -1, "containing": "poison"}])
        texts = [f"text {number}" for number in range(1500)]
        texts[700] = "poison"
        answer = asyncio.run(model.embed_rows(texts))
        asyncio.run(model.close())
        assert 900 < server.stats()["max_inputs"] <= 1000
    assert list(answer.rejects) == [700]
    assert answer.rejects[700] == "the provider refuses it (HTTP 400): odd"
    good = [text for text in texts if text != "poison"]
    np.testing.assert_allclose(answer.vectors, [vector(text, 16) for text in good], atol=1e-6)
