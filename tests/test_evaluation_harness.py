"""The harness: sharding, resuming, records, and the command around it."""

import dataclasses
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cola_megatron.config import ConfigError
from cola_megatron.errors import UserError
from cola_megatron.evaluation.decoding import Decoding, cut_at
from cola_megatron.evaluation.errors import EvaluationError
from cola_megatron.evaluation.harness import batches_by_length, evaluate_task
from cola_megatron.evaluation.items import Item
from cola_megatron.evaluation.model import GeneratorModel, sample_id
from cola_megatron.evaluation.results import TaskResult, read_results
from cola_megatron.evaluation.tasks import TASKS
from cola_megatron.inference.settings import FlowSettings
from cola_megatron.parallel import initialize_parallel
from cola_megatron.training.loop import train
from tests.ranks import run_ranks
from tests.test_cli import cola

SQUAD = TASKS["squad"]


class Echo:
    """Answers an item with the last word of its prompt, and remembers what it was asked."""

    name = "echo"

    def __init__(self, breaks_after: int | None = None, seed: int = 0):
        self.asked: list[str] = []
        self.breaks_after, self.seed = breaks_after, seed

    def describe(self) -> dict[str, Any]:
        return {"family": "echo", "seed": self.seed}

    def generate(
        self, prompts: Sequence[str], sample_ids: Sequence[int], decoding: Decoding, batch_size: int
    ) -> Iterator[tuple[int, str]]:
        for place, prompt in enumerate(prompts):
            if self.breaks_after is not None and len(self.asked) >= self.breaks_after:
                raise RuntimeError("killed")
            self.asked.append(prompt)
            yield place, f" {prompt.split()[-1]}\nand more"


def some_items(count: int = 10) -> list[Item]:
    """Every third is answered wrongly by `Echo`."""
    return [Item(f"q{i}", f"{'word ' * i}answer{i}", (f"answer{i}" if i % 3 else "else",)) for i in range(count)]


def evaluate(model: Echo, items: Sequence[Item], output: Path, task=SQUAD, batch_size: int = 2) -> TaskResult | None:
    return evaluate_task(model, task, items, output, initialize_parallel(), batch_size, progress=False)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_and_result(tmp_path):
    items = some_items()
    result = evaluate(Echo(), items, tmp_path)
    assert [record["id"] for record in result.items] == [item.id for item in items]
    assert result.items[1] == {
        "id": "q1",
        "prompt_hash": items[1].prompt_hash,
        "generation": " answer1\nand more",
        "answer": "answer1",
        "ground_truth": "answer1",
        "correct": True,
    }
    document = json.loads((tmp_path / "squad.json").read_text())
    assert (document["n"], document["correct"], document["accuracy"]) == (10, 6, 60.0)
    assert document["confidence_interval"]["low"] == pytest.approx(31.27, abs=0.01)
    assert document["settings"]["model"] == {"family": "echo", "seed": 0}
    assert document["settings"]["decoding"]["max_new_tokens"] == 32
    assert read_results(tmp_path) == {"squad": result}


def test_a_record_says_how_long_its_prompt_was_where_the_model_counts(tmp_path):
    class Counting(Echo):
        def prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
            return [len(prompt.split()) for prompt in prompts]

    result = evaluate(Counting(), some_items(3), tmp_path)
    assert [record["prompt_tokens"] for record in result.items] == [1, 2, 3]


def test_an_evaluation_goes_on_where_it_was_stopped(tmp_path):
    items = some_items()
    with pytest.raises(RuntimeError, match="killed"):
        evaluate(Echo(breaks_after=4), items, tmp_path)
    path = tmp_path / "squad" / "records_rank_0.jsonl"
    with path.open("a") as file:
        file.write('{"id": "q0", "prompt_ha')  # what a kill leaves
    second = Echo()
    result = evaluate(second, items, tmp_path)
    assert len(second.asked) == 6
    assert [record["id"] for record in lines(path)] == [f"q{i}" for i in reversed(range(10))]  # the longest first
    assert result == evaluate(Echo(breaks_after=0), items, tmp_path)  # all there: nothing is asked
    assert result.items == evaluate(Echo(), items, tmp_path / "at-once").items


def test_a_larger_limit_adds_items(tmp_path):
    assert len(evaluate(Echo(), some_items(4), tmp_path).items) == 4
    model = Echo()
    assert len(evaluate(model, some_items(6), tmp_path).items) == 6
    assert len(model.asked) == 2
    assert len(evaluate(Echo(), some_items(3), tmp_path).items) == 3


