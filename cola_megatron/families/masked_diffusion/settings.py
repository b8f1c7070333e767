"""How a masked-diffusion model generates, and how it estimates a likelihood."""

import math
from dataclasses import dataclass

from cola_megatron.inference.settings import MAX_NOISE_SEED, CommonSettings

REMASKINGS = ("low_confidence", "random")


@dataclass(frozen=True)
class MaskedDiffusionSettings(CommonSettings):
    """Generation by unmasking, as in LLaDA (arXiv 2502.09992).

    Every step predicts all masked tokens of a block and keeps some of the predictions. At a temperature above 0 the
    predictions are draws from softmax(logits / temperature) after top k and top p (what LLaDA draws by Gumbel noise);
    confidences are the probabilities without a temperature.

    Raises:
        ValueError: a setting out of range.
    """

    repetition_penalty: float = 1.0
    """As of `CommonSettings`; none by default, as in LLaDA: the tokens of one step do not see each other."""
    steps: int | None = None
    """Denoising steps for all new tokens together; a block has its share of them, rounded up. None: one for each token,
    as in LLaDA's evaluations."""
    block_length: int | None = None
    """Semi-autoregressive: the new tokens are unmasked in blocks of so many, from left to right. None: all at once, so
    that the denoising length is the generation length. A model that was trained by blocks has blocks of its own."""
    remasking: str = "low_confidence"
    """Which predictions are kept: those of the highest probability, or `random` ones."""
    guidance_scale: float = 0.0
    """s in logits = unconditional + (s + 1) (conditional - unconditional), the unconditional ones with the prompt
    masked. 0 needs no unconditional pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "block_length"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value} must be an integer of at least 1")
        if self.remasking not in REMASKINGS:
            raise ValueError(f"remasking={self.remasking} must be one of {', '.join(REMASKINGS)}")
        scale = self.guidance_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale < math.inf:
            raise ValueError(f"guidance_scale={scale} must be a finite number of at least 0")


@dataclass(frozen=True)
class BoundSettings:
    """How to estimate the bound.

    Raises:
        ValueError: a setting out of range.
    """

    samples: int = 128
    """K: masks that are drawn for each text, as in LLaDA's evaluation."""
    noise_seed: int = 66
    """Seed of all draws. A text's draws depend on this seed, on its own id and on the number of the draw alone."""

    def __post_init__(self) -> None:
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"samples={self.samples} must be an integer of at least 1")
        if not isinstance(self.noise_seed, int) or abs(self.noise_seed) > MAX_NOISE_SEED:
            raise ValueError(f"noise_seed={self.noise_seed} must lie in -{MAX_NOISE_SEED} .. {MAX_NOISE_SEED}")
