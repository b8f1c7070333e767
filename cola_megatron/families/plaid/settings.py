"""How Plaid generates, and how it estimates a likelihood."""

from dataclasses import dataclass

from cola_megatron.inference.settings import CommonSettings, require_count, require_finite, require_seed


@dataclass(frozen=True)
class PlaidSettings(CommonSettings):
    """Generation of a whole continuation at once, by ancestral sampling from noise.

    `temperature`, `top_k` and `top_p` are those of the last choice, of tokens from a state that is nearly clean.

    Raises:
        ValueError: a setting out of range.
    """

    repetition_penalty: float = 1.0
    """Must be 1: all tokens of a continuation are settled at once, none has been generated before."""
    steps: int = 256
    """Steps from t = 1 to 0, on a uniform grid; each is one pass over prompt and continuation. Published: 4096."""
    score_temperature: float = 0.9
    """The predicted noise is divided by it: below 1 text is likelier and less varied. Published: 0.9."""
    prompt_guidance: float = 1.0
    """Weight of the gradient of log p(prompt | z_t), beside the replacement of the prompt (`sampler.py`): 1 is Bayes'
    rule, more insists. A step takes a pass backwards for it, which 0 saves; then texts may begin unlike their prompt's
    end. Published: 2, without replacement."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("steps", self.steps)
        require_finite("prompt_guidance", self.prompt_guidance)
        if self.prompt_guidance < 0:
            raise ValueError(f"prompt_guidance={self.prompt_guidance} must be at least 0")
        require_finite("score_temperature", self.score_temperature)
        if self.score_temperature <= 0:
            raise ValueError(f"score_temperature={self.score_temperature} must be above 0")
        if self.repetition_penalty != 1:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} must be 1: Plaid settles all tokens of a continuation "
                "at once"
            )


@dataclass(frozen=True)
class BoundSettings:
    """Estimating the variational bound of a text.

    Raises:
        ValueError: a setting out of range.
    """

    samples: int = 16
    """K: times of the diffusion term, spread evenly over [0, 1], each with a noise of its own; as many noises of the
    reconstruction. Two passes each, four with self-conditioning."""
    noise_seed: int = 66
    """Seed of all draws. A text's draws depend on this seed, on its own id and on the number of the draw alone."""

    def __post_init__(self) -> None:
        require_count("samples", self.samples)
        require_seed(self.noise_seed)
