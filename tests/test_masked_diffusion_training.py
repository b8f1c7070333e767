"""A masked-diffusion run: trained, resumed and measured in any layout, and what its folder is good for."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cola_megatron.checkpoint.find import newest_checkpoint
from cola_megatron.checkpoint.load import read_weights
from cola_megatron.config import RunConfig, load_config
from cola_megatron.families import family_of
from cola_megatron.families.samples import training_sample
from cola_megatron.interface import load_model
from cola_megatron.parallel import initialize_parallel, initialize_parameters
from cola_megatron.records.metrics import read_metrics
from tests.ranks import run_ranks
from tests.test_layouts import train_steps

TINY = [
    "model.vocab_size=300",
    "model.transformer.num_layers=2",
    "model.transformer.hidden_size=32",
    "model.transformer.ffn_hidden_size=48",
    "data.sequence_length=32",
    "training.steps=4",
    "training.global_batch_size=8",
    "training.micro_batch_size=4",
    "training.loader_workers=0",
    "training.schedule.warmup_steps=2",
    "training.schedule.decay_steps=20",
    "training.evaluation.every=100",
    "training.evaluation.samples=7",
    "training.evaluation.texts=0",
    "training.checkpoint.every=100",
    "training.log.every=1",
    "training.log.wandb=disabled",
    "parallel.reduce_bucket_size=20000",
]
BLOCKS = "model.block_size=8"
Tiny = Callable[..., RunConfig]


@pytest.fixture
def tiny(corpus: Path, tmp_path: Path) -> Tiny:
    def build(*overrides: str) -> RunConfig:
        places = [f"data.path={corpus}", f"runs_folder={tmp_path / 'runs'}"]
        return load_config("tiny-masked-diffusion", [*TINY, *places, *overrides])

    return build


def train_quietly(config: RunConfig) -> dict[str, float]:
    from cola_megatron.training.loop import train

    return train(config, progress=False).metrics


def curve(config: RunConfig) -> list[tuple[float, float]]:
    records = [record for record in read_metrics(config.run_folder / "metrics.jsonl") if record["kind"] == "train"]
    return [(record["loss"], record["gradient_norm"]) for record in records]


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    return read_weights(newest_checkpoint(config.run_folder))[1]


def written_texts(config: RunConfig) -> list[dict]:
    return [json.loads(line)["texts"] for line in (config.run_folder / "texts.jsonl").read_text().splitlines()]


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [[], [BLOCKS]])
def test_one_batch_is_learned_by_heart(tiny, form):
    config = tiny("objective.times=low_discrepancy", *form)
    groups = initialize_parallel()
    model = family_of(config).build(config, groups)
    initialize_parameters(model, config.seed, groups)
    tokens_BL = np.random.default_rng(0).integers(0, 300, (4, 32))
    fields = [training_sample(config, tokens_L, -1, -1, index, 0) for index, tokens_L in enumerate(tokens_BL)]
    batch = {name: torch.from_numpy(np.stack([each[name] for each in fields])) for name in fields[0]}
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0), []
    for _ in range(200):
        optimizer.zero_grad()
        loss = model(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(300), rel=0.3)
    assert losses[-1] < 0.01


def test_stop_and_resume_is_bit_identical(tiny):
    straight = tiny("name=straight", BLOCKS)
    train_quietly(straight)
    train_quietly(tiny("name=halves", BLOCKS, "training.stop_after=2"))
    resumed = tiny("name=halves", BLOCKS)
    train_quietly(resumed)
    assert len(curve(straight)) == 4 and curve(resumed) == curve(straight)
    expected, found = weights(straight), weights(resumed)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# ---- layouts --------------------------------------------------------------------------------------------------------

TENSOR = ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"]
LAYOUTS = {
    "TP 2": TENSOR,
    "PP 2": ["parallel.pipeline_parallel_size=2"],
    "DP 2, ZeRO 3": ["parallel.zero_stage=3", "training.micro_batch_size=2"],
}
FORMS = {"LLaDA": [], "blocks, documents": [BLOCKS, "data.document_attention=true"]}


def losses_and_moments(config: RunConfig, ranks: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of three steps on random tokens, and AdamW's first moments after the first: 0.1 of the gradients."""
    answers = run_ranks(train_steps, ranks, config, 3)
    whole: dict[str, torch.Tensor] = {}
    for answer in answers:
        for piece in answer["moments"]:
            box = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.values.shape, strict=True))
            whole.setdefault(piece.name, torch.zeros(piece.whole))[box] = torch.from_numpy(piece.values)
    return [step["loss"] for step in answers[0]["metrics"]], whole


