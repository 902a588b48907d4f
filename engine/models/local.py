"""Local models: which device, which backend, and the encoder that fits a loaded model best."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.errors import ConfigError
from engine.models import model_files
from engine.models.architecture import cast, num_known_tokens
from engine.models.backends.base import Batch
from engine.models.backends.pytorch import PyTorchBackend, refuse_tf32
from engine.models.base import lowest_cosine
from engine.models.cores import num_cores
from engine.models.encoders import Encoder, OwnEncoder, PackedEncoder
from engine.models.token_budget import TokenBudget
from engine.models.tokens import PROBES, Tokenizer, Tokens
from engine.models.windows import Fitter

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from engine.model_config import LongTexts
    from engine.models.backends.base import Backend

logger = logging.getLogger(__name__)

LEAST_COSINE = {"float32": 0.99999, "bfloat16": 0.9995, "float16": 0.9995}
"""Between a vector and the one that PyTorch computes in float32: what a dtype promises (docs/decisions/0009)."""
MAX_PROBE_TOKENS = 128
"""Of the texts that a conversion is checked with: enough for padding, and no minute of a large model's time."""
SHORT_PROBE_TOKENS = 32
"""Of the same once more, cut: a backend may compute short texts in a way of their own."""
LONG_PROBE_TOKENS = 512
"""Of one more, since a branch that the tracer took for settled may show in long texts alone."""
DEFAULT_BATCH_SIZE = {"cpu": 16, "cuda": 256}
"""Of a model's own `encode`: on CPUs small batches pad less, and are faster (FACTS.md); on GPUs large ones fill the device."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a model will run on, and why."""

    device: str
    backend: str
    why: str

    @property
    def kind(self) -> str:
        """The kind of device, such as cpu, cuda or mps."""
        return _kind(self.device)


def chosen(device: str, backend: str) -> Chosen:
    """
    Choose the device and the backend.

    Args:
        device: auto takes the GPU that Ray left visible, or Apple's, or the CPU.
        backend: auto takes OpenVINO on CPUs, if it is installed, and else PyTorch.

    Raises:
        ConfigError: If what was asked for by name is not there.
    """
    found = _device(device)
    is_cpu = _kind(found) == "cpu"
    has_openvino = find_spec("openvino") is not None
    if backend == "openvino":
        if not is_cpu:
            raise ConfigError(f"backend openvino: it is for CPUs here, and the device is {found}; use --backend torch")
        if not has_openvino:
            raise ConfigError("backend openvino: it is not installed; pip install 'embedding-engine[cpu]'")
        return Chosen(found, "openvino", "asked for")
    if backend == "torch":
        return Chosen(found, "torch", "asked for, or enough for so little text")
    if is_cpu and has_openvino:
        return Chosen(found, "openvino", "the fastest on CPUs")
    if is_cpu:
        return Chosen(
            found, "torch", "OpenVINO, which is faster on CPUs, is not installed: pip install 'embedding-engine[cpu]'"
        )
    return Chosen(found, "torch", "the fastest on this device")


def load(
    name: str, chosen: Chosen, *, dtype: str, revision: str | None, trust_remote_code: bool
) -> SentenceTransformer:
    """
    Load a model: in float32 if it is to be converted, which brings it to `dtype` itself.

    Raises:
        ConfigError: If there is no such model, or it cannot be loaded here.
    """
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer
    from transformers.utils.logging import disable_progress_bar

    if dtype == "bfloat16" and not _has_bfloat16(chosen):
        logger.warning(
            "dtype bfloat16: the GPU (%s) has none, and computes it in a slow way; float16, in a new output, is faster",
            torch.cuda.get_device_name(chosen.device),
        )
    folder = model_files.folder_of(name)
    disable_progress_bar()  # in an actor it would be noise in the driver's log
    try:
        return SentenceTransformer(
            str(folder) if folder else model_files.hub_name(name),
            device=chosen.device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            model_kwargs={"dtype": torch.float32 if chosen.backend == "openvino" else getattr(torch, dtype)},
        )
    # RuntimeError: a device that torch does not know
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"the model {name} cannot be loaded: {type(error).__name__}: {error}") from None


def encoder(
    model: SentenceTransformer,
    chosen: Chosen,
    *,
    dtype: str,
    prompt: str | None,
    max_rows: int | None,
    batch_tokens: int | None,
) -> Encoder:
    """
    Return the fastest encoder that gives a model's own vectors, and say in one log line which it is.

    Args:
        model: As `load` left it. It is used up: converted, or brought to `dtype`.
        chosen: Device and backend.
        dtype: To compute in.
        prompt: Put before every text.
        max_rows: Texts a batch at most.
        batch_tokens: Padded tokens a batch; None to find out.
    """
    tokenizer = Tokenizer.of(model, prompt)
    if tokenizer is None:
        if chosen.backend == "openvino":
            logger.warning("backend openvino: %s is not a plain transformer; its own encode is used", _name(model))
        size = max_rows or DEFAULT_BATCH_SIZE.get(chosen.kind, DEFAULT_BATCH_SIZE["cpu"])
        if chosen.kind == "cuda":
            refuse_tf32()
        _log(model, chosen.device, "its own encode", dtype, "it is not a plain transformer with pooling")
        return OwnEncoder(cast(model, dtype), prompt, size, _beside(model, prompt))
    backend = _converted(model, tokenizer, dtype) if chosen.backend == "openvino" else None
    if backend is None:
        why = chosen.why if chosen.backend == "torch" else "OpenVINO cannot run it"
        backend = PyTorchBackend(cast(model, dtype))
    else:
        why = chosen.why
    _log(model, backend.device, backend.name, dtype, why)
    budget = TokenBudget(chosen.kind, batch_tokens)
    return PackedEncoder(tokenizer, backend, budget, max_rows, num_known_tokens(model))


