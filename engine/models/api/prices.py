"""Prices: what a provider takes for a million tokens."""

from __future__ import annotations

from engine.model_config import ModelConfig

MILLION = 1_000_000
DOLLARS_PER_MILLION_TOKENS = {
    "openai:text-embedding-3-small": 0.02,
    "openai:text-embedding-3-large": 0.13,
    "openai:text-embedding-ada-002": 0.10,
    "cohere:embed-v4.0": 0.12,
    "cohere:embed-english-v3.0": 0.10,
    "cohere:embed-multilingual-v3.0": 0.10,
}
"""As the providers' price pages had them in November 2026; `--token-price` wins over this table."""


def price_of(config: ModelConfig) -> float | None:
    """Return dollars per million tokens; None if nobody has said what a server of one's own, or an unknown model, costs."""
    if config.token_price is not None:
        return config.token_price
    return None if config.base_url and not config.api_version else DOLLARS_PER_MILLION_TOKENS.get(config.model)


def dollars(num_tokens: float, price: float) -> float:
    """Return what tokens cost."""
    return num_tokens * price / MILLION
