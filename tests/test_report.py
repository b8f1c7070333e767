"""The HTML report of a run: complete, self-contained, safe against its contents, and honest about what is missing."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from cola_megatron.families.cola.page import PAGE
from cola_megatron.reporting.page import write_report
from cola_megatron.reporting.report import Report, Row, Sample, Stage, Table

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True, scope="module")
def coarse_pictures():
    """Fewer dots: the time goes into them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cola_megatron.reporting.figure_style.DOTS_PER_INCH", 50)
        yield


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch):
    """For tests that do not look at the pictures: they are made, and not rendered."""
    monkeypatch.setattr("cola_megatron.reporting.pictures.png_of", lambda figure, dots: b"")


FIGURES = (
    "stage_one_losses",
    "stage_two_losses",
    "prior_over_steps",
    "flow_matching_by_time",
    "weighted_terms",
    "gradient_norm",
    "reconstruction_accuracy",
    "vae_logsnr",
    "posterior_dimensions",
    "speed_and_learning_rate",
    "generated_latents",
)
OF_THE_PRIOR = {"prior_over_steps", "flow_matching_by_time"}
FROM_EVALUATION = OF_THE_PRIOR | {"reconstruction_accuracy", "vae_logsnr"}
BINS = 10


def train_record(stage: int, step: int) -> dict:
    """What the loop logs at a training step."""
    record = {
        "kind": "train",
        "step": step,
        "loss": 9.0 / step,
        "reconstruction": 7.0 / step,
        "mask": 7.5 / step**0.5,
        "posterior": 3.0 * step,
        "gradient_norm": 1.0,
        "learning_rate": 1e-3 / step,
        "tokens_per_second": 10_000.0 + step,
        "seconds": float(step),
    }
    of_prior = {"flow_matching": 1.0 + 1.0 / step, "reference": 0.1, "gradient_norm_vae": 0.6, "gradient_norm_dit": 0.8}
    return record | (of_prior if stage == 2 else {})


def evaluation_record(stage: int, step: int) -> dict:
    """What the loop logs at a held-out measurement."""
    record = {
        "kind": "evaluation",
        "step": step,
        "reconstruction_accuracy": 0.99,
        "reconstruction_accuracy_t250": 0.9,
        "reconstruction_accuracy_t500": 0.5,
        "reconstruction_nll": 0.1,
        "vae_logsnr": 4.0,
        "seconds": float(step),
    }
    if stage == 2:
        bins = {f"flow_matching_loss_bin_{index}": 1.0 + index / BINS for index in range(BINS)}
        record |= {
            "flow_matching_loss": 1.4,
            "flow_matching_loss_standard_error": 0.01,
            "flow_matching_loss_without_context": 1.5,
            "flow_matching_loss_training_times": 1.45,
            "linear_predictor_loss": 1.6,
            "constant_predictor_loss": 2.0,
            **bins,
        }
    return record


def records_of(stage: int, steps: int = 100) -> list[dict]:
    """A training record every second step, a measurement every fiftieth."""
    records = [train_record(stage, step) for step in range(1, steps + 1, 2)]
    records += [evaluation_record(stage, step) for step in range(50, steps + 1, 50)]
    return sorted(records, key=lambda record: record["step"])


POSTERIOR = {
    f"posterior_{name}_{index}": value / (1 + index)
    for name, value in {"mean_square": 1.0, "variance": 0.1, "kl": 2.0, "eigenvalue": 1.1, "signal": 1.0}.items()
    for index in range(4)
}


def sample(prompt: str = "Once upon", continuation: str = " a time", truth: str = " a midnight") -> Sample:
    return Sample(prompt, continuation, truth, torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)))


def report_of(
    one: list[dict] | None = None,
    two: list[dict] | None = None,
    samples: list[Sample] | None = None,
    title: str = "A small run",
    **others,
) -> Report:
    weights = {"posterior": 0.001, "reconstruction": 1.0, "mask": 1.0}
    told = {
        "title": title,
        "status": "Stage 2, finished at step 100 of 100.",
        "notes": ["nothing is missing"],
        "tables": [Table("Model", [Row("Parameters", "1.9 M & more", "counted <from> the config")])],
        "page": PAGE,
        "stage_one": Stage(records_of(1) if one is None else one, weights),
        "stage_two": Stage(records_of(2) if two is None else two, weights | {"flow_matching": 1.0, "reference": 0.01}),
        "measured": POSTERIOR,
        "measured_at": 100,
        "samples": [sample()] if samples is None else samples,
        "samples_absent": "there are no samples",
        "sampling": [Row("guidance", "3")],
        "reconstructed": [],
        "texts": [],
        "about": [Row("command", "cola train tiny")],
        "config": "stage: 2\n",
        "files": [("Stage 1", "/runs/<one>")],
    }
    return Report(**{**told, **others})


