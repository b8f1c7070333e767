"""How an autoregressive model generates, and how it states a likelihood."""

from dataclasses import dataclass

from cola_megatron.inference.settings import CommonSettings, require_count


@dataclass(frozen=True)
class AutoregressiveSettings(CommonSettings):
    """Generation token by token; `max_new_tokens` is exact.

    Raises:
        ValueError: a setting out of range.
    """

    tokens_at_once: int = 1
    """Tokens between two looks for a stop text or an end-of-text token. More save the looks, and compute tokens behind
    an end in vain; the text is the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("tokens_at_once", self.tokens_at_once)


@dataclass(frozen=True)
class ExactLikelihoodSettings:
    """There is nothing to choose: nothing is estimated, and nothing is drawn."""
