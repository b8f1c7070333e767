"""The main job, small: embedded corpus -> stage 1 -> stage 2 -> export -> generate -> evaluate -> report."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cola_megatron.config import RunConfig, load_config
from cola_megatron.errors import ExitCode, UserError
from cola_megatron.reporting.continuations import Sampling, continue_held_out
from cola_megatron.reporting.observed import ALL, Observed
from cola_megatron.reporting.page import write_report
from cola_megatron.reporting.report import Report, Sample
from cola_megatron.reporting.run_page import report_of_run
from cola_megatron.reporting.run_records import read_run
from launchers.output import print_table

if TYPE_CHECKING:
    from cola_megatron import ColaDLM
    from cola_megatron.training.loop import Summary

NAME = "quickstart"
STAGE_ONE_STEPS, STAGE_TWO_STEPS = 400, 1_200
RECIPE = (
    "model.vocab_size=1024",
    "model.dit.block_size=1",
    "objective.flow.time.loc=1.9",
    "objective.flow.time.scale=1.6",
    "training.global_batch_size=8",
    "training.micro_batch_size=8",
)
"""What makes a prior that reads its context out of minutes on two cores (docs/quickstart.md): blocks of one latent,
which leave most to be said by the text before them; times near 1, where little else says anything, without giving up
those near 0; and many small steps instead of few large ones."""
SAMPLING = Sampling(samples=4, prompt_tokens=48, new_tokens=48, options={"guidance_scale": 4.0})
SUMMARISED = (
    "reconstruction_accuracy",
    "flow_matching_loss",
    "flow_matching_loss_standard_error",
    "flow_matching_loss_shuffled_context",
    "flow_matching_loss_without_context",
    "linear_predictor_loss",
    "constant_predictor_loss",
    "context_gain",
    "context_gain_standard_error",
    "context_information",
    "context_information_standard_error",
)
"""What the summary takes over of the held-out measurement."""


class Stopped(UserError):
    """A signal ended a stage before its last step, and its state is saved."""

    exit_code = ExitCode.STOPPED


@dataclass(frozen=True)
class Layout:
    """Where the parts of the quickstart lie."""

    folder: Path

    @property
    def data(self) -> Path:
        """Token shards and tokenizer."""
        return self.folder / "data"

    @property
    def stage_one(self) -> Path:
        """Run folder of the Text VAE."""
        return self.folder / "stage1"

    @property
    def stage_two(self) -> Path:
        """Run folder of VAE and DiT."""
        return self.folder / "stage2"

    @property
    def export(self) -> Path:
        """The model in the published layout."""
        return self.folder / "export"

    @property
    def samples(self) -> Path:
        """Generated continuations of held-out text."""
        return self.folder / "samples" / "samples.json"

    @property
    def summary(self) -> Path:
        """The table as JSON."""
        return self.folder / "summary.json"


def run_quickstart(runs_folder: str | Path) -> dict[str, float]:
    """Runs what is not finished yet, prints the table, and returns the summary."""
    layout = Layout(Path(runs_folder) / NAME)
    _announce(1, "prepare the documentation that ships with Python")
    _prepare(layout)
    _announce(2, f"stage 1: Text VAE, {STAGE_ONE_STEPS} steps")
    first = _train(stage_config(layout, 1))
    _announce(3, f"stage 2: VAE and diffusion prior together, {STAGE_TWO_STEPS} steps")
    second = _train(stage_config(layout, 2))
    _announce(4, "export to the published inference layout")
    model = _export(layout)
    _announce(5, f"continue {SAMPLING.samples} held-out texts, and measure on all of them")
    samples = _generate(model, layout)
    measured = _measure(layout)
    summary = {
        **{name: value for name, value in measured.items() if name in SUMMARISED},
        "tokens": first.tokens + second.tokens,
        "model_flops": first.model_flops + second.model_flops,
        "seconds": first.seconds + second.seconds,
    }
    _announce(6, "write the report")
    files = [
        ("model, published layout", str(layout.export)),
        ("samples", str(layout.samples)),
        ("summary", str(layout.summary)),
    ]
    observed = Observed(second.step, measured, samples, sampling=SAMPLING.rows(stage_config(layout, 2)))
    report = report_of_run(read_run(layout.stage_two), observed, title="cola_megatron quickstart", files=files)
    page = write_report(layout.folder, report)
    layout.summary.write_text(json.dumps(summary, indent=1) + "\n")
    _print(report)
    print_table([("report", str(page)), *report.files], title="Where everything lies")
    return summary


def _print(report: Report) -> None:
    """The tables of the page, without their explanations."""
    for table in report.tables:
        print_table([(row.what, row.value) for row in table.rows], title=table.title)


def stage_config(layout: Layout, stage: int) -> RunConfig:
    """The config of one stage: the preset `tiny` with the quickstart's length."""
    steps = STAGE_ONE_STEPS if stage == 1 else STAGE_TWO_STEPS
    overrides = [
        f"stage={stage}",
        f"runs_folder={layout.folder}",
        f"name=stage{stage}",
        f"data.path={layout.data}",
        f"training.steps={steps}",
        f"training.schedule.decay_steps={steps}",
        "training.schedule.warmup_steps=25",
        "training.evaluation.every=400",
        "training.checkpoint.every=200",
        "training.log.every=20",
        *RECIPE,
    ]
    if stage == 2:
        overrides.append(f"training.stage_one={layout.stage_one}")
    return load_config("tiny", overrides)


def _announce(number: int, what: str) -> None:
    print(f"\n[{number}/6] {what}", flush=True)


def _prepare(layout: Layout) -> None:
    from data_prep.prepare import prepare
    from launchers.prep_recipes import from_options

    config = load_config("tiny", RECIPE)
    recipe = from_options(
        ["embedded"],
        layout.data,
        tokenizer={"vocab_size": config.model.vocab_size},
        packing={"sequence_length": config.data.sequence_length},
    )
    prepare(recipe)


def _train(config: RunConfig) -> "Summary":
    from cola_megatron.training.loop import train

    summary = train(config)
    if summary.stopped_by_signal:
        raise Stopped(
            f"{summary.run_folder}: stopped by a signal after step {summary.step:,} of {config.training.steps:,}, "
            "which is saved; the same command goes on from there"
        )
    return summary


def _export(layout: Layout) -> "ColaDLM":
    """Writes the export and reads it back: what generates below is what a user of the export gets."""
    from cola_megatron import ColaDLM

    ColaDLM.from_checkpoint(layout.stage_two, device="cpu").save_published(layout.export)
    return ColaDLM.from_published(layout.export)


def _generate(model: "ColaDLM", layout: Layout) -> list[Sample]:
    found = continue_held_out(model, stage_config(layout, 2), layout.data, layout.samples, SAMPLING)
    for item in found:
        print(f"  ...{item.prompt[-60:]!r} -> {item.continuation[:80]!r}")
    return found


def _measure(layout: Layout) -> dict[str, float]:
    from cola_megatron.held_out.measure_checkpoint import measure_checkpoint

    return measure_checkpoint(layout.stage_two, layout.data, samples=ALL)
