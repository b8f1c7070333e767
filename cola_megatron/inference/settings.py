"""How to generate: what every model family shares, and what generation by flow adds. How to estimate a likelihood."""

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass

# So that every seed of a block (see `noise.block_noise`) fits a torch.Generator.
MAX_NOISE_SEED, MAX_SAMPLE_ID = 2**62, 2**52
GREEDY_BELOW = 1e-5

SOLVERS = ("euler", "heun", "adams_bashforth")
DIVERGENCES = ("hutchinson", "exact")
PROBES = ("rademacher", "gaussian")
NOISES = ("published", "hashed")
FIRST_BLOCKS = ("clean_condition", "partial_repaint", "left_pad", "right_pad")


@dataclass(frozen=True)
class CommonSettings:
    """What generating text means in every family: how much, how tokens follow from logits, when to stop.

    Raises:
        ValueError: a setting out of range.
    """

    max_new_tokens: int = 32
    """Rounded up to whole blocks where a family generates in blocks."""
    temperature: float = 0.0
    """Below 1e-5 it is 0: greedy, as in the published package."""
    top_k: int = 0
    """Only the k most likely tokens may be drawn; 0: all. Greedy decoding does not ask."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability may be drawn; 1: all."""
    repetition_penalty: float = 1.1
    """Divides positive and multiplies negative logits of ids that the sample has generated; 1: none."""
    stop: tuple[str, ...] = ()
    """A sample ends where its text contains one of these; the text ends before it."""
    end_of_text: tuple[int, ...] = ()
    """A sample ends at one of these token ids; its text ends before it."""
    noise_seed: int = 66
    """Seed of all draws. A sample's draws depend on this seed and on its own id alone."""

    def __post_init__(self):
        stop, end_of_text = self.stop, self.end_of_text
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop or ()))
        ends = (end_of_text,) if _is_integer(end_of_text) else tuple(end_of_text or ())
        object.__setattr__(self, "end_of_text", ends)
        for name in ("max_new_tokens", "top_k"):
            _require_integer(name, getattr(self, name))
        for name in ("temperature", "top_p", "repetition_penalty"):
            require_finite(name, getattr(self, name))
        for name, least in (("max_new_tokens", 1), ("temperature", 0.0), ("top_k", 0)):
            _require_at_least(name, getattr(self, name), least)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop={list(self.stop)} must be texts that are not empty")
        for token in self.end_of_text:
            _require_integer("end_of_text", token)
            _require_at_least("end_of_text", token, 0)
        require_seed(self.noise_seed)
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)