def test_other_settings_or_prompts_are_refused(tmp_path):
    evaluate(Echo(), some_items(3), tmp_path)
    with pytest.raises(EvaluationError, match=r"squad was begun with model.seed=0, not 1: give a new --output"):
        evaluate(Echo(seed=1), some_items(3), tmp_path)
    longer = dataclasses.replace(SQUAD, decoding=Decoding(max_new_tokens=64))
    with pytest.raises(EvaluationError, match=r"begun with decoding.max_new_tokens=32, not 64"):
        evaluate(Echo(), some_items(3), tmp_path, longer)
    items = [*some_items(2), Item("q2", "another prompt", ("x",))]
    with pytest.raises(EvaluationError, match=r"item q2 was asked with another prompt"):
        evaluate(Echo(), items, tmp_path)
    path = tmp_path / "squad" / "records_rank_0.jsonl"
    path.write_text("damaged\n" + path.read_text())
    with pytest.raises(EvaluationError, match=r"records_rank_0.jsonl:1: damaged"):
        evaluate(Echo(), some_items(3), tmp_path)
    (tmp_path / "squad" / "settings.json").write_text("{")
    with pytest.raises(EvaluationError, match=r"settings.json: damaged"):
        evaluate(Echo(), some_items(3), tmp_path)


def test_a_task_s_stop_strings_cut(tmp_path):
    stopped = dataclasses.replace(SQUAD, decoding=Decoding(stop=("\nand", "never")))
    assert evaluate(Echo(), some_items(1), tmp_path, stopped).items[0]["generation"] == " answer0"
    assert cut_at("a b c", ("c", " b")) == "a"
    assert cut_at("a b c", ()) == "a b c"


def shard(output: Path, count: int) -> tuple[list[str], int | None]:
    model = Echo()
    result = evaluate(model, some_items(count), output)
    return model.asked, None if result is None else result.correct


def test_items_that_share_noise_by_the_published_formula_are_said(tmp_path, caplog):
    class Noisy(Echo):
        noise = "published"

        def describe(self) -> dict[str, Any]:
            return {"family": "noisy", "noise": self.noise}

    items = [Item(number, f"answer{number}", ("x",)) for number in (3, 10_003)]
    evaluate(Noisy(), items[:1], tmp_path / "one")
    assert "share noise" not in caplog.text
    evaluate(Noisy(), items, tmp_path / "two")
    assert "items whose ids lie 10,000 apart share noise" in caplog.text


def test_items_are_shared_out_over_ranks_and_taken_up_by_other_numbers(tmp_path):
    prompts = [item.prompt for item in some_items(10)]
    (first, correct), (second, nothing) = run_ranks(shard, 2, tmp_path, 7)
    assert sorted(first) == sorted(prompts[0:7:2]) and sorted(second) == sorted(prompts[1:7:2])
    assert (correct, nothing) == (4, None)
    ids = {record["id"] for record in lines(tmp_path / "squad" / "records_rank_1.jsonl")}
    assert ids == {"q1", "q3", "q5"}
    model = Echo()
    alone = evaluate(model, some_items(10), tmp_path)
    assert sorted(model.asked) == sorted(prompts[7:])
    assert alone.items == evaluate(Echo(), some_items(10), tmp_path / "at-once").items


def test_batches_are_of_like_lengths():
    assert list(batches_by_length("abcde", [1, 5, 3, 5, 2], 2)) == [["b", "d"], ["c", "e"], ["a"]]


def test_the_noise_of_an_item_follows_its_id():
    assert (sample_id(17), sample_id("17"), sample_id("q1")) == (17, 17, zlib.crc32(b"q1"))
    assert sample_id("9" * 30) == zlib.crc32(b"9" * 30)


# ---- the command with a model ---------------------------------------------------------------------------------------


@pytest.fixture
def trained(tiny) -> Path:
    """Run folder of a short stage-2 run."""
    config = tiny(2, "training.steps=2")
    train(config, progress=False)
    return config.run_folder


