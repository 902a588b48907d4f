"""sentence-transformers models, on the device that the actor was given."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy.typing as npt
import xxhash

from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.models.base import BaseEmbeddingModel, Embeddings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

PACKAGE = "package:"
"""Prefix of a model that lies in an installed package: the same name finds it on every node of a cluster."""
HASH_CHUNK_BYTES = 16 * 1024**2
DEFAULT_BATCH_SIZE = {"cpu": 16, "cuda": 256}
"""On CPUs small batches pad less, and are faster (FACTS.md); on GPUs large ones fill the device."""


class SentenceTransformerEmbeddingModel(BaseEmbeddingModel):
    """
    A model of the sentence-transformers library; parameter names are Kura's where Kura has them.

    Args:
        model_name: Name on the Hugging Face Hub, a folder, or `package:name/folder` for one inside an installed package.
        model_batch_size: Texts that go through the model together; by default 16 on CPUs, 256 on GPUs.
        device: auto, cpu, cuda, cuda:1, mps…
        dtype: float32, bfloat16 or float16: what the model computes in. Vectors are float32.
        max_length: Tokens a text is cut to.
        dimensions: Keep the first so many dimensions, and normalise again.
        normalize: Scale each vector to length 1, if the model does not.
        prompt: Put before every text.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ConfigError: If there is no such model or device.
    """

    def __init__(
        self,
        model_name: str = "all-MiniLM-L6-v2",
        model_batch_size: int | None = None,
        device: str = "auto",
        *,
        dtype: str = "float32",
        max_length: int | None = None,
        dimensions: int | None = None,
        normalize: bool = False,
        prompt: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.model_name = model_name
        self.device = _chosen_device(device)
        kind = self.device.partition(":")[0]
        self.model_batch_size = model_batch_size or DEFAULT_BATCH_SIZE.get(kind, DEFAULT_BATCH_SIZE["cpu"])
        self._dimensions = dimensions
        self._normalize = normalize or dimensions is not None
        self._prompt = prompt
        self._num_tokens = 0
        self._slug = f"sentence-transformers:{model_name}" + (f"@{revision}" if revision else "")
        self._model = _load(model_name, self.device, dtype, revision, trust_remote_code)
        if max_length is not None:
            self._check_max_length(max_length)
            self._model.max_seq_length = max_length
        self._check_dimensions()
        self._model.register_forward_pre_hook(self._count_tokens)
        logger.info("model initialised: %s on %s in %s", self._slug, self.device, dtype)

    @classmethod
    def pinned(cls, config: ModelConfig) -> ModelConfig:
        """Return `config` with the revision replaced by the commit that it names now; folders have none."""
        if _folder(config.name) is not None:
            if config.revision:
                raise ConfigError(f"revision: {config.name} is a folder, and has none; leave it out")
            if config.name.startswith(PACKAGE):
                return config
            absolute = Path(config.name).expanduser().absolute()  # actors may have another working directory
            return config.model_copy(update={"model": f"{config.provider}:{absolute}"})
        return config.model_copy(update={"revision": _commit(_hub_name(config.name), config.revision)})

    @classmethod
    def identity(cls, config: ModelConfig) -> dict[str, Any]:
        """Name the model by its commit on the Hub, or by the content of its folder, wherever that lies."""
        folder = _folder(config.name)
        if folder is not None:
            return {"provider": config.provider, "content": _content_hash(folder)}
        return {"provider": config.provider, "name": _hub_name(config.name), "revision": config.revision}

    @classmethod
    def from_config(cls, config: ModelConfig) -> Self:
        """Build the model as a job's config describes it."""
        return cls(
            config.name,
            config.batch_size,
            config.device,
            dtype=config.dtype,
            max_length=config.max_length,
            dimensions=config.dimensions,
            normalize=config.normalize,
            prompt=config.prompt,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )

    def slug(self) -> str:
        """Return the provider, the name and the revision."""
        return self._slug

    async def embed(self, texts: list[str]) -> npt.NDArray[Any]:
        """Return an array of shape (len(texts), dimension), float32; the event loop stays free meanwhile."""
        return await asyncio.to_thread(self._encode, texts)

    async def embed_rows(self, texts: Sequence[str]) -> Embeddings:
        """Embed and check texts as every model does, and count the tokens that the model saw."""
        before = self._num_tokens
        logger.debug("%d texts in batches of up to %d, longest first", len(texts), self.model_batch_size)
        embeddings = await super().embed_rows(texts)
        embeddings.num_tokens = self._num_tokens - before
        return embeddings

    def _encode(self, texts: list[str]) -> npt.NDArray[Any]:
        vectors = self._model.encode(
            texts,
            prompt=self._prompt,
            batch_size=self.model_batch_size,
            show_progress_bar=False,
            convert_to_tensor=True,
            truncate_dim=self._dimensions,
        ).float()
        if self._normalize:  # after the cast: lengths of 1 in float32; not `/=`, which tensors of inference mode refuse
            vectors = vectors / vectors.norm(dim=1, keepdim=True)
        array: npt.NDArray[Any] = vectors.cpu().numpy()
        return array

    def _count_tokens(self, _module: Any, inputs: tuple[Any, ...]) -> None:
        """Count what goes into the model as it goes in: texts are not tokenized a second time for it."""
        features = inputs[0] if inputs and isinstance(inputs[0], Mapping) else {}
        if "attention_mask" in features:
            self._num_tokens += int(features["attention_mask"].sum())
        elif "input_ids" in features:  # flattened, without padding
            self._num_tokens += features["input_ids"].numel()

    def _check_max_length(self, max_length: int) -> None:
        """Refuse what the tokenizer takes for no limit, and what the model has no positions for."""
        tokenizer = self._model.tokenizer
        special = tokenizer.num_special_tokens_to_add() if hasattr(tokenizer, "num_special_tokens_to_add") else 0
        config = getattr(getattr(self._model[0], "auto_model", None), "config", None)
        positions = getattr(config, "max_position_embeddings", None)
        if max_length <= special or (isinstance(positions, int) and 0 < positions < max_length):
            raise ConfigError(
                f"max_length: {self.model_name} takes {special + 1} to {positions or 'any number of'} tokens, not {max_length}"
            )

    def _check_dimensions(self) -> None:
        full = self._model.get_embedding_dimension()
        if self._dimensions is not None and full is not None and self._dimensions > full:
            raise ConfigError(f"dimensions: {self.model_name} has {full}, of which {self._dimensions} cannot be kept")


