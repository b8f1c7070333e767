"""A chain is checked when it is built, and a step when it is run."""

import pytest
import torch
from torch import nn

from cola_megatron.families.cola.chain import Cola
from cola_megatron.families.cola.measurement import ColaMeasurement
from cola_megatron.models.chain_check import check_chain
from cola_megatron.models.steps import Step, run_steps
from cola_megatron.parallel import initialize_parallel
from tests.support import random_batch

LAYER = [nn.Linear(1, 1)]


def chain(*signatures: str) -> list[Step]:
    return [Step(signature, lambda *inputs: inputs, modules=LAYER) for signature in signatures]


def test_a_chain_that_holds_together_passes():
    check_chain(chain("tokens -> hidden", "hidden -> hidden", "hidden, tokens -> loss_a"), ["tokens"], ["loss_a"])


@pytest.mark.parametrize(
    ("signatures", "named"),
    [
        (["tokens -> hidden", "hiden -> loss_a"], ["Step(hiden -> loss_a)", "'hiden'", "did you mean 'hidden'?"]),
        (["hidden -> loss_a", "tokens -> hidden"], ["Step(hidden -> loss_a)", "'hidden'"]),
        (["tokens -> loss_b"], ["'loss_a'", "did you mean 'loss_b'?"]),
        (["tokens -> hidden", "hidden -> hiden", "hidden -> loss_a"], ["nobody reads", "Step(hidden -> hiden)"]),
        (["tokens -> hidden", "tokens -> hidden", "hidden -> loss_a"], ["nobody reads", "Step(tokens -> hidden)"]),
    ],
)
def test_a_misspelt_or_forgotten_name_is_refused(signatures, named):
    with pytest.raises(ValueError) as refused:
        check_chain(chain(*signatures), ["tokens"], ["loss_a"])
    assert all(words in str(refused.value) for words in named), refused.value


def test_what_follows_from_the_batch_alone_may_be_there_for_nobody():
    mask = Step("tokens -> mask", lambda tokens: tokens)
    check_chain([mask, *chain("tokens -> loss_a")], ["tokens"], ["loss_a"])
    with pytest.raises(ValueError, match="nobody reads"):
        check_chain([*chain("tokens -> loss_a"), Step("loss_a -> half", lambda loss: loss / 2)], ["tokens"], ["loss_a"])


@pytest.mark.parametrize("signature", ["a, b", "a -> b -> c", ""])
def test_a_signature_has_two_sides(signature):
    with pytest.raises(ValueError, match="inputs -> outputs"):
        Step(signature, lambda a: a)


@pytest.mark.parametrize(
    ("signature", "run", "named"),
    [
        ("a -> b, c", lambda a: torch.ones(2, 3), ["b, c", "tuple of 2", "Tensor"]),
        ("a -> b, c", lambda a: (a, a, a), ["tuple of 2", "tuple of 3"]),
        ("a -> b", lambda a: (a,), ["one value", "tuple of 1"]),
        ("a ->", lambda a: a, ["nothing", "Tensor"]),
    ],
)
def test_a_step_returns_as_many_values_as_it_has_names(signature, run, named):
    with pytest.raises(TypeError) as refused:
        Step(signature, run)({"a": torch.ones(1)})
    assert all(words in str(refused.value) for words in named), refused.value


def test_an_exception_stays_what_it_is_and_says_in_which_step():
    with pytest.raises(RuntimeError, match="size of tensor") as raised:
        run_steps([Step("a, b -> c", lambda a, b: a + b)], {"a": torch.ones(2), "b": torch.ones(3)})
    assert raised.value.__notes__ == ["in Step(a, b -> c)"]
    with pytest.raises(KeyError, match="b") as raised:
        Step("a, b -> c", lambda a, b: a + b)({"a": 1})
    assert raised.value.__notes__ == ["in Step(a, b -> c)"]


def test_an_exception_in_a_recomputed_step_says_so_too():
    passes = []

    def second_pass_fails(x: torch.Tensor) -> torch.Tensor:
        passes.append(x)
        if len(passes) == 2:
            raise RuntimeError("out of memory")
        return x.sin()

    state = Step("x -> y", second_pass_fails, recompute=True)({"x": torch.ones(2, requires_grad=True)})
    with pytest.raises(RuntimeError, match="out of memory") as raised:
        state["y"].sum().backward()
    assert raised.value.__notes__ == ["in Step(x -> y)"]


MODELS = [
    (1, []),
    (1, ["model.vae.variational=false", "objective.vae.beta=0"]),
    (1, ["data.document_attention=true", "objective.vae.mask_weight=0"]),
    (2, ["training.vae_update.from_scratch=false"]),
    (2, ["training.vae_update.from_scratch=false", "training.vae_update.mode=frozen"]),
    (2, ["training.vae_update.mode=interval", "data.document_attention=true", "objective.vae_weight=0"]),
    (2, ["objective.flow.weight=0", "objective.vae.beta=0"]),
]


@pytest.mark.parametrize(("stage", "overrides"), MODELS)
def test_every_mode_has_the_terms_that_it_weighs(tiny, stage, overrides):
    model = Cola(tiny(stage, *overrides), initialize_parallel())
    for mode in [{"train_vae": True}, {"train_vae": False}][:stage]:
        assert sorted(model.term_names(**mode)) == sorted(model.weights(**mode))


@pytest.mark.parametrize(("stage", "overrides"), MODELS)
def test_the_batch_holds_what_the_chain_may_read(tiny, stage, overrides):
    model = Cola(tiny(stage, *overrides), initialize_parallel())
    assert model.batch_names == random_batch(model.config, range(1)).keys()


def test_a_term_without_weight_and_a_weight_without_term_are_refused(tiny, monkeypatch):
    model = Cola(tiny(1), initialize_parallel())
    weights = model.weights()
    monkeypatch.setattr(model, "weights", lambda **mode: {**weights, "flow_matching": 1.0})
    with pytest.raises(ValueError, match="no step writes 'loss_flow_matching'"):
        model.stage()
    monkeypatch.setattr(model, "weights", lambda **mode: {"reconstruction": 1.0})
    with pytest.raises(ValueError, match="no weight for loss_posterior, loss_mask"):
        model.stage()


@pytest.mark.parametrize("stage", [1, 2])
def test_the_held_out_chain_is_checked_as_well(tiny, stage):
    from cola_megatron.held_out.measure import BATCH_NAMES

    config = tiny(stage)
    model, measurement = Cola(config, initialize_parallel()), ColaMeasurement(config)
    steps, batch_names = measurement.steps(model), BATCH_NAMES | set(measurement.batch_names)
    results = [name for step in steps for name in step.writes if name.startswith("sum_")]
    model.own_stage_of(steps, batch_names, results)
    with pytest.raises(ValueError, match="flow_noise"):
        model.own_stage_of(steps, batch_names - {"flow_noise"}, results)
    with pytest.raises(ValueError, match="nobody reads what Step"):
        model.own_stage_of(steps, batch_names, [])
