"""What to do about a step whose loss or gradient is not a number, or far above those before it.

A step is judged before its update is applied, alike on every rank, from its loss and gradient norm:

    skip         the update is not applied; the run goes on with the next batch
    roll back    the run returns to its newest checkpoint and leaves out the batches from there to the bad one, as PaLM
                 did (arXiv 2204.02311, section 5.1): what the checkpoint holds may have led to the spike
    stop         the run ends; its newest checkpoint stays

A spike is a value above mean + `spike_deviations` standard deviations of the last `spike_window` accepted steps.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cola_megatron.config.training import DivergenceConfig
from cola_megatron.errors import ExitCode, UserError

WATCHED = ("loss", "gradient_norm")
HEADLINES = ("nats_per_token", "reconstruction_nll", "flow_matching_loss")
"""Of a held-out measurement: a model for which one of them is not a number is of no use."""


class TrainingDiverged(UserError, ArithmeticError):
    """A loss or gradient that is not a number, of which nothing was saved; or a measurement."""

    exit_code = ExitCode.DIVERGED


def require_finite(step: int, measured: Mapping[str, float]) -> None:
    """Refuses to go on with a model whose held-out losses are not numbers; raises TrainingDiverged."""
    none = [name for name in HEADLINES if not math.isfinite(measured.get(name, 0.0))]
    if none:
        raise TrainingDiverged(
            f"step {step}: {', '.join(none)} of the held-out text is not a number: this model is of no use. Take a "
            "checkpoint before, or start again under another name= with a lower training.optimizer.learning_rate"
        )


@dataclass(frozen=True)
class BadStep:
    """Why a step is not accepted, and what follows."""

    step: int
    """Counted from 1."""
    reason: str
    action: Literal["skip", "roll_back", "stop"]


class Divergence:
    """Judges the steps of a run. Its `state` goes into checkpoints, so that a resumed run judges alike."""

    def __init__(self, policy: DivergenceConfig, state: Mapping[str, Any] | None = None):
        self.policy = policy
        state = state or {}
        self.skipped_updates: int = state.get("skipped_updates", 0)
        self._skipped_at: list[int] = list(state.get("skipped_at", []))
        self._windows: dict[str, list[float]] = {name: list(state.get(name, [])) for name in WATCHED}

    @property
    def refuses_updates(self) -> bool:
        """Whether it must be asked before an update is applied; what stops a run may be found out afterwards."""
        return {self.policy.not_finite, self.policy.spike} & {"skip", "roll_back"} != set()

    def judge(self, step: int, metrics: Mapping[str, float]) -> BadStep | None:
        """The verdict on a step with these metrics, which changes nothing here; None: it is good."""
        bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            return self._bad(step, ", ".join(bad), self.policy.not_finite)
        if self.policy.spike == "ignore":
            return None
        for name in WATCHED:
            limit = self._limit(name)
            if metrics[name] > limit:
                return self._bad(step, f"{name} is {metrics[name]:.4g}, above {limit:.4g}", self.policy.spike)
        return None

    def accept(self, metrics: Mapping[str, float]) -> None:
        """The update of a good step was applied."""
        if self.policy.spike != "ignore":
            for name, window in self._windows.items():
                window.append(metrics[name])
                del window[: -self.policy.spike_window]

    def skip(self, bad: BadStep) -> None:
        """The update of this step was not applied."""
        self.skipped_updates += 1
        self._skipped_at = [*self._recent(bad.step), bad.step]

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"skipped_updates": self.skipped_updates, "skipped_at": self._skipped_at, **self._windows}

    def _limit(self, name: str) -> float:
        window = self._windows[name]
        if len(window) < self.policy.spike_window:
            return math.inf
        return statistics.fmean(window) + self.policy.spike_deviations * statistics.pstdev(window)

    def _bad(self, step: int, reason: str, action: Literal["skip", "roll_back", "stop"]) -> BadStep:
        if action == "skip" and len(self._recent(step)) >= self.policy.max_skips:
            reason += (
                f", and {self.policy.max_skips} of the last {self.policy.spike_window} updates were skipped already"
            )
            return BadStep(step, reason, "stop")
        return BadStep(step, reason, action)

    def _recent(self, step: int) -> list[int]:
        return [at for at in self._skipped_at if at > step - self.policy.spike_window]