def _load(name: str, device: str, dtype: str, revision: str | None, trust_remote_code: bool) -> SentenceTransformer:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils.logging import disable_progress_bar

    folder = _folder(name)
    disable_progress_bar()  # in an actor it would be noise in the driver's log
    try:
        return SentenceTransformer(
            str(folder) if folder else _hub_name(name),
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            model_kwargs={"dtype": getattr(torch, dtype)},
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:  # RuntimeError: a device that torch does not know
        raise ConfigError(f"the model {name} cannot be loaded: {type(error).__name__}: {error}") from None


def _chosen_device(device: str) -> str:
    """Take the GPU that Ray left visible, or Apple's, or the CPU; a device that was asked for by name must be there."""
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    kind = device.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device {device}: torch {torch.__version__} sees no CUDA device here; use --device cpu or auto"
        )
    return device


def _folder(name: str) -> Path | None:
    """Return the folder that holds the model, or None if the name is one of the Hub."""
    if name.startswith(PACKAGE):
        package, _, below = name.removeprefix(PACKAGE).partition("/")
        spec = find_spec(package)
        places = list(spec.submodule_search_locations or []) if spec else []
        folder = Path(places[0], below) if places else None
        if folder is None or not folder.is_dir():
            raise ConfigError(f"there is no model {name}: install the package {package!r}, or correct the folder in it")
        return folder
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith(("/", "./", "../", "~")):
        raise ConfigError(f"there is no model folder {name}")
    return None


def _hub_name(name: str) -> str:
    """Return the full name on the Hub: those without an owner are sentence-transformers' own."""
    return name if "/" in name else f"sentence-transformers/{name}"


def _commit(name: str, revision: str | None) -> str:
    """Return the commit that a revision of a model names: as the Hub says, or else as it was last downloaded."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(HfApi().model_info(name, revision=revision, timeout=20).sha)
    except Exception as error:  # offline, or any of what a network's libraries raise: perhaps it was downloaded before
        why = type(error).__name__
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True)).name
    except (OSError, ValueError, HfHubHTTPError):
        raise ConfigError(
            f"there is no model {name}{f' at {revision}' if revision else ''}: the Hugging Face Hub does not give it ({why}), "
            "and it was not downloaded before. Check the name and the network, or give a folder"
        ) from None


def _content_hash(folder: Path) -> str:
    """Hash the names and bytes of a model folder's files, except what is only read by people."""
    digest = xxhash.xxh3_128()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".md" or any(step.startswith(".") for step in Path(name).parts):
            continue
        digest.update(name.encode() + b"\0")
        with path.open("rb") as file:
            while chunk := file.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