def fitter(
    model: SentenceTransformer, encoder: Encoder, *, prompt: str | None, how: LongTexts, overlap: int | None
) -> Fitter | None:
    """
    Return what finds the texts that are too long, and their chunks; None if they are truncated, which encoders do themselves.

    Raises:
        ConfigError: If nothing tells how many tokens the model takes of a text, or chunks would hold too little.
    """
    if how == "truncate":
        return None
    tokenizer = encoder.tokenizer or Tokenizer.beside(model, prompt)
    if tokenizer is None:
        raise ConfigError(
            f"long_texts: {how} needs the model's tokenizer, and {_name(model)} has none that tells what it makes of a text; "
            "only truncate is possible"
        )
    return Fitter(tokenizer, how, overlap)


def _beside(model: SentenceTransformer, prompt: str | None) -> Tokenizer | None:
    """Return what tells how much of a text a model's own `encode` cuts off; None if it cuts nothing, or nobody knows."""
    try:
        tokenizer = Tokenizer.beside(model, prompt)
    except Exception as error:  # a model of any kind, which embeds all the same
        logger.debug("nothing tells what %s makes of a text: %s", _name(model), type(error).__name__)
        return None
    return tokenizer if tokenizer is not None and tokenizer.max_length is not None else None


def _converted(model: SentenceTransformer, tokenizer: Tokenizer, dtype: str) -> Backend | None:
    """Convert a model to OpenVINO, and hold its vectors against PyTorch's; None, with a warning, if they are others."""
    probes = _probes(model, tokenizer)
    with ThreadPoolExecutor(1) as stream:  # a backend changes the number of threads of the thread that calls it
        expected = list(stream.map(PyTorchBackend(model), probes))
    attention = getattr(model[0].auto_model.config, "_attn_implementation", None)
    try:
        from engine.models.backends.openvino import OpenVinoBackend

        backend = OpenVinoBackend(model, dtype, num_cores())
        cosines = [lowest_cosine(backend(probe), own) for probe, own in zip(probes, expected, strict=True)]
        lowest = np.min(cosines)  # nan if any is, as of a probe that overflows: which is below any bound
    except Exception as error:  # whatever a converter makes of modules that it has never seen
        logger.warning("backend torch: OpenVINO cannot convert %s (%s)", _name(model), type(error).__name__)
    else:
        if lowest >= LEAST_COSINE[dtype]:
            return backend
        logger.warning(
            "backend torch: OpenVINO's vectors of %s are not the model's own (cosine %.6f, and %s promises %s)",
            _name(model),
            lowest,
            dtype,
            LEAST_COSINE[dtype],
        )
    if attention:
        model[0].auto_model.set_attn_implementation(attention)
    return None


def _probes(model: SentenceTransformer, tokenizer: Tokenizer) -> list[Batch]:
    """Make two batches of rows with much, little and no padding, and one of a single long row."""
    lists = tokenizer([*PROBES, *(text[: len(text) // 2] for text in PROBES)]).lists()
    num_known = num_known_tokens(model)
    known = [ids for ids in lists if num_known is None or max(ids, default=0) < num_known]
    batches = []
    for some, most in (
        (known, SHORT_PROBE_TOKENS),
        (known, MAX_PROBE_TOKENS),
        ([max(known, key=len)], LONG_PROBE_TOKENS),
    ):
        tokens, positions = Tokens.of([ids[:most] for ids in some]), np.arange(len(some))
        ids, mask = tokens.padded(positions, pad_id=tokenizer.pad_id, pad_left=tokenizer.pad_left)
        batches.append(Batch(positions, ids, mask, ids.size))
    return batches


def _device(device: str) -> str:
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    if _kind(device) == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device {device}: torch {torch.__version__} sees no CUDA device here; use --device cpu or auto"
        )
    return device


def _has_bfloat16(chosen: Chosen) -> bool:
    """Say whether a device multiplies in bfloat16, as NVIDIA's GPUs do from Ampere on (8.0); of others nothing is known here."""
    if chosen.kind != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(chosen.device) >= (8, 0)


def _kind(device: str) -> str:
    return device.partition(":")[0]


def _name(model: SentenceTransformer) -> str:
    config = getattr(model[0], "config", None)
    return str(getattr(config, "model_type", "")) or type(model[0]).__name__


def _log(model: SentenceTransformer, device: str, backend: str, dtype: str, why: str) -> None:
    logger.info("model initialised: %s on %s in %s by %s: %s", _name(model), device, dtype, backend, why)
