"""The adapter for lm-eval: with lm-eval's own evaluator where it is installed, else its classes are stood in for."""

import importlib
import json
import subprocess
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cola_megatron.errors import UserError
from cola_megatron.evaluation.decoding import Decoding
from cola_megatron.evaluation.model import GeneratorModel
from cola_megatron.inference.settings import FlowSettings
from cola_megatron.parallel import initialize_parallel
from cola_megatron.training.loop import train
from tests.ranks import run_ranks
from tests.test_cli import cola

ADAPTER = "cola_megatron.evaluation.lm_eval_adapter"
STOOD_IN = {
    "lm_eval": (),
    "lm_eval.api": (),
    "lm_eval.api.instance": ("Instance",),
    "lm_eval.api.model": ("LM",),
    "lm_eval.tasks": ("TaskManager",),
    "lm_eval.utils": ("handle_non_serializable", "make_table"),
}


class StandInLM:
    """What the adapter needs of lm-eval's base class."""

    def __init__(self):
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *arguments: None)

    rank = property(lambda self: self._rank)
    world_size = property(lambda self: self._world_size)


@dataclass
class Request:
    """What the adapter needs of lm-eval's Instance."""

    args: tuple


def import_adapter() -> Any:
    """The adapter; lm-eval, where it is not installed, is stood in for while it is imported."""
    if ADAPTER in sys.modules or importlib.util.find_spec("lm_eval"):
        return importlib.import_module(ADAPTER)
    for name, members in STOOD_IN.items():
        module = sys.modules[name] = types.ModuleType(name)
        for member in members:
            setattr(module, member, StandInLM if member == "LM" else type(member, (), {}))
    try:
        return importlib.import_module(ADAPTER)
    finally:
        for name in STOOD_IN:
            del sys.modules[name]


@pytest.fixture
def adapter() -> Any:
    return import_adapter()


class Scripted:
    """Writes the prompt's last word and a sample id; knows the likelihood of a continuation by its length."""

    name = "scripted"

    def __init__(self):
        self.batches: list[tuple[list[str], Decoding]] = []

    def describe(self) -> dict[str, Any]:
        return {"family": "scripted"}

    def generate(self, prompts: Sequence[str], sample_ids: Sequence[int], decoding: Decoding) -> list[str]:
        self.batches.append((list(prompts), decoding))
        return [f" {prompt.split()[-1]}\nid {number}" for prompt, number in zip(prompts, sample_ids, strict=True)]

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        return -float(len(continuation)), context.endswith("!")


def wrapped(adapter: Any, model: Any, batch_size: int = 2) -> Any:
    return adapter.EvaluationLM(model, initialize_parallel(), batch_size)


def test_generate_until_batches_alike_requests_and_keeps_their_order(adapter):
    model = Scripted()
    short, long = {"until": ["\n"], "max_gen_toks": 8}, {"until": "id"}
    requests = [("a b", short), ("a b c d", long), ("a b c", short), ("a c", short)]
    answers = wrapped(adapter, model).generate_until([Request(request) for request in requests])
    assert answers == [" b", " d\n", " c", " c"]
    assert [(len(prompts), decoding.max_new_tokens) for prompts, decoding in model.batches] == [
        (2, 8),
        (1, 8),
        (1, 256),
    ]


def test_repeated_requests_draw_other_noise(adapter):
    arguments = {"until": [], "do_sample": True, "temperature": 0.7}
    lm = wrapped(adapter, Scripted())
    first, second, other = lm.generate_until([Request((prompt, arguments)) for prompt in ("x", "x", "y")])
    assert len({first, second, other}) == 3
    assert lm.generate_until([Request(("x", arguments))]) == [first]


@pytest.mark.parametrize(
    ("arguments", "decoding"),
    [
        ({}, Decoding(256)),
        ({"until": "a", "max_new_tokens": 5}, Decoding(5, 0.0, ("a",))),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, Decoding(256)),
        ({"temperature": 0.7}, Decoding(256, 0.7)),
        ({"do_sample": True, "until": None}, Decoding(256, 1.0)),
        ({"do_sample": True, "top_p": 0.9, "top_k": 5}, Decoding(256, 1.0, top_k=5, top_p=0.9)),
    ],
)
def test_generation_arguments(adapter, arguments, decoding):
    assert adapter.read_decoding(arguments) == decoding


def test_other_ways_of_sampling_are_refused(adapter):
    with pytest.raises(UserError, match=r"num_beams=4: sampling here knows temperature, top_k and top_p alone"):
        adapter.read_decoding({"do_sample": True, "num_beams": 4})


def test_likelihoods(adapter):
    lm = wrapped(adapter, Scripted())
    assert lm.loglikelihood([Request(("Yes!", " no")), Request(("", "a"))]) == [(-3.0, True), (-1.0, False)]
    assert lm.loglikelihood_rolling([Request(("four",))]) == [-4.0]
    without = types.SimpleNamespace(name="mute", generate=None)
    with pytest.raises(UserError, match=r"mute gives no log-likelihoods: choose tasks that generate"):
        wrapped(adapter, without).loglikelihood([Request(("a", "b"))])