class Page(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def ids(self, tag: str) -> list[str | None]:
        return [attributes.get("id") for name, attributes in self.tags if name == tag]

    def left_out(self) -> set[str | None]:
        return {attributes["id"] for _, attributes in self.tags if attributes.get("class") == "left-out"}


class Written(NamedTuple):
    """A report that was written, and matplotlib's settings at that time."""

    folder: Path
    path: Path
    settings_before: dict
    settings_after: dict


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, coarse_pictures) -> Written:
    """Of a run that has all pictures."""
    import matplotlib

    folder, before = tmp_path_factory.mktemp("written") / "deep" / "report", dict(matplotlib.rcParams)
    return Written(folder, write_report(folder, report_of()), before, dict(matplotlib.rcParams))


def test_the_page_has_each_figure_once_and_the_folder_has_the_same_pictures(written: Written):
    path = written.path
    assert path == written.folder / "report.html"
    page = Page(path)
    assert page.ids("figure") == list(FIGURES)
    assert not page.left_out()
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    files = {file.stem: file.read_bytes() for file in (path.parent / "figures").iterdir()}
    assert set(files) == set(FIGURES)
    assert [base64.b64decode(picture.removeprefix("data:image/png;base64,")) for picture in pictures] == [
        files[name] for name in FIGURES
    ]
    for text in ("A small run", "1.9 M & more", "/runs/<one>", "Once upon a time", " a midnight"):
        assert text in page.text


@pytest.mark.usefixtures("unrendered")
def test_the_page_needs_nothing_else(tmp_path: Path):
    page = Page(write_report(tmp_path / "report", report_of()))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base"}
    resources = [
        value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href", "srcset")
    ]
    assert resources
    assert all(value.startswith("data:") for value in resources)
    assert not re.search(r"https?://|url\(|@import", page.source)


def test_the_same_run_gives_the_same_bytes(written: Written, tmp_path: Path):
    assert write_report(tmp_path / "again", report_of()).read_bytes() == written.path.read_bytes()


@pytest.mark.usefixtures("unrendered")
def test_text_of_a_sample_is_shown_and_not_obeyed(tmp_path: Path):
    hostile = '</p><script>alert(1)</script> & "quoted" $x^$\n\n\tend'
    samples = [sample(hostile, hostile, hostile)]
    page = Page(write_report(tmp_path / "report", report_of(samples=samples, title=hostile)))
    assert "<script" not in page.source
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(hostile) == 5  # title twice, prompt, continuation, truth; white space kept


@pytest.mark.usefixtures("unrendered")
def test_characters_that_a_page_cannot_show_are_shown_as_pictures(tmp_path: Path):
    samples = [sample("a\x00b\x1b\x7f\x85", "c\ud800d", ""), sample("e", " \n ", "f")]
    page = Page(write_report(tmp_path / "report", report_of(samples=samples)))
    for text in ("a\u2400b\u241b\u2421\ufffd", "c\ufffdd", "(empty)", "(3 white-space characters)"):
        assert text in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page.source)


@pytest.mark.usefixtures("unrendered")
def test_missing_measurements_leave_figures_out_and_the_page_says_so(tmp_path: Path):
    folder = tmp_path / "report"
    write_report(folder, report_of())
    one, two = ([record for record in records_of(stage) if record["kind"] == "train"] for stage in (1, 2))
    page = Page(write_report(folder, report_of(one, two, samples=[])))
    left_out = FROM_EVALUATION | {"generated_latents"}
    assert page.left_out() == left_out
    assert set(page.ids("figure")) == set(FIGURES) - left_out
    assert "neither stage has evaluation records" in page.text
    assert "no held-out measurements at uniform t" in page.text
    assert "there are no samples" in page.text
    # The first report's pictures are not left beside the second's.
    assert {file.stem for file in (folder / "figures").iterdir()} == set(FIGURES) - left_out


@pytest.mark.usefixtures("unrendered")
def test_one_stage_alone_can_have_measurements(tmp_path: Path):
    two = [record for record in records_of(2) if record["kind"] == "train"]
    page = Page(write_report(tmp_path / "report", report_of(two=two)))
    assert page.left_out() == OF_THE_PRIOR


def without(records: list[dict], *keys: str) -> list[dict]:
    return [{key: value for key, value in record.items() if key not in keys} for record in records]