@pytest.fixture
def data(tmp_path) -> Path:
    """Three items of every task, with prompts of different lengths."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in TASKS:
        rows = [
            {
                "id": i,
                "prompt": f"the prior {'writes ' * i}latent",
                "ground_truth": "blocks",
                "choices": ["a", "blocks"],
            }
            for i in range(3)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_model_is_evaluated_on_all_tasks(trained, data, tmp_path):
    command = ["eval", "run", trained, "--data", data, "--output", tmp_path / "results", "--steps", 2]
    shown = cola(*command).splitlines()
    assert [row.split()[0] for row in shown] == ["task", *TASKS, "average"]
    results = read_results(tmp_path / "results")
    assert results.keys() == TASKS.keys()
    assert all(len(result.items) == 3 and result.model == str(trained) for result in results.values())
    assert shown == cola(*command).splitlines()
    document = json.loads(cola(*command, "--tasks", "siqa,race", "--json"))
    assert list(document["tasks"]) == ["siqa", "race"]
    single = [*command[:5], "--output", tmp_path / "single", "--steps", 2, "--tasks", "race", "--batch-size", 1]
    cola(*single)
    assert read_results(tmp_path / "single")["race"].items == results["race"].items
    with pytest.raises(EvaluationError, match=r"begun with model.guidance_scale=7.0, not 3.0"):
        cola(*command, "--guidance-scale", 3)


def test_how_to_generate_is_an_option_recorded_and_held_to(trained, data, tmp_path):
    command = ["eval", "run", trained, "--data", data, "--tasks", "race", "--steps", 2]
    chosen = ["--solver", "heun", "--guidance-interval", 0.2, 0.8, "--first-block", "left_pad", "--precision", "bf16"]
    cola(*command, "--output", tmp_path / "chosen", *chosen)
    model = read_results(tmp_path / "chosen")["race"].settings["model"]
    assert {name: model[name] for name in ("solver", "guidance_interval", "first_block", "precision")} == {
        "solver": "heun",
        "guidance_interval": [0.2, 0.8],
        "first_block": "left_pad",
        "precision": "bf16",
    }
    cola(*command, "--output", tmp_path / "chosen", *chosen)
    for change, complaint in (
        (["--solver", "euler"], "solver=heun, not euler"),
        (["--first-block", "right_pad"], "first_block=left_pad, not right_pad"),
        (["--guidance-interval", 0.0, 0.8], r"guidance_interval=\[0.2, 0.8\], not \[0.0, 0.8\]"),
        (["--precision", "fp32"], "precision=bf16, not fp32"),
    ):
        with pytest.raises(EvaluationError, match=rf"begun with model.{complaint}: give a new --output"):
            cola(*command, "--output", tmp_path / "chosen", *chosen, *change)


def test_an_evaluation_from_before_some_settings_had_a_name_goes_on(trained, data, tmp_path):
    command = ["eval", "run", trained, "--data", data, "--tasks", "race", "--steps", 2, "--output", tmp_path / "old"]
    cola(*command)
    path = tmp_path / "old" / "race" / "settings.json"
    settings = json.loads(path.read_text())
    assert (settings["model"].pop("precision"), settings["model"].pop("noise")) == ("fp32", "published")
    assert settings["decoding"].pop("until_end_of_text") is False
    path.write_text(json.dumps(settings))
    cola(*command)
    with pytest.raises(EvaluationError, match=r"begun with model.precision=fp32, not bf16"):
        cola(*command, "--precision", "bf16")


def test_other_weights_are_noticed(trained, tmp_path):
    from cola_megatron import ColaDLM

    model = ColaDLM.from_checkpoint(trained)
    before = GeneratorModel(model, "one", FlowSettings()).describe()
    assert before == GeneratorModel(ColaDLM.from_checkpoint(trained), "another", FlowSettings()).describe()
    assert (before["guidance_scale"], before["solver"]) == (7.0, "euler")
    with torch.no_grad():
        next(model.dit.parameters()).mul_(1.5)
    assert before["weights"] != GeneratorModel(model, "one", FlowSettings()).describe()["weights"]


def test_wrong_use_is_named_before_anything_long(trained, data, tiny, tmp_path):
    command = ["eval", "run", trained, "--data", data, "--output", tmp_path / "results"]
    with pytest.raises(ConfigError, match="task 'recipes' is unknown"):
        cola(*command, "--tasks", "race,recipes")
    with pytest.raises(ConfigError, match="steps=0 must be at least 1"):
        cola(*command, "--steps", 0)
    for options, complaint in (
        (["--solver", "rk4"], "solver=rk4 must be one of euler, heun, adams_bashforth"),
        (["--first-block", "any"], "first_block=any must be one of clean_condition"),
        (["--precision", "fp8"], "precision=fp8 must be fp32 or bf16"),
        (["--guidance-interval", 0.8, 0.2], "guidance_interval=0.8,0.2 must be low,high"),
        (["--guidance-interval", 0.2, 0.8, "--guidance-scale", 1], "does nothing with guidance_scale=1"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            cola(*command, *options)
    (data / "race.jsonl").unlink()
    with pytest.raises(EvaluationError, match="holds no data for race"):
        cola(*command)
    assert not (tmp_path / "results").exists()
    first = tiny(1, "name=first", "training.steps=1")
    train(first, progress=False)
    with pytest.raises(UserError, match="no prior"):
        cola("eval", "run", first.run_folder, "--data", data, "--output", tmp_path / "first", "--tasks", "squad")
    assert not (tmp_path / "first").exists()


def test_held_out_is_the_command_for_a_run_folder(trained):
    expected = json.loads(cola("eval", "held-out", trained, "--samples", 4, "--json"))
    assert json.loads(cola("eval", "--samples", 4, trained, "--json")) == expected


@pytest.mark.parametrize("command", ["held-out", "score", "run", "table", "lm-eval"])
def test_every_subcommand_has_help_with_an_example(command):
    assert "Example" in cola("eval", command, "--help")