def gather(sizes: list[int]) -> tuple[list[int], Any]:
    lm = wrapped(import_adapter(), Scripted())
    tensor = torch.tensor(sizes[lm.rank])
    gathered = lm.all_gather(tensor).tolist(), lm.gather_object({"rank": lm.rank})
    lm.barrier()
    return gathered


def test_ranks_gather_what_lm_eval_asks_for():
    assert run_ranks(gather, 2, [3, 5]) == [([3, 5], [{"rank": 0}, {"rank": 1}]), ([3, 5], None)]


def test_without_lm_eval_one_line_names_the_extra(tmp_path):
    """In a process of its own, where lm-eval cannot be imported."""
    code = f"import sys; sys.modules['lm_eval'] = None; import {ADAPTER}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserError: lm-eval is not installed" in ended.stderr
    assert "pip install 'cola-megatron[eval]'" in ended.stderr


# ---- generators of text ---------------------------------------------------------------------------------------------


@dataclass
class Blockwise:
    """A generator whose blocks hold 8 tokens of a letter each; the first repeats all but one of the prompt's."""

    written: str
    calls: int = 0

    def generate(self, prompts: Sequence[str], ids: Sequence[int], **options: Any) -> list[Any]:
        self.calls += 1
        assert options["temperature"] == 0.0
        letters = -(-options["max_new_tokens"] // 8) * 8 - 7
        return [types.SimpleNamespace(text=self.written[:letters]) for _ in prompts]


def test_a_generator_without_likelihoods_says_so():
    model = GeneratorModel(Blockwise("x"), "mute", FlowSettings())
    with pytest.raises(UserError, match="mute gives no log-likelihoods"):
        model.loglikelihood("a", "b")


def test_whether_greedy_decoding_gives_a_continuation():
    generator = Blockwise("abcdefghij" * 10)
    generator.loglikelihood = lambda context, continuation: -2.0 * len(continuation)
    model = GeneratorModel(generator, "blocks", FlowSettings())
    assert model.loglikelihood("prompt", "abc") == (-6.0, True)
    assert model.loglikelihood("prompt", "xyz" * 20) == (-120.0, False)
    assert generator.calls == 1
    assert model.loglikelihood("prompt", "abcdefghij" * 5)[1]
    assert not model.loglikelihood("prompt", "abcdefghij" * 5 + "x")[1]
    assert generator.calls == 3
    assert not model.loglikelihood("another", "abcdefghij" * 11)[1]  # the generator writes no more
    assert model.loglikelihood("another", "")[1]


@pytest.fixture
def trained(tiny) -> Path:
    """Run folder of a short stage-2 run."""
    config = tiny(2, "training.steps=2")
    train(config, progress=False)
    return config.run_folder


TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
"""
GENERATES = """
task: local_words
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
RANKS_OPTIONS = """
task: local_choice
output_type: multiple_choice
doc_to_choice: ["a", "bbb"]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    """A folder with two tasks of lm-eval over three local items; nothing may be fetched."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    data = tmp_path / "items.jsonl"
    rows = [{"question": f"the prior {word}", "answer": word} for word in ("writes", "latent", "flows")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, body in (("words", GENERATES), ("choice", RANKS_OPTIONS)):
        common = TASK.format(data=data)
        if name == "choice":
            common = common.replace('doc_to_target: "{{answer}}"\n', "")
        (tmp_path / f"{name}.yaml").write_text(common + body)
    return tmp_path


def test_lm_eval_s_evaluator_runs_local_tasks(adapter, tasks):
    found = adapter.evaluate_catalogue(
        Scripted(), ["local_words", "local_choice"], initialize_parallel(), include_path=tasks
    )
    # The scripted model repeats the last word with a space before it; the shorter option is the likelier.
    assert found.metrics["local_choice"]["acc,none"] == 1.0
    assert found.metrics["local_words"]["exact_match,none"] == 0.0
    assert "local_words" in found.table
    assert json.loads(found.as_json())["samples"]["local_words"][0]["resps"] == [[" writes"]]


def test_the_command_runs_a_task_on_a_model(adapter, tasks, trained):
    command = ["eval", "lm-eval", trained, "--include-path", tasks, "--steps", 2]
    output = tasks / "out.json"
    metrics = json.loads(cola(*command, "--tasks", "local_words", "--limit", 2, "--output", output, "--json"))
    assert metrics["local_words"]["exact_match,none"] == 0.0
    assert len(json.loads(output.read_text())["samples"]["local_words"]) == 2
    assert "exact_match" in cola(*command, "--tasks", "local_words", "--limit", 2)
    with pytest.raises(UserError, match=r"lm-eval has no task 'nonsense'"):
        cola(*command, "--tasks", "nonsense")
    with pytest.raises(UserError, match=r"the data of piqa are not here .*--download"):
        cola(*command, "--tasks", "piqa")


def test_the_model_is_registered_under_its_name(tasks, trained):
    import lm_eval
    from lm_eval.tasks import TaskManager

    import launchers.lm_eval_model  # noqa: F401 (registers it)

    found = lm_eval.simple_evaluate(
        model="cola",
        model_args=f"path={trained},steps=2",
        tasks=["local_words"],
        task_manager=TaskManager(include_path=str(tasks)),
    )
    assert found["results"]["local_words"]["exact_match,none"] == 0.0