@dataclass(frozen=True)
class FlowSettings(CommonSettings):
    """Generation by integrating a flow, block by block. Defaults are the published ones.

    Raises:
        ValueError: a setting out of range.
    """

    steps: int = 16
    """Steps of the solver per block, on a uniform grid of times."""
    guidance_scale: float = 7.0
    """s in v = v_uncond + s (v_cond - v_uncond). 1 needs no unconditional pass."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times t (1 is noise, 0 is clean) at which guidance is on, both ends included; elsewhere v = v_cond, which costs
    half of a guided evaluation."""
    solver: str = "euler"
    """`euler` (order 1), `heun` or `adams_bashforth` (order 2); see `solvers.py`."""
    settle_every: int = 0
    """Adaptive steps: after every so many steps the block is decoded from its estimate z - t v, and a sample whose
    tokens are those of the look before takes the estimate for its block. 0: all steps are done."""
    noise: str = "published"
    """The formula of a sample's draws. By the published one sample 10,000 has the noise of sample 0 a block later;
    `hashed` has no such pairs. See `noise.py`."""
    first_block: str = "clean_condition"
    """What becomes of a prompt that ends inside a block; see `first_block.py`."""
    repaint_until: float = 0.0
    """Partial repaint: the prompt's latents are put back at solver times t above this."""
    repaint_rounds: int = 1
    """Partial repaint: how often each step with repainting is done; before every repetition the block is noised back
    to the time of the step's beginning."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("steps", "repaint_rounds"):
            _require_integer(name, getattr(self, name))
            _require_at_least(name, getattr(self, name), 1)
        _require_integer("settle_every", self.settle_every)
        _require_at_least("settle_every", self.settle_every, 0)
        for name in ("guidance_scale", "repaint_until"):
            require_finite(name, getattr(self, name))
        interval = _pair("guidance_interval", self.guidance_interval)
        object.__setattr__(self, "guidance_interval", interval)
        if not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(
                f"guidance_interval={interval[0]},{interval[1]} must be low,high with 0 <= low <= high <= 1"
            )
        if not 0 <= self.repaint_until <= 1:
            raise ValueError(f"repaint_until={self.repaint_until} must lie in 0 .. 1")
        for name, known in (("solver", SOLVERS), ("noise", NOISES), ("first_block", FIRST_BLOCKS)):
            _require_one_of(name, getattr(self, name), known)
        if self.first_block != "partial_repaint" and (self.repaint_until, self.repaint_rounds) != (0.0, 1):
            raise ValueError(
                f"repaint_until and repaint_rounds need first_block=partial_repaint, not {self.first_block}"
            )

    def guided(self, time: float) -> bool:
        """Whether an evaluation at this time needs the unconditional pass."""
        low, high = self.guidance_interval
        return self.guidance_scale != 1.0 and low <= time <= high


@dataclass(frozen=True)
class LikelihoodSettings:
    """Estimating log p(x) by a flow; see `likelihood.py`. No guidance: a guided field is not the model's density.

    Raises:
        ValueError: a setting out of range.
    """

    samples: int = 4
    """K: latents that are drawn from the posterior of each text."""
    steps: int = 32
    """Steps of the solver from t = 0 to 1, on a quadratic grid (`solvers.quadratic_grid`)."""
    solver: str = "adams_bashforth"
    """As for generation; `heun` asks for two evaluations per step."""
    divergence: str = "hutchinson"
    """`hutchinson`: one random probe per sample, one pass backwards per evaluation. `exact`: one pass backwards for
    each coordinate of a block, block_size * d of them."""
    probe: str = "rademacher"
    """Of Hutchinson's estimator: signs, which have the least variance, or `gaussian`."""
    noise_seed: int = 66
    """Seed of all draws. A text's draws depend on this seed, on its own id and on the number of the draw alone."""

    def __post_init__(self):
        for name in ("samples", "steps"):
            _require_integer(name, getattr(self, name))
            _require_at_least(name, getattr(self, name), 1)
        for name, known in (("solver", SOLVERS), ("divergence", DIVERGENCES), ("probe", PROBES)):
            _require_one_of(name, getattr(self, name), known)
        if self.divergence == "exact" and self.probe != LikelihoodSettings.probe:
            raise ValueError(f"probe={self.probe} needs divergence=hutchinson, not exact")
        require_seed(self.noise_seed)


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral)


def _require_integer(name: str, value: object) -> None:
    if not _is_integer(value):
        raise ValueError(f"{name}={value} must be an integer")


def require_count(name: str, value: int) -> None:
    """Refuses what is no whole number above 0; raises ValueError."""
    _require_integer(name, value)
    _require_at_least(name, value, 1)


def require_finite(name: str, value: object) -> None:
    """Refuses what is no finite number; raises ValueError."""
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name}={value} must be finite")


def _require_at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")


def _require_one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value} must be one of {', '.join(known)}")


def require_seed(noise_seed: int) -> None:
    """Refuses a seed that a torch.Generator does not take; raises ValueError."""
    _require_integer("noise_seed", noise_seed)
    if abs(noise_seed) > MAX_NOISE_SEED:
        raise ValueError(f"noise_seed={noise_seed} must lie in -{MAX_NOISE_SEED} .. {MAX_NOISE_SEED}")


def _pair(name: str, value: Iterable[float]) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value} must be two numbers: low, high") from None
    return low, high
