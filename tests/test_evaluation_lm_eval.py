"""The adapter for lm-eval: with lm-eval's own evaluator where it is installed, else its classes are stood in for."""

import importlib
import json
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cola_megatron.config import ConfigError
from cola_megatron.errors import UserError
from cola_megatron.evaluation.decoding import Decoding
from cola_megatron.evaluation.model import GeneratorModel, sample_id
from cola_megatron.inference.protocol import Piece
from cola_megatron.inference.settings import FlowSettings
from cola_megatron.parallel import initialize_parallel
from cola_megatron.training.loop import train
from launchers.eval_benchmarks import open_for_evaluation
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
        self.batches: list[tuple[list[str], Decoding, int]] = []
        self.asked: list[list[tuple[str, str]]] = []

    def describe(self) -> dict[str, Any]:
        return {"family": "scripted"}

    def generate(
        self, prompts: Sequence[str], sample_ids: Sequence[int], decoding: Decoding, batch_size: int
    ) -> Iterator[tuple[int, str]]:
        self.batches.append((list(prompts), decoding, batch_size))
        for place, (prompt, number) in enumerate(zip(prompts, sample_ids, strict=True)):
            yield place, f" {prompt.split()[-1]}\nid {number}"

    def loglikelihood(self, contexts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        self.asked.append(list(zip(contexts, continuations, strict=True)))
        return [-float(len(continuation)) for continuation in continuations]

    def is_greedy(self, context: str, continuation: str) -> bool:
        return context.endswith("!")


def wrapped(adapter: Any, model: Any, batch_size: int = 2) -> Any:
    return adapter.EvaluationLM(model, initialize_parallel(), batch_size)


def test_generate_until_asks_for_alike_requests_together_and_keeps_their_order(adapter):
    model = Scripted()
    short, long = {"until": ["\n"], "max_gen_toks": 8}, {"until": "id"}
    requests = [("a b", short), ("a b c d", long), ("a b c", short), ("a c", short)]
    answers = wrapped(adapter, model).generate_until([Request(request) for request in requests])
    assert answers == [" b", " d\n", " c", " c"]
    assert [(prompts, decoding.max_new_tokens, size) for prompts, decoding, size in model.batches] == [
        (["a b c", "a b", "a c"], 8, 2),
        (["a b c d"], 256, 2),
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


def test_a_text_ends_at_the_end_of_text_token(adapter):
    """What a model writes behind it is no part of an answer, and an exact match would fail on it."""
    asked: list[dict[str, Any]] = []

    def stream(prompts: Sequence[str], **options: Any) -> list[Piece]:
        asked.append(options)
        return [Piece(index, "42", [4, 2], None, 0, "end_of_text") for index in range(len(prompts))]

    generator = types.SimpleNamespace(stream=stream, end_of_text_ids=(7,))
    model = GeneratorModel(generator, "ends", FlowSettings(end_of_text=(9,)))
    assert wrapped(adapter, model).generate_until([Request(("x", {"until": ["\n"]}))]) == ["42"]
    assert list(model.generate(["x"], [0], Decoding(), 1)) == [(0, "42")]  # as the published tasks ask
    assert [options["end_of_text"] for options in asked] == [(9, 7), (9,)]


@pytest.mark.parametrize(("given", "size"), [("auto", 20), ("auto:4", 20), ("8", 8), (3, 3)])
def test_a_batch_size_is_read_as_lm_eval_writes_it(adapter, given, size):
    assert adapter.read_batch_size(given) == size


@pytest.mark.parametrize("given", ["many", 0, "-1"])
def test_a_batch_size_that_is_none_is_refused(adapter, given):
    with pytest.raises(UserError, match=rf"batch_size={given} must be a number of prompts, at least 1, or auto"):
        adapter.read_batch_size(given)


def test_other_ways_of_sampling_are_refused(adapter):
    with pytest.raises(UserError, match=r"num_beams=4: sampling here knows temperature, top_k and top_p alone"):
        adapter.read_decoding({"do_sample": True, "num_beams": 4})


def test_likelihoods(adapter):
    model = Scripted()
    lm = wrapped(adapter, model)
    pairs = [("", "a"), ("Yes!", " no"), ("Yes! ", "maybe"), ("Yes!", "")]
    assert lm.loglikelihood([Request(pair) for pair in pairs]) == [
        (-1.0, False),
        (-3.0, True),
        (-6.0, True),  # the space goes with the continuation
        (0.0, True),
    ]
    assert model.asked == [[("Yes!", " no"), ("Yes!", " maybe")], [("Yes!", ""), ("", "a")]]
    assert lm.loglikelihood_rolling([Request(("four",)), Request(("longer",))]) == [-4.0, -6.0]
    assert model.asked[2:] == [[("", "longer"), ("", "four")]]
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
    assert "make setup EXTRAS=eval" in ended.stderr


# ---- generators of text ---------------------------------------------------------------------------------------------


@dataclass
class Blockwise:
    """A generator whose blocks hold 8 tokens of a letter each; the first repeats all but one of the prompt's."""

    written: str
    calls: int = 0

    def stream(self, prompts: Sequence[str], ids: Sequence[int], **options: Any) -> list[Piece]:
        self.calls += 1
        assert options["temperature"] == 0.0
        letters = -(-options["max_new_tokens"] // 8) * 8 - 7
        return [Piece(index, self.written[:letters], [], None, 0, "length") for index in range(len(prompts))]


def test_a_generator_without_likelihoods_says_so():
    model = GeneratorModel(Blockwise("x"), "mute", FlowSettings())
    with pytest.raises(UserError, match="mute gives no log-likelihoods"):
        model.loglikelihood(["a"], ["b"])


def test_a_generator_s_likelihoods():
    """Options reach it, one context has one noise, and nothing is asked of an empty continuation."""
    asked = {}

    def log_likelihood(texts: list[str], contexts: list[str], ids: list[int], **options: Any) -> list[Any]:
        asked.update(texts=texts, contexts=contexts, ids=ids, options=options)
        return [types.SimpleNamespace(elbo=-2.0 * len(text)) for text in texts]

    generator = Blockwise("x")
    generator.log_likelihood = log_likelihood
    model = GeneratorModel(generator, "blocks", FlowSettings(), {"samples": 3})
    assert model.loglikelihood(["q", "q", "q", ""], ["abc", "", "de", "f"]) == [-6.0, 0.0, -4.0, -2.0]
    assert asked["texts"] == ["abc", "de", "f"] and asked["contexts"] == ["q", "q", ""]
    assert asked["ids"][0] == asked["ids"][1] != asked["ids"][2] and asked["options"] == {"samples": 3}


def test_whether_greedy_decoding_gives_a_continuation():
    generator = Blockwise("abcdefghij" * 10)
    model = GeneratorModel(generator, "blocks", FlowSettings())
    assert model.is_greedy("prompt", "abc")
    assert not model.is_greedy("prompt", "xyz" * 20)
    assert generator.calls == 1
    assert model.is_greedy("prompt", "abcdefghij" * 5)
    assert not model.is_greedy("prompt", "abcdefghij" * 5 + "x")
    assert generator.calls == 3
    assert not model.is_greedy("another", "abcdefghij" * 11)  # the generator writes no more
    assert model.is_greedy("another", "")


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


def test_likelihoods_of_a_trained_model(adapter, trained):
    """Without lm-eval's evaluator: requests in, nats out, the same in any batch."""
    model = open_for_evaluation(trained, steps=2, likelihood_steps=4, likelihood_samples=2, noise_seed=5)
    pairs = [("the prior writes ", "latent blocks"), ("the prior writes", " noise"), ("meaning", " flows back")]
    requests = [Request(pair) for pair in pairs]
    together = wrapped(adapter, model, batch_size=3).loglikelihood(requests)
    alone = wrapped(adapter, model, batch_size=1).loglikelihood(requests)
    assert [nats for nats, _ in together] == pytest.approx([nats for nats, _ in alone], rel=1e-4)
    assert not any(greedy for _, greedy in together)
    (expected,) = model.generator.log_likelihood(
        [" noise"], ["the prior writes"], [sample_id("the prior writes")], steps=4, samples=2, noise_seed=5
    )
    assert together[1][0] == pytest.approx(expected.elbo, rel=1e-4)
    (rolling,) = wrapped(adapter, model).loglikelihood_rolling([Request(("the prior writes latent blocks",))])
    (whole,) = model.generator.log_likelihood(
        ["the prior writes latent blocks"], ids=[sample_id("")], steps=4, samples=2, noise_seed=5
    )
    assert rolling == pytest.approx(whole.elbo, rel=1e-6)
    with pytest.raises(ConfigError, match=r"samples=0 must be at least 1"):
        open_for_evaluation(trained, likelihood_samples=0)


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
    metrics = json.loads(cola(*command, "--tasks", "local_choice", "--likelihood-steps", 4, "--json"))
    assert 0 <= metrics["local_choice"]["acc,none"] <= 1
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
