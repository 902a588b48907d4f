"""Tokens: texts to token ids, exactly as the model's own tokenizer would make them, and ids to padded arrays."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from engine.batching import Positions

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  Straße, \uff26\uff35\uff2c\uff2c-width,\tnaïve cafe\u0301 — 東京 🙂\n\nİstanbul ",
    "[MASK] <s> </s> <|endoftext|> [SEP] # 3.1415926",
    "word " * 9000,
)
"""What a tokenizer may treat in its own way: case, accents, spaces, scripts, special tokens, and more than it takes."""
GIVEN = frozenset({"input_ids", "attention_mask", "modality", "prompt_length"})
"""Features that a padded batch has, or that only count where pooling leaves the prompt out."""
CHARACTERS_PER_TOKEN = 6
"""Of a text's beginning, which is tokenized first when the text is long: English has 4 to 5 characters a token."""
SPLITS_AT_SPACES = frozenset({"BertPreTokenizer", "Whitespace", "WhitespaceSplit"})
LEAVES_SPACES = frozenset(
    {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Strip", "StripAccents"}
)
"""Normalizers that neither take a space between two words away nor look past it."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token ids of texts, end to end."""

    ids: npt.NDArray[np.int32]
    """Shape (tokens,)."""
    starts: Ints
    """Shape (texts + 1,): where each text begins in `ids`."""

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Tokens:
        """Join a list of ids for each text."""
        starts = np.zeros(len(lists) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, lists), np.int64, len(lists)), out=starts[1:])
        return cls(np.fromiter(chain.from_iterable(lists), np.int32, int(starts[-1])), starts)

    def lists(self) -> list[list[int]]:
        """Return the ids of each text, as `of` takes them."""
        return [self.ids[start:stop].tolist() for start, stop in pairwise(self.starts)]

    @property
    def lengths(self) -> Ints:
        """Tokens of each text."""
        return np.diff(self.starts)

    def padded(self, positions: Positions, *, pad_id: int, pad_left: bool) -> tuple[Ints, Ints]:
        """Return the ids of some texts and their attention mask, both of shape (texts, longest), int64."""
        starts = self.starts[positions]
        lengths = self.starts[positions + 1] - starts
        longest = int(lengths.max(initial=0))
        columns = np.arange(longest)[None, :] - ((longest - lengths)[:, None] if pad_left else 0)
        is_token = (columns >= 0) & (columns < lengths[:, None])
        at = np.where(is_token, starts[:, None] + columns, 0)
        return np.where(is_token, self.ids[at], pad_id).astype(np.int64), is_token.astype(np.int64)


class Tokenizer:
    """
    The tokenizer of a plain transformer, called straight: no padding, no tensors, no Python object a token.

    It may be called from several threads at once: its settings are made once, here, and it works outside the interpreter lock.

    Args:
        fast: A `tokenizers.Tokenizer`. Its truncation and padding are changed.
        max_length: Tokens a text is cut to; None: not at all.
        prompt: Put before every text.
        pad_id: Of the token that fills rows up.
        pad_left: Fill rows up at their beginning.
        truncate_left: Cut long texts at their beginning.
    """

    def __init__(
        self, fast: Any, *, max_length: int | None, prompt: str, pad_id: int, pad_left: bool, truncate_left: bool
    ) -> None:
        self.pad_id = pad_id
        self.pad_left = pad_left
        self._fast = fast
        self._max_length = max_length
        self._prompt = prompt
        fast.no_padding()
        if max_length is None:
            fast.no_truncation()
        else:
            fast.enable_truncation(max_length, direction="left" if truncate_left else "right")
        can_cut = max_length is not None and not truncate_left and _splits_at_spaces(fast)
        self._enough = max_length * CHARACTERS_PER_TOKEN if can_cut and max_length else None

    @classmethod
    def of(cls, model: SentenceTransformer, prompt: str | None) -> Tokenizer | None:
        """Return the tokenizer of a model that is a plain transformer with modules behind it; None if it is anything else."""
        if not _is_plain(model):
            return None
        if prompt is None and model.default_prompt_name is not None:
            prompt = model.prompts.get(model.default_prompt_name)
        if prompt and any(not getattr(module, "include_prompt", True) for module in model):
            return None  # pooling leaves the prompt's tokens out, which takes more than ids and a mask
        features = [model.preprocess([text], prompt=prompt) for text in PROBES]
        if any(
            set(one) - GIVEN - {"token_type_ids"} or ("token_type_ids" in one and one["token_type_ids"].any())
            for one in features
        ):
            return None  # the model is given more than ids and a mask
        wanted = [one["input_ids"][0].tolist() for one in features]
        own, limit = model.tokenizer, model.max_seq_length
        tokenizer = cls(
            own.backend_tokenizer,
            max_length=limit if limit is not None and limit < 10**9 else None,  # transformers' "no limit" is 10^30
            prompt=prompt or "",
            pad_id=own.pad_token_id or 0,
            pad_left=own.padding_side == "left",
            truncate_left=own.truncation_side == "left",
        )
        if tokenizer(PROBES).lists() != wanted:
            logger.warning(
                "the tokenizer of %s does more than it says; the model's own encode is used", type(own).__name__
            )
            return None
        return tokenizer

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Return the token ids of texts, special tokens among them, cut to the model's length."""
        if self._prompt:
            texts = [self._prompt + text for text in texts]
        beginnings = texts if self._enough is None else [_beginning(text, self._enough) for text in texts]
        lists = [encoding.ids for encoding in self._fast.encode_batch_fast(beginnings)]
        if self._enough is not None and self._max_length is not None:
            short = [
                at
                for at, ids in enumerate(lists)
                if len(ids) < self._max_length and len(beginnings[at]) < len(texts[at])
            ]
            whole = self._fast.encode_batch_fast([texts[at] for at in short]) if short else []
            for at, encoding in zip(short, whole, strict=True):
                lists[at] = encoding.ids
        return Tokens.of(lists)


def _beginning(text: str, enough: int) -> str:
    """
    Return a text up to the first space that follows a letter or digit after `enough` characters.

    A tokenizer that splits at spaces makes the same tokens of it as of the text's beginning, so that of a text of a hundred
    thousand characters, of which the model takes 256 tokens, a hundredth is tokenized.
    """
    if len(text) <= enough:
        return text
    at = text.find(" ", enough)
    while at > 0 and not text[at - 1].isalnum():  # which, unlike other signs, no normalizer makes a space of
        at = text.find(" ", at + 1)
    return text if at < 0 else text[:at]


def _splits_at_spaces(fast: Any) -> bool:
    """Say whether no token can reach across a space."""
    if fast.pre_tokenizer is None or any(
        any(character.isspace() for character in token.content) for token in fast.get_added_tokens_decoder().values()
    ):
        return False
    if not all(
        step["type"] in LEAVES_SPACES
        or (step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"} and step["content"] in (" ", "▁"))
        for step in _steps(fast.normalizer, "normalizers")
    ):
        return False
    return any(
        step["type"] in SPLITS_AT_SPACES
        or (step["type"] == "ByteLevel" and step["use_regex"])
        or (step["type"] == "Metaspace" and step["split"])
        for step in _steps(fast.pre_tokenizer, "pretokenizers")[:1]  # later ones may find no spaces any more
    )


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """Return the settings of a normalizer or pre-tokenizer, one by one if it is several."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    steps: list[dict[str, Any]] = state[name] if state["type"] == "Sequence" else [state]
    return steps


def _is_plain(model: SentenceTransformer) -> bool:
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
    )
