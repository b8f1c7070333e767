"""What a comparison of runs says: figures side by side, where the configs differ, and what must not be compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cola_megatron.checkpoint.compatible import FREE_KEYS
from cola_megatron.families import family_of
from cola_megatron.reporting.compared_runs import HEADLINE, LIKELIHOOD, OWN_TIMES, ComparedRun

ABSENT = "-"
_ERROR = "_standard_error"
_SAMPLES = "samples"  # of a measurement: how many sequences it was made on; old records do not say
# The name of a run and its folder differ always.
_IDENTITY = ("name", "runs_folder")
_ORDER = (
    LIKELIHOOD,
    "perplexity",
    "reconstruction_accuracy",
    "reconstruction_nll",
    HEADLINE,
    "flow_matching_loss_without_context",
    "flow_matching_loss_shuffled_context",
    "linear_predictor_loss",
    "constant_predictor_loss",
    "context_gain",
    "context_information",
    OWN_TIMES,
    "vae_logsnr",
)


@dataclass(frozen=True)
class Difference:
    """A key whose value is not the same in all runs."""

    key: str
    values: tuple[str, ...]
    """One for each run, in their order; `ABSENT` where its config has no such key."""
    is_free: bool
    """It is about how a run is run, and may change when one resumes."""


def table(runs: Sequence[ComparedRun]) -> list[list[str]]:
    """Rows with a heading first: a figure per row, a run per column; `ABSENT` where a run has not measured it."""
    rows = [
        ["", *(run.label for run in runs)],
        *([["family", *(family_of(run.config).title for run in runs)]] if _differ_in_family(runs) else []),
        ["stage", *(str(family_of(run.config).stage_of(run.config) or "-") for run in runs)],
        ["state", *(run.state for run in runs)],
        ["steps", *(f"{run.step:,} of {run.config.training.steps:,}" for run in runs)],
        ["tokens", *(f"{run.step * run.tokens_per_step:,}" for run in runs)],
        ["model FLOPs of this stage", *(f"{run.flops_of_step(run.step):.3e}" for run in runs)],
        ["training time [s]", *(f"{run.seconds:,.0f}" for run in runs)],
        ["measured at step", *(ABSENT if run.measured_at is None else f"{run.measured_at:,}" for run in runs)],
        [
            "on held-out sequences",
            *(f"{run.measured[_SAMPLES]:,.0f}" if _SAMPLES in run.measured else ABSENT for run in runs),
        ],
    ]
    return rows + [[_in_words(name), *(_measured(run, name) for run in runs)] for name in metric_names(runs)]


def metric_names(runs: Sequence[ComparedRun]) -> list[str]:
    """The held-out metrics that a run's last measurement has, in the order of the table; no bins."""
    found = dict.fromkeys(name for run in runs for name in run.measured if "_bin_" not in name)
    names = [name for name in found if not name.endswith(_ERROR) and name != _SAMPLES]
    return sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), names.index(name)))


def differences(runs: Sequence[ComparedRun]) -> list[Difference]:
    """The keys in which the stored configs differ, those that decide what is computed first."""
    leaves = [dict(_leaves(run.tree)) for run in runs]
    found = []
    for key in dict.fromkeys(key for each in leaves for key in each):
        values = tuple(_value(each[key]) if key in each else ABSENT for each in leaves)
        if len(set(values)) > 1 and key not in _IDENTITY:
            is_free = any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
            found.append(Difference(key, values, is_free))
    return sorted(found, key=lambda each: each.is_free)


def notes(runs: Sequence[ComparedRun]) -> list[str]:
    """What a reader of the table must know before comparing two of its figures."""
    found = _notes_on_families(runs)
    old = [run.label for run in runs if run.has_old_measurements]
    if old:
        found.append(
            f"{', '.join(old)}: records of an older version, whose flow-matching loss was measured at the run's own "
            f'distribution of t; it stands under {_in_words(OWN_TIMES)}, marked "old record", and these runs have no '
            f"{_in_words(HEADLINE)}"
        )
    differing = {each.key for each in differences(runs)}
    if any(OWN_TIMES in run.measured for run in runs) and _any_in(differing, "objective.flow.time"):
        found.append(f"objective.flow.time differs: {_in_words(OWN_TIMES)} does not compare between these runs")
    if _any_in(differing, "objective"):
        found.append("the objective differs: the sum of the training losses does not compare")
    if _any_in(differing, "data.path", "data.sequence_length", "training.evaluation.samples"):
        found.append("data or training.evaluation.samples differ: held-out metrics may be of different texts")
    if len({run.measured_at for run in runs if run.measured_at is not None}) > 1:
        found.append("the last measurements are of different steps: the curves show them at equal ones")
    if len({run.measured.get(_SAMPLES) for run in runs if run.measured_at is not None} - {None}) > 1:
        found.append("the last measurements are of different numbers of held-out sequences")
    if any(f"{name}{_ERROR}" in run.measured for run in runs for name in run.measured):
        found.append("\u00b1: 95% interval of the mean over held-out sequences, not over training runs")
    return found


def _differ_in_family(runs: Sequence[ComparedRun]) -> bool:
    return len({run.config.model.family for run in runs}) > 1


def _notes_on_families(runs: Sequence[ComparedRun]) -> list[str]:
    """What the likelihood of each family is, where there are several."""
    if not _differ_in_family(runs):
        return []
    found = []
    for family in dict.fromkeys(family_of(run.config) for run in runs):
        meanings = [words.meaning for words in family.page.figures if words.name == LIKELIHOOD]
        found += [f"{family.title}: {meaning}" for meaning in meanings] or [
            f"{family.title}: no likelihood is measured in training; `cola eval likelihood RUN` estimates its bound"
        ]
    return found


def as_json(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """The same for scripts. Metrics are those of the last measurement, bins and standard errors among them."""
    found = differences(runs)

    def by_key(is_free: bool) -> dict[str, dict[str, str]]:
        labels = [run.label for run in runs]
        return {each.key: dict(zip(labels, each.values, strict=True)) for each in found if each.is_free == is_free}

    return {
        "runs": {
            run.label: {
                "folder": str(run.folder),
                "family": run.config.model.family,
                "stage": family_of(run.config).stage_of(run.config),
                "state": run.state,
                "step": run.step,
                "steps": run.config.training.steps,
                "tokens": run.step * run.tokens_per_step,
                "model_flops": run.flops_of_step(run.step),
                "seconds": run.seconds,
                "measured_at": run.measured_at,
                "has_old_measurements": run.has_old_measurements,
                "metrics": run.measured,
            }
            for run in runs
        },
        "differences": by_key(False),
        "free_differences": by_key(True),
        "notes": notes(runs),
    }


def _measured(run: ComparedRun, name: str) -> str:
    measured = run.measured
    if name not in measured:
        return ABSENT
    error = measured.get(f"{name}{_ERROR}")
    interval = "" if error is None else f" \u00b1 {1.96 * error:.4f}"
    # In an old measurement it is the only flow-matching loss.
    is_old = name == OWN_TIMES and HEADLINE not in measured
    return f"{measured[name]:.4f}{interval}{' (old record)' if is_old else ''}"


def _in_words(name: str) -> str:
    return {
        HEADLINE: "flow matching loss, equally spaced t",
        OWN_TIMES: "flow matching loss, the run's own t",
    }.get(name, name.replace("_", " "))


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _value(value: Any) -> str:
    """As an override would have it."""
    return value if isinstance(value, str) else json.dumps(value)


def _any_in(keys: set[str], *sections: str) -> bool:
    return any(key == section or key.startswith(f"{section}.") for key in keys for section in sections)
