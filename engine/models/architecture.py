"""Architecture: what the modules of a loaded model say of it, and what becomes of their weights in 16 bits."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from engine.errors import ConfigError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CHANGING_ROTATIONS = frozenset({"dynamic", "longrope"})
"""Kinds of rotary positions that go by the longest text of a batch, and are written anew for each: neighbours change a vector, and threads another's."""

KNOWN_CODE = frozenset({"torch", "transformers", "sentence_transformers"})
"""Packages whose modules change nothing of their own as they compute, but for `CHANGING_ROTATIONS`."""


def is_plain(model: SentenceTransformer) -> bool:
    """Say whether a model is the library's own transformer module, for text alone, and modules that follow it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    first = model[0]
    return (
        type(model).forward is SentenceTransformer.forward
        and type(first) is Transformer
        and first.backend == "torch"
        and first.transformer_task == "feature-extraction"
        and "message" not in first.modality_config
        and first.tokenizer is first.processor
        and hasattr(first.tokenizer, "backend_tokenizer")
        and not first.processing_kwargs
        and not first.can_flatten_inputs
        and not any((model.module_kwargs or {}).values())
        and not _has_changing_rotations(first)
    )


def has_known_code(model: SentenceTransformer) -> bool:
    """
    Say whether all of a model's modules are of torch, transformers and sentence-transformers.

    Code of a Hub may fill tables as it computes, such as nomic's cosines of positions. On another CUDA stream they would be read
    before they are written, which nothing would show.
    """
    return all(type(module).__module__.partition(".")[0] in KNOWN_CODE for module in model.modules())


def num_known_tokens(model: SentenceTransformer) -> int | None:
    """Return how many tokens a plain transformer has embeddings for, which may be fewer than its tokenizer has; None if it does not say."""
    try:
        table = model[0].auto_model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a class, a Hub's own among them, need not say which table it is
        return None
    return table.num_embeddings if isinstance(table, torch.nn.Embedding) else None


def num_positions(model: SentenceTransformer) -> int | None:
    """
    Return how many tokens a transformer has learned positions for; None if it has no table of them.

    RoBERTa, MPNet and their like count from behind the position that stands for padding: of 514 they have 512 for tokens.
    """
    transformer = getattr(model[0], "auto_model", None)
    for module in transformer.modules() if transformer is not None else ():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, torch.nn.Embedding):
            padding = getattr(module, "padding_idx", None)
            return int(table.num_embeddings) - (padding + 1 if isinstance(padding, int) else 0)
    return None


def limit_length(model: SentenceTransformer, name: str, max_length: int | None) -> None:
    """
    Have a model cut texts to `max_length` tokens, or to as many as it has positions for, if that is what its own length is above.

    Raises:
        ConfigError: If it has no positions for so many, or the tokenizer takes so few for no limit.
    """
    positions = num_positions(model)
    if max_length is None:
        own = getattr(model, "max_seq_length", None)
        if positions is not None and own is not None and own > positions:
            model.max_seq_length = positions
        return
    tokenizer = model.tokenizer
    special = tokenizer.num_special_tokens_to_add() if hasattr(tokenizer, "num_special_tokens_to_add") else 0
    config = getattr(getattr(model[0], "auto_model", None), "config", None)
    most = positions or getattr(config, "max_position_embeddings", None)
    if max_length <= special or (isinstance(most, int) and 0 < most < max_length):
        raise ConfigError(
            f"max_length: {name} takes {special + 1} to {most or 'any number of'} tokens, not {max_length}"
        )
    model.max_seq_length = max_length


def cast(model: SentenceTransformer, dtype: str) -> SentenceTransformer:
    """
    Bring a model's weights to a dtype, and leave in float32 what transformers leaves so as it loads a model.

    That is what it is told to keep, since it overflows otherwise (T5's `wo` in float16), and what is not stored but computed, such as
    the frequencies of rotary positions: rounded to bfloat16 they turn far tokens by a part of a radian too much.
    """
    wanted = getattr(torch, dtype)
    if wanted == torch.float32:
        return model
    kept = _kept_in_float32(model, wanted)
    for name, weights in model.state_dict(keep_vars=True).items():  # what is stored, and nothing else
        if weights.is_floating_point() and not (kept and kept.search(name)):
            weights.data = weights.data.to(wanted)
    return model


def _kept_in_float32(model: SentenceTransformer, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Return what is found in the names of weights that a model asks to keep: some in float16 alone, as transformers has it."""
    names: set[str] = set()
    for module in model.modules():
        names |= set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
        if dtype == torch.float16:
            names |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return re.compile(rf"(^|\.)({'|'.join(map(re.escape, sorted(names)))})(\.|$)") if names else None


def _has_changing_rotations(transformer: torch.nn.Module) -> bool:
    kinds: set[object] = set()
    for module in transformer.modules():
        kind = getattr(module, "rope_type", None)
        kinds |= set(kind.values()) if isinstance(kind, dict) else {kind}
    return bool(kinds & CHANGING_ROTATIONS)
