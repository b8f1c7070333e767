"""The numbers of a report, each with a line that says what it is."""

from __future__ import annotations

import math
from collections.abc import Mapping

from cola_megatron.config import RunConfig
from cola_megatron.families import family_of
from cola_megatron.reporting.report import Row, Table
from cola_megatron.reporting.run_records import Cost, Run

AGAINST = (
    # name of the metric, what, meaning
    (
        "flow_matching_loss",
        "flow-matching loss, uniform t",
        "squared error of the predicted velocity per channel, with the context of the text, at equally spaced times",
    ),
    (
        "flow_matching_loss_shuffled_context",
        "  with the context of another text",
        "a control: if this is as low as the line above, the text before a block is not used",
    ),
    (
        "flow_matching_loss_without_context",
        "  without context, every block alone",
        "the same prior, which sees nothing before the block",
    ),
    (
        "linear_predictor_loss",
        "  best linear denoiser of one latent",
        "what mean and covariance of a single latent allow; a prior above it has learned nothing",
    ),
    ("constant_predictor_loss", "  best constant", "the error of whoever always predicts the mean velocity"),
    ("context_gain", "gain from context", "the loss without context less the loss with it"),
    (
        "context_information",
        "  in nats per latent",
        "the gain as information: for perfect denoisers what the text before a latent says about it",
    ),
)


def held_out_rows(metrics: Mapping[str, float], config: RunConfig) -> list[Row]:
    """What a held-out measurement found; the prior of Cola DLM has rows of its own."""
    rows = [_row(metrics, *each) for each in family_of(config).page.figures if each.name in metrics]
    dead = metrics.get("posterior_dead_directions")
    if dead is not None:
        rows.append(Row("dead directions of the latent", f"{dead:.0f}{_eigenvalues(metrics)}", _DEAD))
    if "samples" in metrics:
        rows.append(
            Row(
                "held-out sequences measured",
                f"{metrics['samples']:,.0f}",
                "spread over the split; \u00b1 is a 95% interval over their draw",
            )
        )
    return rows


_DEAD = (
    "eigenvectors of the latents' covariance along which the means vary less than the posterior's noise; means that "
    "are normed over the channels have one as a rule"
)


def _eigenvalues(metrics: Mapping[str, float]) -> str:
    count = sum(name.startswith("posterior_eigenvalue_") for name in metrics)
    values = [metrics[f"posterior_eigenvalue_{index}"] for index in range(count)]
    return f" of {count} (eigenvalues {values[0]:.3g} to {values[-1]:.3g})" if values else ""


def prior_rows(metrics: Mapping[str, float]) -> list[Row]:
    """The prior's loss between what it must be held against, at the same fixed times and noise; and what it means."""
    own = "flow_matching_loss_training_times"
    rows = [_row(metrics, *each) for each in AGAINST if each[0] in metrics]
    if own in metrics:
        meaning = "what the training loss estimates; it does not compare with other distributions of t"
        rows.append(_row(metrics, own, "flow-matching loss, the run's own times", meaning))
    if words := prior_in_words(metrics):
        rows.append(Row("what the prior has learned", words, "the sentence that the losses above allow"))
    return rows


def prior_in_words(metrics: Mapping[str, float]) -> str:
    """One sentence that the losses allow; none where they were not measured."""
    compared = ("context_gain", "flow_matching_loss", "linear_predictor_loss", "flow_matching_loss_without_context")
    if any(name not in metrics for name in compared):
        return ""
    gain, error = metrics["context_gain"], metrics.get("context_gain_standard_error", math.inf)
    if metrics["flow_matching_loss"] >= metrics["linear_predictor_loss"]:
        return "nothing yet: a linear function of one noisy latent, blind to the text, predicts as well"
    if gain < 1.96 * error:
        return "the shape of single blocks; the text before a block helps by no more than chance"
    alone = metrics["flow_matching_loss_without_context"] - metrics["flow_matching_loss"]
    beyond = metrics["linear_predictor_loss"] - metrics["flow_matching_loss"]
    share = f", {alone / beyond:.0%} of what it gains over the linear denoiser" if alone <= beyond else ""
    return f"to use the text before a block: it lowers the loss by {gain:.3f}{share}"


def heading(config: RunConfig) -> str:
    """The stage, of a family that has several; else the family."""
    stage = family_of(config).stage_of(config)
    return family_of(config).title if stage is None else f"Stage {stage}"


def cost_rows(name: str, cost: Cost) -> list[Row]:
    """What one run took; `name` says which."""
    seconds = "not recorded" if cost.seconds is None else f"{cost.seconds:,.0f} s"
    return [
        Row(f"{name}: tokens seen", f"{cost.tokens:,}", "steps times batch times sequence length, repeated tokens too"),
        Row(
            f"{name}: model FLOPs",
            f"{cost.flops:.3e}",
            "counted from the config: forward and backward, no recomputation",
        ),
        Row(f"{name}: training time", seconds, "in steps, measurements and saves, over all starts"),
    ]


def model_rows(config: RunConfig) -> list[Row]:
    """Parameters of each network that the run trains."""
    parts = family_of(config).parts(config)
    counts = [
        (what, sum(part.parameters for part in parts if f"{part.label}.".startswith(f"{name}.")), meaning)
        for name, what, meaning in family_of(config).page.networks
    ]
    rows = [Row(f"  {what}", f"{count:,}", meaning) for what, count, meaning in counts if count]
    whole = Row("parameters", f"{sum(count for _, count, _ in counts):,}", "counted from the config")
    reference = sum(part.parameters for part in parts if "reference" in part.label)
    if reference:
        rows.append(
            Row(
                "  frozen reference encoder",
                f"{reference:,}",
                "a copy of stage 1's, for the loss alone; not counted above",
            )
        )
    return [whole, *rows]


def cost_table(run: Run, first: tuple[Run, int] | None) -> Table:
    """The run's own cost, and in rows of its own that of the stage 1 it started from, up to that step."""
    stage = family_of(run.config).stage_of(run.config)
    rows = [] if first is None else cost_rows(f"stage 1, {first[0].folder.name}", first[0].cost(first[1]))
    return Table(
        "Cost",
        [
            *rows,
            *cost_rows(run.folder.name if stage is None else f"stage {stage}, {run.folder.name}", run.cost()),
        ],
    )


def accuracy_rows(accuracies: Mapping[str, tuple[float, float, float, int]]) -> list[Row]:
    """Of each task: accuracy, the ends of its 95% interval, and the number of items."""
    return [
        Row(
            f"accuracy, {name}",
            f"{value:.1%} of {count:,} items (95%: {low:.1%} to {high:.1%})",
            "share of items answered right; the interval is Wilson's, over the draw of items",
        )
        for name, (value, low, high, count) in accuracies.items()
    ]


def _row(metrics: Mapping[str, float], name: str, what: str, meaning: str) -> Row:
    """The value, with the half of its 95% interval where its standard error over sequences is known."""
    error = metrics.get(f"{name}_standard_error")
    return Row(what, f"{metrics[name]:.4f}" + (f" \u00b1 {1.96 * error:.4f}" if error is not None else ""), meaning)
