"""The commands after training: eval, export, import, generate; and what they answer to wrong use."""

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cola_megatron import ColaDLM
from cola_megatron.checkpoint.find import newest_checkpoint
from cola_megatron.checkpoint.load import read_weights
from cola_megatron.config import ConfigError, RunConfig
from cola_megatron.errors import ExitCode, UserError
from cola_megatron.records.run_folder import Summary
from cola_megatron.training.loop import train
from launchers.cli import app, main
from launchers.quickstart import run_quickstart
from tests.support import TINY


def cola(*arguments: object) -> str:
    """Runs a command in this process and returns what it printed; its error is raised as itself."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def trained(tiny) -> Path:
    """Run folder of a short stage-2 run."""
    config = tiny(2, "training.steps=2")
    train(config, progress=False)
    return config.run_folder


def test_export_generates_like_the_checkpoint_and_imports_back(trained, tmp_path):
    exported, imported = tmp_path / "export", tmp_path / "imported"
    cola("convert", "export", trained, exported)
    from_checkpoint, from_published = ColaDLM.from_checkpoint(trained), ColaDLM.from_published(exported)
    prompts = ["the prior writes", "noise and meaning flows back to words of the latent blocks"]
    settings = {"max_new_tokens": 16, "steps": 4, "guidance_scale": 3.0}
    for expected, found in zip(
        from_checkpoint.generate(prompts, **settings), from_published.generate(prompts, **settings), strict=True
    ):
        assert expected.text == found.text
        assert torch.equal(expected.latents, found.latents)
    cola("convert", "import", exported, imported, "--config", "tiny")
    weights, again = read_weights(newest_checkpoint(trained))[1], read_weights(imported)[1]
    assert weights.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    assert ColaDLM.from_checkpoint(imported).generate(prompts, **settings)[0].text == expected_text(from_checkpoint)


def test_a_resharded_checkpoint_is_a_checkpoint(trained, tmp_path):
    resharded = tmp_path / "resharded"
    assert cola("convert", "reshard", trained, resharded, "--ranks", 2).strip() == str(resharded)
    weights, again = read_weights(newest_checkpoint(trained))[1], read_weights(resharded)[1]
    assert weights.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def expected_text(model: ColaDLM) -> str:
    return model.generate(["the prior writes"], max_new_tokens=16, steps=4, guidance_scale=3.0)[0].text


def test_stage_two_starts_from_an_imported_model(trained, tiny, tmp_path):
    exported, imported = tmp_path / "export", tmp_path / "imported"
    cola("convert", "export", trained, exported)
    cola("convert", "import", exported, imported, "--config", "tiny")
    for name, source in (("from-import", imported), ("from-export", exported / "cola_vae")):
        config = tiny(
            2,
            f"name={name}",
            "training.steps=1",
            "training.vae_update.from_scratch=false",
            f"training.stage_one={source}",
        )
        assert train(config, progress=False).finished


def test_a_vae_block_beyond_the_prior_s_is_no_stage_two_checkpoint(trained, tmp_path):
    exported = tmp_path / "export"
    cola("convert", "export", trained, exported)
    path = exported / "cola_vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"block_size": 16}))
    ColaDLM.from_published(exported)
    rule = r"model.dit.block_size=8 must be divisible by model.vae.block_size=16 in stage 2"
    with pytest.raises(ConfigError, match=rule):
        cola("convert", "import", exported, tmp_path / "imported", "--config", "tiny")


def test_bf16_export_is_half_the_size_and_loads(trained, tmp_path):
    sizes = {}
    for precision in ("fp32", "bf16"):
        cola("convert", "export", trained, tmp_path / precision, "--precision", precision)
        sizes[precision] = (tmp_path / precision / "cola_vae" / "model.safetensors").stat().st_size
        ColaDLM.from_published(tmp_path / precision)
    assert sizes["bf16"] < 0.6 * sizes["fp32"]


def test_eval_measures_a_run(trained):
    metrics = json.loads(cola("eval", trained, "--samples", 8, "--json"))
    summary = json.loads((trained / "summary.json").read_text())
    for name, value in summary["metrics"].items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    assert "reconstruction accuracy" in cola("eval", trained, "--samples", 8)


def test_generate_prints_text_or_json(trained, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the prior\n\nof noise\n")
    options = ["--max-new-tokens", 8, "--steps", 2]
    answers = json.loads(cola("generate", trained, "--prompts-file", prompts, "--json", *options))
    assert [answer["prompt"] for answer in answers] == ["the prior", "of noise"]
    assert len(answers[0]["token_ids"]) == 8
    assert cola("generate", trained, "-p", "the prior", *options).startswith("the prior" + answers[0]["text"])


def test_a_corpus_without_held_out_documents_is_refused(tmp_path):
    text = tmp_path / "one.txt"
    text.write_text("the prior writes latent blocks of noise and meaning flows back to words. " * 200)
    with pytest.raises(UserError, match=r"no document fell into (train|held_out).*--held-out-fraction"):
        cola("prep", "run", text, "--output", tmp_path / "out", "--vocab-size", 270, "--sequence-length", 16)


def test_wrong_use_is_named(trained, tiny, tmp_path):
    with pytest.raises(ConfigError, match="--prompt"):
        cola("generate", trained)
    with pytest.raises(ConfigError, match="steps=0 must be at least 1"):
        cola("generate", trained, "-p", "x", "--steps", 0)
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        cola("eval", tmp_path)
    with pytest.raises(UserError, match=r"exists; give a new folder"):
        cola("convert", "import", trained, trained)
    first = tiny(1, "name=first", "training.steps=1")
    train(first, progress=False)
    with pytest.raises(UserError, match="no prior"):
        cola("generate", first.run_folder, "-p", "x")
    for option, value in (("guidance-scale", "nan"), ("temperature", "inf"), ("repetition-penalty", "inf")):
        with pytest.raises(ConfigError, match=rf"{option.replace('-', '_')}={value} must be finite"):
            cola("generate", trained, "-p", "x", f"--{option}", value)
    with pytest.raises(ConfigError, match=rf"noise_seed={2**63} must lie in"):
        cola("generate", trained, "-p", "x", "--noise-seed", 2**63)
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(b"the\xff\n")
    with pytest.raises(ConfigError, match=r"prompts.txt: not a text file"):
        cola("generate", trained, "--prompts-file", prompts)
    refused = CliRunner().invoke(app, ["eval", str(trained), "--samples", "0"])
    assert refused.exit_code == 2 and "--samples" in refused.output


def test_the_largest_noise_seeds_and_ids_generate(trained):
    model = ColaDLM.from_checkpoint(trained)
    for sign in (-1, 1):
        model.generate(["the"], ids=[sign * 2**52], noise_seed=sign * 2**62, max_new_tokens=16, steps=1, temperature=1)


def test_what_the_file_system_refuses_is_one_line(trained, corpus, tmp_path, monkeypatch, capsys):
    file = tmp_path / "a-file"
    file.write_text("")
    for arguments in (
        ["convert", "export", trained, file],
        ["prep", "run", "embedded", "--output", file / "data"],
        ["quickstart", "--runs-folder", file],
        ["train", "tiny", *TINY, f"data.path={corpus}", f"runs_folder={file}"],
    ):
        monkeypatch.setattr(sys, "argv", ["cola", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        message = capsys.readouterr().err
        assert exit_.value.code == 1
        assert message.startswith(f"cola: {file}") and message.count("\n") == 1, message


def test_a_sample_does_not_depend_on_its_batch(trained):
    model = ColaDLM.from_checkpoint(trained)
    prompts, ids = ["", "the", "noise and meaning flows back to words of the latent blocks"], [7, 8, 9]
    settings = {"max_new_tokens": 16, "steps": 4}
    together = model.generate(prompts, ids, **settings)
    for prompt, sample, expected in zip(prompts, ids, together, strict=True):
        (alone,) = model.generate([prompt], [sample], **settings)
        assert torch.equal(alone.token_ids, expected.token_ids)
        torch.testing.assert_close(alone.latents, expected.latents, rtol=1e-4, atol=1e-5)


def test_temperature_draws_repeatably_and_differently_from_greedy(trained):
    model = ColaDLM.from_checkpoint(trained)

    def draw(temperature: float, seed: int) -> list[int]:
        (output,) = model.generate(["the"], temperature=temperature, noise_seed=seed, max_new_tokens=16, steps=2)
        return output.token_ids.tolist()

    assert draw(1.0, 1) == draw(1.0, 1)
    assert draw(1.0, 1) != draw(1.0, 2)
    assert draw(1.0, 1) != draw(0.0, 1)


@pytest.mark.parametrize(
    "command",
    [[], ["prep", "run"], ["config"], ["train"], ["convert", "export"], ["convert", "reshard"], ["generate"], ["eval"]],
)
def test_every_command_has_help_with_an_example(command):
    shown = cola(*command, "--help")
    if command:
        assert "Example" in shown


def test_a_signal_ends_the_quickstart_in_one_line(tmp_path, monkeypatch):
    def stopped(config: RunConfig) -> Summary:
        return Summary(str(config.run_folder), 7, False, 0, 0.0, 0.0, {}, stopped_by_signal=True)

    monkeypatch.setattr("cola_megatron.training.loop.train", stopped)
    monkeypatch.setattr("launchers.quickstart._prepare", lambda layout: None)
    with pytest.raises(UserError, match=r"stage1: stopped by a signal after step 7 of 400.*same command goes") as ended:
        run_quickstart(tmp_path)
    assert ended.value.exit_code == ExitCode.STOPPED and "\n" not in str(ended.value)


@pytest.mark.slow
def test_the_quickstart_reaches_its_marks(tmp_path):
    cola("quickstart", "--runs-folder", tmp_path)
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    assert summary["reconstruction_accuracy"] >= 0.95
    for baseline in ("flow_matching_loss_without_context", "linear_predictor_loss"):
        assert summary["flow_matching_loss"] < summary[baseline] - 0.03, baseline
    assert summary["flow_matching_loss_shuffled_context"] > summary["flow_matching_loss_without_context"] - 0.01
    assert (tmp_path / "quickstart" / "report.html").is_file()