@pytest.mark.parametrize(
    ("one", "two", "left_out"),
    [
        pytest.param([], [], set(FIGURES) - {"generated_latents", "posterior_dimensions"}, id="empty logs"),
        pytest.param([train_record(1, 1)], [train_record(2, 1)], FROM_EVALUATION, id="one step"),
        pytest.param(
            without(records_of(1), "posterior", "vae_logsnr"),
            without(records_of(2), "posterior", "vae_logsnr"),
            {"vae_logsnr"},
            id="deterministic encoder",
        ),
        pytest.param(
            records_of(1),
            without(
                records_of(2),
                *("reconstruction", "mask", "posterior", "reference", "reconstruction_nll"),
                *(f"flow_matching_loss_bin_{index}" for index in (0, BINS - 1)),
            ),
            set(),
            id="frozen VAE, bins without a draw",
        ),
        pytest.param(
            [{**record, "reconstruction": float("nan"), "mask": float("inf")} for record in records_of(1)],
            [{**record, "flow_matching": float("nan")} for record in records_of(2)],
            set(),
            id="diverged",
        ),
    ],
)
@pytest.mark.filterwarnings("error")
def test_records_of_unusual_runs_are_survived(tmp_path: Path, one: list[dict], two: list[dict], left_out: set[str]):
    page = Page(write_report(tmp_path / "report", report_of(one, two)))
    assert page.left_out() == left_out


@pytest.mark.usefixtures("unrendered")
def test_a_stage_that_a_run_does_not_have_is_no_gap_without_a_word(tmp_path: Path):
    page = Page(write_report(tmp_path / "report", report_of(stage_one=Stage(absent="there was no stage 1"))))
    assert page.left_out() == {"stage_one_losses"}
    assert "there was no stage 1" in page.text


@pytest.mark.usefixtures("unrendered")
def test_the_page_explains_its_numbers_and_names_its_origin(tmp_path: Path):
    page = Page(write_report(tmp_path / "report", report_of(refresh_seconds=30.0)))
    for text in (
        "counted <from> the config",
        "nothing is missing",
        "finished at step 100",
        "cola train tiny",
        "stage: 2",
    ):
        assert text in page.text
    assert ("meta", {"http-equiv": "refresh", "content": "30"}) in page.tags
    assert "details" in {tag for tag, _ in page.tags}
    finished = Page(write_report(tmp_path / "report", report_of()))
    assert "refresh" not in {attributes.get("http-equiv") for _, attributes in finished.tags}


@pytest.mark.parametrize(
    "latents",
    [torch.zeros(2, 4, 3), torch.full((1, 4, 3), float("nan")), torch.ones(1, 1, 1, dtype=torch.bfloat16)],
    ids=["zeros", "nan", "one number, bfloat16"],
)
@pytest.mark.filterwarnings("error")
def test_unusual_latents_are_drawn(tmp_path: Path, latents: torch.Tensor):
    alone = report_of([], [], [Sample("a", "b", "c", latents)], measured={})
    page = Page(write_report(tmp_path / "report", alone))
    assert page.ids("figure") == ["generated_latents"]


def test_figures_show_what_was_measured(tmp_path: Path):
    from cola_megatron.reporting import figures, latent_figures, prior_figures
    from cola_megatron.reporting.figure_style import NothingToPlot

    one, two = records_of(1), records_of(2)
    axes = prior_figures.flow_matching_by_time(two).axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([1.0 + index / BINS for index in range(BINS)])
    assert axes.lines[0].get_ydata() == pytest.approx([2.0, 2.0])
    panels = figures.reconstruction_accuracy(PAGE.stages, one, two).axes
    assert [[line.get_ydata()[-1] for line in axes.lines] for axes in panels] == [[0.99, 0.9, 0.5]] * 2
    faster = [{**record, "tokens_per_second": 50_000.0} for record in two if record["kind"] == "train"]
    assert figures.speed_and_learning_rate(PAGE.stages, one, faster).axes[0].get_ylim()[1] > 50_000
    losses = prior_figures.prior_over_steps(two).axes[0]
    assert [line.get_ydata()[-1] for line in losses.lines] == [1.4, 1.5, 1.6, 2.0]
    weights = {"posterior": 0.001, "reconstruction": 2.0}
    terms = {line.get_label(): line for line in figures.weighted_terms(PAGE.stages, one, [], weights, {}).axes[0].lines}
    assert terms["2 x reconstruction"].get_ydata()[0] == pytest.approx(14.0)
    assert "0.001 x posterior" in terms
    spectrum = latent_figures.posterior_dimensions(POSTERIOR).axes[2]
    assert spectrum.lines[0].get_ydata()[:2] == pytest.approx([1.1, 0.55])
    with pytest.raises(NothingToPlot, match="stage 2"):
        prior_figures.flow_matching_by_time(one)


def test_the_figures_leave_the_global_style_alone(written: Written):
    assert written.settings_after == written.settings_before