@pytest.fixture(scope="module")
def alone(corpus: Path) -> Callable[[str], tuple[list[float], dict[str, torch.Tensor]]]:
    """Of one process, computed once for each form."""

    @functools.cache
    def computed(form: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        return losses_and_moments(load_config("tiny-masked-diffusion", [*TINY, *FORMS[form]]), 1)

    return computed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_every_gradient_equal_those_of_one_process(tiny, alone, layout, form):
    expected, gradients = alone(form)
    losses, found = losses_and_moments(tiny(*FORMS[form], *LAYOUTS[layout]), 2)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("form", FORMS)
def test_a_run_is_measured_and_writes_texts_alike_in_every_layout(tiny, form):
    overrides = [*FORMS[form], "training.evaluation.texts=2", "training.steps=2"]
    alone, stages, ranks = (
        tiny(f"name={name}", *overrides, *layout)
        for name, layout in (("alone", []), ("stages", LAYOUTS["PP 2"]), ("ranks", LAYOUTS["TP 2"]))
    )
    expected = run_ranks(train_quietly, 1, alone)[0]
    assert expected["samples"] == 7 and expected["nats_per_token"] == pytest.approx(math.log(300), rel=0.1)
    assert expected["nats_per_token_standard_error"] > 0
    for config in (stages, ranks):
        for found in run_ranks(train_quietly, 2, config):
            assert found == pytest.approx(expected, rel=1e-3)
        assert written_texts(config) == written_texts(alone)
    (texts,) = written_texts(alone)
    assert len(texts) == 2 and all(len(text["strip"]) == 5 and text["continuation"] for text in texts)


# ---- what a run is good for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["LLaDA", "blocks, documents"])
def test_a_run_folder_generates_and_scores(tiny, form):
    config = tiny(*FORMS[form])
    train_quietly(config)
    model = load_model(config.run_folder)
    first, second = model.generate(["the prior writes", "noise"], max_new_tokens=5, steps=3)
    assert len(first.token_ids) - first.prompt_tokens == 5 and first.text and second.finish_reason == "length"
    assert model.generate(["noise"], [1], max_new_tokens=5, steps=3)[0].text == second.text
    (empty,) = model.generate([""], max_new_tokens=3)
    assert len(empty.token_ids) == 3
    (found,) = model.log_likelihood(["blocks of noise"], ["latent "], samples=8)
    assert 0 < -found.elbo / found.tokens < 3 * math.log(300) and found.bits_per_byte > 0
    assert set(found.figures) <= found.as_json().keys()
    outputs = model.fixed_outputs()
    assert all(
        torch.equal(tensor, load_model(config.run_folder).fixed_outputs()[name]) for name, tensor in outputs.items()
    )


def answers(folder: Path, tensor_parallel_size: int) -> tuple[list[list[int]], list[float]]:
    model = load_model(folder, device="cpu", tensor_parallel_size=tensor_parallel_size)
    found = model.generate(["the prior writes", ""], max_new_tokens=[9, 4], steps=5, guidance_scale=0.5)
    texts = model.log_likelihood(["blocks of noise", "meaning"], ["latent ", ""], samples=4)
    return [each.token_ids.tolist() for each in found], [text.elbo for text in texts]


@pytest.mark.parametrize("form", [[], [BLOCKS]])
def test_tensor_parallel_processes_have_the_answers_of_one(tiny, form):
    config = tiny(*form, "training.steps=1")
    train_quietly(config)
    tokens, bounds = answers(config.run_folder, 1)
    for found, other in run_ranks(answers, 2, config.run_folder, 2):
        assert found[0] == tokens[0]  # an empty prompt leaves the order of equally sure tokens to rounding
        assert other == pytest.approx(bounds, rel=1e-5)


# ---- costs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [[], [BLOCKS], ["model.mask_token_id=7"]])
def test_the_steps_with_parameters_are_those_that_costs_are_counted_for(tiny, form):
    config = tiny(*form)
    family = family_of(config)
    model = family.build(config, initialize_parallel())
    expected = [(part.label, part.parameters) for part in family.parts(config)]
    for chain in (model.steps(), family.measurement(config).steps(model)):
        heavy = [step for step in chain if step.modules]
        counted = [sum(p.numel() for module in step.modules for p in module.parameters()) for step in heavy]
        assert [(step.part, count) for step, count in zip(heavy, counted, strict=True)] == expected


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("tiny", 2_191_104), ("small", 40_904_448), ("base", 333_364_224), ("paper-2b", 1_812_051_968 + 410_740_736)],
)
def test_presets_are_those_of_the_autoregressive_baseline_and_a_row_for_mask(preset, parameters):
    ours, theirs = (load_config(f"{preset}-{family}") for family in ("masked-diffusion", "autoregressive"))
    assert sum(part.parameters for part in family_of(ours).parts(ours)) == parameters
    assert ours.model.transformer == theirs.model.transformer and ours.model.vocab_size == theirs.model.vocab_size
    assert (ours.training, ours.data, ours.parallel) == (theirs.training, theirs.data, theirs.parallel)
