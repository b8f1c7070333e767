"""The HTML report of a run: complete, self-contained, safe against its contents, and honest about what is missing."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from cola_megatron.errors import UserError
from cola_megatron.reporting.page import Report, Sample, write_report

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def coarse_pictures(monkeypatch: pytest.MonkeyPatch):
    """Fewer dots: the time goes into them."""
    monkeypatch.setattr("cola_megatron.reporting.figure_style.DOTS_PER_INCH", 50)


FIGURES = (
    "stage_one_losses",
    "stage_two_losses",
    "reconstruction_accuracy",
    "flow_matching_by_time",
    "vae_logsnr",
    "speed_and_learning_rate",
    "generated_latents",
)
FROM_EVALUATION = {"reconstruction_accuracy", "flow_matching_by_time", "vae_logsnr"}
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
    return record | ({"flow_matching": 1.0 + 1.0 / step, "reference": 0.1} if stage == 2 else {})


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
        record |= {"flow_matching_loss": 1.4, "constant_predictor_loss": 2.0} | bins
    return record


def records_of(stage: int, steps: int = 100) -> list[dict]:
    """A training record every second step, a measurement every fiftieth."""
    records = [train_record(stage, step) for step in range(1, steps + 1, 2)]
    records += [evaluation_record(stage, step) for step in range(50, steps + 1, 50)]
    return sorted(records, key=lambda record: record["step"])


def write_records(folder: Path, records: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def sample(prompt: str = "Once upon", continuation: str = " a time", truth: str = " a midnight") -> Sample:
    return Sample(prompt, continuation, truth, torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)))


def report_of(
    tmp_path: Path,
    one: list[dict] | None = None,
    two: list[dict] | None = None,
    samples: list[Sample] | None = None,
    title: str = "A small run",
) -> Report:
    return Report(
        title,
        [("Parameters", "1.9 M & more")],
        write_records(tmp_path / "one", records_of(1) if one is None else one),
        write_records(tmp_path / "two", records_of(2) if two is None else two),
        [sample()] if samples is None else samples,
        [("Stage 1", "/runs/<one>")],
    )


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


def test_the_page_has_each_figure_once_and_the_folder_has_the_same_pictures(tmp_path: Path):
    path = write_report(tmp_path / "deep" / "report", report_of(tmp_path))
    assert path == tmp_path / "deep" / "report" / "report.html"
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


def test_the_page_needs_nothing_else(tmp_path: Path):
    page = Page(write_report(tmp_path / "report", report_of(tmp_path)))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base"}
    resources = [
        value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href", "srcset")
    ]
    assert resources
    assert all(value.startswith("data:") for value in resources)
    assert not re.search(r"https?://|url\(|@import", page.source)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path):
    report = report_of(tmp_path)
    assert write_report(tmp_path / "a", report).read_bytes() == write_report(tmp_path / "b", report).read_bytes()


def test_text_of_a_sample_is_shown_and_not_obeyed(tmp_path: Path):
    hostile = '</p><script>alert(1)</script> & "quoted" $x^$\n\n\tend'
    samples = [sample(hostile, hostile, hostile)]
    page = Page(write_report(tmp_path / "report", report_of(tmp_path, samples=samples, title=hostile)))
    assert "<script" not in page.source
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(hostile) == 5  # title twice, prompt, continuation, truth; white space kept


def test_characters_that_a_page_cannot_show_are_shown_as_pictures(tmp_path: Path):
    samples = [sample("a\x00b\x1b\x7f\x85", "c\ud800d", ""), sample("e", " \n ", "f")]
    page = Page(write_report(tmp_path / "report", report_of(tmp_path, samples=samples)))
    for text in ("a\u2400b\u241b\u2421\ufffd", "c\ufffdd", "(empty)", "(3 white-space characters)"):
        assert text in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page.source)


def test_missing_measurements_leave_figures_out_and_the_page_says_so(tmp_path: Path):
    folder = tmp_path / "report"
    write_report(folder, report_of(tmp_path))
    one, two = ([record for record in records_of(stage) if record["kind"] == "train"] for stage in (1, 2))
    page = Page(write_report(folder, report_of(tmp_path, one, two, samples=[])))
    left_out = FROM_EVALUATION | {"generated_latents"}
    assert page.left_out() == left_out
    assert set(page.ids("figure")) == set(FIGURES) - left_out
    assert "neither stage has evaluation records" in page.text
    assert "there are no samples" in page.text
    # The first report's pictures are not left beside the second's.
    assert {file.stem for file in (folder / "figures").iterdir()} == set(FIGURES) - left_out


def test_one_stage_alone_can_have_measurements(tmp_path: Path):
    two = [record for record in records_of(2) if record["kind"] == "train"]
    page = Page(write_report(tmp_path / "report", report_of(tmp_path, two=two)))
    assert page.left_out() == {"flow_matching_by_time"}


def without(records: list[dict], *keys: str) -> list[dict]:
    return [{key: value for key, value in record.items() if key not in keys} for record in records]


@pytest.mark.parametrize(
    ("one", "two", "left_out"),
    [
        pytest.param([], [], set(FIGURES) - {"generated_latents"}, id="empty logs"),
        pytest.param([train_record(1, 1)], [train_record(2, 1)], FROM_EVALUATION, id="one step"),
        pytest.param(
            without(records_of(1), "posterior", "vae_logsnr"),
            without(records_of(2), "posterior", "vae_logsnr"),
            {"vae_logsnr"},
            id="deterministic encoder",
        ),
        pytest.param(
            records_of(1),
            without(records_of(2), "reconstruction", "mask", "posterior", "reference", "reconstruction_nll"),
            set(),
            id="frozen VAE",
        ),
        pytest.param(
            records_of(1),
            without(records_of(2), f"flow_matching_loss_bin_{BINS - 1}", "flow_matching_loss_bin_0"),
            set(),
            id="bins without a draw",
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
    page = Page(write_report(tmp_path / "report", report_of(tmp_path, one, two)))
    assert page.left_out() == left_out


def test_a_stage_without_a_log_is_named(tmp_path: Path):
    report = report_of(tmp_path)
    (report.stage_two / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=re.escape(str(report.stage_two / "metrics.jsonl"))):
        write_report(tmp_path / "report", report)


@pytest.mark.parametrize(
    "latents",
    [torch.zeros(2, 4, 3), torch.full((1, 4, 3), float("nan")), torch.ones(1, 1, 1, dtype=torch.bfloat16)],
    ids=["zeros", "nan", "one number, bfloat16"],
)
@pytest.mark.filterwarnings("error")
def test_unusual_latents_are_drawn(tmp_path: Path, latents: torch.Tensor):
    page = Page(write_report(tmp_path / "report", report_of(tmp_path, samples=[Sample("a", "b", "c", latents)])))
    assert "generated_latents" in page.ids("figure")


def test_figures_show_what_was_measured(tmp_path: Path):
    from cola_megatron.reporting import figures
    from cola_megatron.reporting.figure_style import NothingToPlot

    one, two = records_of(1), records_of(2)
    axes = figures.flow_matching_by_time(two).axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([1.0 + index / BINS for index in range(BINS)])
    assert axes.lines[0].get_ydata() == pytest.approx([2.0, 2.0])
    panels = figures.reconstruction_accuracy(one, two).axes
    assert [[line.get_ydata()[-1] for line in axes.lines] for axes in panels] == [[0.99, 0.9, 0.5]] * 2
    faster = [{**record, "tokens_per_second": 50_000.0} for record in two if record["kind"] == "train"]
    assert figures.speed_and_learning_rate(one, faster).axes[0].get_ylim()[1] > 50_000
    with pytest.raises(NothingToPlot, match="stage 2"):
        figures.flow_matching_by_time(one)


def test_the_figures_leave_the_global_style_alone(tmp_path: Path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_report(tmp_path / "report", report_of(tmp_path))
    assert dict(matplotlib.rcParams) == before
