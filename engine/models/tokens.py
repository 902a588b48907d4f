"""Tokens: texts to token ids, exactly as the model's own tokenizer would make them, and ids to padded arrays."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engine.models.architecture import is_plain
from engine.models.beginnings import beginning, splits_at_spaces

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


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token ids of texts, end to end."""

    ids: npt.NDArray[np.int32]
    """Shape (tokens,)."""
    starts: Ints
    """Shape (texts + 1,): where each text begins in `ids`."""
    lost: Ints
    """Shape (texts,): tokens of each text that were cut off."""

    def lost_of_long(self) -> dict[int, int]:
        """Return how many tokens were cut off of each text that is longer than the model takes."""
        long = np.flatnonzero(self.lost)
        return dict(zip(long.tolist(), self.lost[long].tolist(), strict=True))

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]], lost: Ints | None = None) -> Tokens:
        """Join a list of ids for each text."""
        starts = np.zeros(len(lists) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, lists), np.int64, len(lists)), out=starts[1:])
        ids = np.fromiter(chain.from_iterable(lists), np.int32, int(starts[-1]))
        return cls(ids, starts, np.zeros(len(lists), np.int64) if lost is None else lost)

    def taken(self, positions: Ints) -> Tokens:
        """Return the tokens of some texts."""
        if np.array_equal(positions, np.arange(len(self.lost))):
            return self
        starts = self.starts[positions]
        lengths = self.starts[positions + 1] - starts
        ends = np.concatenate([[0], np.cumsum(lengths)])
        at = np.arange(ends[-1]) + np.repeat(starts - ends[:-1], lengths)
        return Tokens(self.ids[at], ends, self.lost[positions])

    def followed_by(self, other: Tokens) -> Tokens:
        """Return the tokens of these texts and of others behind them."""
        starts = np.concatenate([self.starts, other.starts[1:] + self.starts[-1]])
        return Tokens(np.concatenate([self.ids, other.ids]), starts, np.concatenate([self.lost, other.lost]))

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
        can_cut = max_length is not None and not truncate_left and splits_at_spaces(fast)
        self._enough = max_length * CHARACTERS_PER_TOKEN if can_cut and max_length else None
        self._num_special = int(fast.num_special_tokens_to_add(False))

    @property
    def max_length(self) -> int | None:
        """Tokens a text is cut to, special ones and the prompt's among them; None: not at all."""
        return self._max_length

    @property
    def num_around(self) -> int:
        """Tokens beside a text's own: special ones, and the prompt's."""
        return self._num_special + (self._count([self._prompt])[0] if self._prompt else 0)

    def bounds(self) -> Bounds:
        """Return what says where the tokens of texts begin and end; it is built from a copy, which takes a moment."""
        return Bounds(self._fast)

    @classmethod
    def of(cls, model: SentenceTransformer, prompt: str | None) -> Tokenizer | None:
        """Return the tokenizer of a model that is a plain transformer with modules behind it; None if it is anything else."""
        if not is_plain(model):
            return None
        prompt = _prompt_of(model, prompt)
        if prompt and any(not getattr(module, "include_prompt", True) for module in model):
            return None  # pooling leaves the prompt's tokens out, which takes more than ids and a mask
        features = [model.preprocess([text], prompt=prompt) for text in PROBES]
        if any(
            set(one) - GIVEN - {"token_type_ids"} or ("token_type_ids" in one and one["token_type_ids"].any())
            for one in features
        ):
            return None  # the model is given more than ids and a mask
        wanted = [one["input_ids"][0].tolist() for one in features]
        own = model.tokenizer
        tokenizer = cls(
            own.backend_tokenizer,
            max_length=_limit_of(model),
            prompt=prompt,
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

    @classmethod
    def beside(cls, model: SentenceTransformer, prompt: str | None) -> Tokenizer | None:
        """Return one that tells how many tokens the own `encode` of a model takes of a text; None if it has no such tokenizer."""
        from tokenizers import Tokenizer as Fast

        own = getattr(model, "tokenizer", None)
        backend = getattr(own, "backend_tokenizer", own)
        if not isinstance(backend, Fast):
            return None
        prompt, limit = _prompt_of(model, prompt), _limit_of(model)
        tokenizer = cls(
            Fast.from_str(backend.to_str()),  # the model goes on with its own
            max_length=limit,
            prompt=prompt,
            pad_id=0,
            pad_left=False,
            truncate_left=getattr(own, "truncation_side", "right") == "left",
        )
        if limit is None:
            return tokenizer  # no text is too long
        wanted = [model.preprocess([text], prompt=prompt).get("input_ids") for text in PROBES]
        known = [None if ids is None else ids.flatten().tolist() for ids in wanted]
        return tokenizer if tokenizer(PROBES).lists() == known else None

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """
        Return the token ids of texts, special tokens among them, cut to the model's length, and how many tokens that cost each.

        What is cut off is counted exactly in texts of up to six characters for each token that the model takes. The rest of longer ones
        is not tokenized, which would cost many times as much as their beginnings, but estimated from these.
        """
        if self._prompt:
            texts = [self._prompt + text for text in texts]
        beginnings = list(texts) if self._enough is None else [beginning(text, self._enough) for text in texts]
        encodings = self._fast.encode_batch_fast(beginnings)
        lists = [encoding.ids for encoding in encodings]
        if self._enough is not None and self._max_length is not None:
            short = [
                at
                for at, ids in enumerate(lists)
                if len(ids) < self._max_length and len(beginnings[at]) < len(texts[at])
            ]
            whole = self._fast.encode_batch_fast([texts[at] for at in short]) if short else []
            for at, encoding in zip(short, whole, strict=True):
                lists[at], encodings[at], beginnings[at] = encoding.ids, encoding, texts[at]
        return Tokens.of(lists, self._lost(texts, beginnings, encodings))

    def _lost(self, texts: Sequence[str], beginnings: Sequence[str], encodings: Sequence[Any]) -> Ints:
        """Return how many tokens of each text are not in its encoding, which is of its beginning."""
        lost = np.zeros(len(texts), np.int64)
        if self._max_length is None:
            return lost
        for at, encoding in enumerate(encodings):
            if len(encoding) < self._max_length:
                continue
            lost[at] = self._overflow(encoding)
            if unseen := len(texts[at][len(beginnings[at]) :].rstrip()):
                in_all = self._max_length - self._num_special + lost[at]
                lost[at] += max(round(unseen * in_all / len(beginnings[at])), 1)
        return lost

    def _count(self, texts: Sequence[str]) -> list[int]:
        """Return the tokens of each text, without special ones."""
        encodings = self._fast.encode_batch_fast(texts)
        return [len(encoding) - self._num_special + self._overflow(encoding) for encoding in encodings]

    def _overflow(self, encoding: Any) -> int:
        """Return how many tokens truncation took off."""
        return sum(len(part) - self._num_special for part in encoding.overflowing)


class Bounds:
    """
    Says where the tokens of texts begin and end.

    Args:
        fast: A `tokenizers.Tokenizer`; a copy is made, that cuts nothing.
    """

    def __init__(self, fast: Any) -> None:
        self._fast = type(fast).from_str(fast.to_str())
        self._fast.no_padding()
        self._fast.no_truncation()

    def __call__(self, texts: Sequence[str]) -> list[Ints]:
        """Return where the tokens of each text begin and end, in characters: shape (tokens, 2), without special tokens."""
        encodings = self._fast.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.offsets, np.int64).reshape(-1, 2) for encoding in encodings]


def _prompt_of(model: SentenceTransformer, prompt: str | None) -> str:
    """Return what is put before each text: the model's own prompt, if none is asked for."""
    if prompt is None and model.default_prompt_name is not None:
        prompt = model.prompts.get(model.default_prompt_name)
    return prompt or ""


def _limit_of(model: SentenceTransformer) -> int | None:
    """Return how many tokens a model takes; None for any number, as transformers' 10^30 means."""
    limit = getattr(model, "max_seq_length", None)
    return limit if limit is not None and limit < 10**9 else None
