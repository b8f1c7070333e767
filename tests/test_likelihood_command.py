"""`cola eval likelihood` and `cola eval robustness`."""

import json
import math
from pathlib import Path

import pytest

from cola_megatron.config import ConfigError, load_config
from cola_megatron.errors import UserError
from cola_megatron.training.loop import train
from tests.support import TINY
from tests.test_cli import cola
from tests.test_families import small


def run_of(corpus: Path, runs: Path, *overrides: str) -> Path:
    """Run folder of a short run."""
    config = load_config("tiny", [*TINY, f"data.path={corpus}", f"runs_folder={runs}", *overrides])
    train(config, progress=False)
    return config.run_folder


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    """Run folder with both networks."""
    return run_of(corpus, tmp_path_factory.mktemp("runs"), "stage=2", "training.steps=2")


@pytest.fixture(scope="module")
def reconstructing(corpus, tmp_path_factory) -> Path:
    """Run folder of a Text VAE that has learned to reconstruct."""
    schedule = ["training.steps=200", "training.schedule.decay_steps=200", "training.optimizer.learning_rate=0.003"]
    return run_of(corpus, tmp_path_factory.mktemp("stage_one"), "stage=1", *schedule)


def test_the_likelihood_of_held_out_sequences(trained, tmp_path):
    output = tmp_path / "likelihood.json"
    command = ["eval", "likelihood", trained, "--limit", 3, "--steps", 4, "--samples", 2]
    found = json.loads(cola(*command, "--output", output, "--json"))
    items = json.loads(output.read_text())["items"]
    assert (found["texts"], found["tokens"], len(items)) == (3, 96, 3)
    assert found["settings"]["steps"] == 4 and found["settings"]["solver"] == "adams_bashforth"
    total = sum(item["elbo"] for item in items)
    assert found["elbo"]["value"] == pytest.approx(total / 96)
    assert found["elbo"]["low"] < found["elbo"]["value"] < found["elbo"]["high"]
    headline = found["nats_per_token"]
    assert headline["kind"] == "bound" and headline["value"] == pytest.approx(-total / 96)
    assert headline["high"] - headline["value"] == pytest.approx(1.96 * headline["standard_error"], rel=1e-3)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(-total / 96))
    written = sum(item["text_bytes"] for item in items)
    assert found["bits_per_byte"]["value"] == pytest.approx(-total / written / math.log(2))
    terms = {name: found[name]["value"] for name in ("reconstruction", "prior", "posterior")}
    assert terms["reconstruction"] + terms["prior"] - terms["posterior"] == pytest.approx(found["elbo"]["value"])
    table = cola(*command)
    assert "3 texts, 96 tokens" in table
    for row in (
        "-log p, upper bound",
        "reconstruction",
        "prior",
        "posterior",
        "ELBO",
        "IWAE",
        "perplexity per token",
        "bits per byte",
    ):
        assert row in table


@pytest.mark.parametrize(
    ("name", "kind"), [("autoregressive", "exact"), ("masked_diffusion", "bound"), ("plaid", "bound")]
)
def test_every_family_states_nats_per_token(name, kind, corpus, tmp_path):
    config = small(name, corpus, tmp_path, "training.steps=1", "training.evaluation.samples=4")
    train(config, progress=False)
    samples = [] if kind == "exact" else ["--samples", 2]
    found = json.loads(cola("eval", "likelihood", config.run_folder, "--limit", 4, *samples, "--json"))
    headline = found["nats_per_token"]
    assert headline["kind"] == kind and headline["value"] == -found["elbo"]["value"]
    assert (headline["draw_error"] == 0) == (kind == "exact")
    assert headline["standard_error"] > 0 and headline["low"] == -found["elbo"]["high"]


def test_the_likelihood_of_a_file(trained, tmp_path):
    rows, lines = tmp_path / "pairs.jsonl", tmp_path / "texts.txt"
    pairs = [{"question": "the prior", "answer": " writes"}, {"question": "", "answer": "noise"}]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    lines.write_text("the prior writes\n\nnoise\n")
    quick = ["--steps", 2, "--samples", 1, "--json"]
    command = ["eval", "likelihood", trained, "--file", rows, "--field", "answer"]
    conditional = json.loads(cola(*command, "--context-field", "question", *quick))
    assert (conditional["texts"], conditional["nats_per_token"]["kind"]) == (2, "estimate")  # one text has a context
    assert json.loads(cola("eval", "likelihood", trained, "--file", lines, "--limit", 1, *quick))["texts"] == 1
    assert json.loads(cola(*command, "--limit", 1, *quick))["elbo"]["low"] is None  # one text shows no spread
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: no text under 'reply'; there are question, answer"):
        cola("eval", "likelihood", trained, "--file", rows, "--field", "reply")
    lines.write_text("\n")
    with pytest.raises(UserError, match="holds no text"):
        cola("eval", "likelihood", trained, "--file", lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--solver", "rk4"], "solver=rk4 must be one of"),
        (["--samples", 0], "samples=0 must be at least 1"),
        (["--context-field", "a"], "--context-field needs --file"),
        (["--data", "x", "--file", "y.txt"], "--data and --file exclude each other"),
    ],
)
def test_wrong_use_of_likelihood(trained, options, message):
    with pytest.raises(ConfigError, match=message):
        cola("eval", "likelihood", trained, *options)


def test_an_exported_model_names_no_data():
    with pytest.raises(ConfigError, match="is no run with data of its own: give --data FOLDER or --file FILE"):
        cola("eval", "likelihood", Path(__file__).parent / "data" / "reference_tiny")


def test_the_robustness_curve_falls_for_a_model_that_has_learned(reconstructing):
    command = ["eval", "robustness", reconstructing, "--limit", 8]
    curve = json.loads(cola(*command, "--times", "0,0.25,0.5,1", "--json"))["curve"]
    accuracy, cross_entropy = ([point[name] for point in curve] for name in ("accuracy", "cross_entropy"))
    assert [point["t"] for point in curve] == [0.0, 0.25, 0.5, 1.0]
    assert accuracy[0] > 0.7 and accuracy == sorted(accuracy, reverse=True) and accuracy[-1] < 0.2
    assert cross_entropy == sorted(cross_entropy)
    assert "nats per token" in cola(*command)
    for times, message in (("0,2", "t=2.0 must lie in 0 .. 1"), ("a", "could not convert string to float")):
        with pytest.raises(ConfigError, match=message):
            cola(*command, "--times", times)


def test_the_robustness_figure(trained, tmp_path):
    pytest.importorskip("matplotlib")
    cola("eval", "robustness", trained, "--limit", 2, "--times", "0,1", "--figure", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
