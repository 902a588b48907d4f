"""
Bulk text embedding on Ray: stream shards of text through models, checkpoint to Parquet, lose nothing.

    import engine
    result = engine.run(source="texts/*.parquet", output="out/", model="sentence-transformers:all-MiniLM-L6-v2")
    vectors = engine.embed(["two", "texts"])

Importing it loads neither torch, ray nor openai: each comes with the first call that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine import ray_settings  # noqa: F401 - sets them, before anything imports Ray
from engine.errors import (
    AuthenticationFailed,
    CommitConflict,
    ConfigError,
    CorruptOutput,
    EngineError,
    FingerprintMismatch,
    InputRejected,
    InputTooLong,
    OutputInUse,
    ProviderError,
    QuotaExhausted,
    RateLimited,
    Refused,
    RequestTooLarge,
    SourceChanged,
    SourceError,
    Stopped,
    Unavailable,
)
from engine.version import __version__

if TYPE_CHECKING:
    from engine.exporting.story import ExportResult
    from engine.faces import embed, export, gc, plan, read, read_batches, report, run, status, verify
    from engine.gc_result import GcResult
    from engine.models.base import BaseEmbeddingModel, Embeddings
    from engine.models.cohere import CohereEmbeddingModel
    from engine.models.openai import OpenAIEmbeddingModel
    from engine.models.sentence_transformer import SentenceTransformerEmbeddingModel
    from engine.reporting.story import ReportResult
    from engine.results import PlanResult, RunResult, StatusResult, VerifyResult

__all__ = [
    "AuthenticationFailed",
    "BaseEmbeddingModel",
    "CohereEmbeddingModel",
    "CommitConflict",
    "ConfigError",
    "CorruptOutput",
    "Embeddings",
    "EngineError",
    "ExportResult",
    "FingerprintMismatch",
    "GcResult",
    "InputRejected",
    "InputTooLong",
    "OpenAIEmbeddingModel",
    "OutputInUse",
    "PlanResult",
    "ProviderError",
    "QuotaExhausted",
    "RateLimited",
    "Refused",
    "ReportResult",
    "RequestTooLarge",
    "RunResult",
    "SentenceTransformerEmbeddingModel",
    "SourceChanged",
    "SourceError",
    "StatusResult",
    "Stopped",
    "Unavailable",
    "VerifyResult",
    "__version__",
    "embed",
    "export",
    "gc",
    "plan",
    "read",
    "read_batches",
    "report",
    "run",
    "status",
    "verify",
]

_LAZY = {
    "embed": "engine.faces",
    "export": "engine.faces",
    "gc": "engine.faces",
    "plan": "engine.faces",
    "read": "engine.faces",
    "read_batches": "engine.faces",
    "report": "engine.faces",
    "run": "engine.faces",
    "status": "engine.faces",
    "verify": "engine.faces",
    "BaseEmbeddingModel": "engine.models.base",
    "Embeddings": "engine.models.base",
    "CohereEmbeddingModel": "engine.models.cohere",
    "OpenAIEmbeddingModel": "engine.models.openai",
    "SentenceTransformerEmbeddingModel": "engine.models.sentence_transformer",
    "ExportResult": "engine.exporting.story",
    "GcResult": "engine.gc_result",
    "PlanResult": "engine.results",
    "ReportResult": "engine.reporting.story",
    "RunResult": "engine.results",
    "StatusResult": "engine.results",
    "VerifyResult": "engine.results",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
