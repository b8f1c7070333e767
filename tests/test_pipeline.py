"""The chain cut into stages: what crosses, what a stage holds, how stages are balanced, what is refused."""

import pytest
import torch

from cola_megatron.config import ConfigError, load_config
from cola_megatron.families.cola.chain import Cola
from cola_megatron.families.cola.measured_steps import measured_steps
from cola_megatron.families.cola.parts import chain_parts
from cola_megatron.models.steps import Step, cut_chain, run_steps
from cola_megatron.parallel import initialize_parallel, initialize_parameters
from cola_megatron.planning.balance import balance
from cola_megatron.planning.split import pipeline_split
from tests.support import perturbed, random_batch

MODES = [(1, "joint", True), (2, "joint", True), (2, "joint", False), (2, "frozen", False)]


def model_of(config) -> Cola:
    groups = initialize_parallel()
    model = Cola(config, groups)
    initialize_parameters(model, config.seed, groups)
    return perturbed(model)


@pytest.mark.parametrize(("stage", "mode", "train_vae"), MODES)
def test_every_cut_of_the_chain_computes_the_same(tiny, stage, mode, train_vae):
    model = model_of(tiny(stage, f"training.vae_update.mode={mode}", "training.vae_update.from_scratch=false"))
    batch, steps = random_batch(model.config, range(2)), model.steps(train_vae)
    whole = model(batch, train_vae=train_vae)
    heavy = sum(1 for step in steps if step.modules)
    for cut in range(1, heavy):
        taken, terms = {}, {}
        for part in cut_chain(steps, (cut, heavy - cut), model.batch_names):
            assert set(part.takes) == set(taken)
            state = run_steps(part.steps, {**batch, **taken}, keep=part.hands_on)
            terms |= {name.removeprefix("loss_"): state[name] for name in state if name.startswith("loss_")}
            taken = {name: state[name] for name in part.hands_on}
        assert terms.keys() == whole.keys() - {"loss"}
        assert all(torch.equal(value, whole[name]) for name, value in terms.items())


def test_thin_latents_cross_where_the_prior_stands_between_encoder_and_decoder(tiny):
    model = model_of(tiny(2, "training.vae_update.from_scratch=false"))
    steps = model.steps()
    parts = [step.part for step in steps if step.modules]

    def crossing_before(part: str) -> set[str]:
        first = parts.index(part)
        return set(cut_chain(steps, (first, len(parts) - first), model.batch_names)[0].hands_on)

    assert crossing_before("vae.encoder.block") == {"hidden"}
    assert crossing_before("dit.time") == {"latents", "two_copies"}
    assert crossing_before("dit.block") == {"latents", "flow_hidden", "time_hidden"}
    assert crossing_before("vae.decoder.embed") == {"latents"}
    assert crossing_before("vae.decoder.head") == {"hidden"}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("mode", ["joint", "frozen", "interval"])
def test_the_steps_with_parameters_are_those_that_costs_are_counted_for(tiny, stage, mode):
    config = tiny(stage, f"training.vae_update.mode={mode}", "training.vae_update.from_scratch=false")
    model = Cola(config, initialize_parallel())
    expected = [(part.label, part.parameters) for part in chain_parts(config)]
    chains = [model.steps(train_vae) for train_vae in (True, False)] if stage == 2 else [model.steps()]
    for chain in (*chains, measured_steps(model, config)):
        heavy = [step for step in chain if step.modules]
        counted = [sum(p.numel() for module in step.modules for p in module.parameters()) for step in heavy]
        assert [(step.part, count) for step, count in zip(heavy, counted, strict=True)] == expected
    held = {id(p) for step in model.steps() for module in step.modules for p in module.parameters()}
    assert held == {id(p) for p in model.parameters()}


def test_balance_is_the_best_of_all_splits():
    costs = [5.0, 1.0, 1.0, 7.0, 2.0, 2.0, 2.0, 4.0]

    def costliest(split: tuple[int, ...]) -> float:
        ends = [sum(split[: i + 1]) for i in range(len(split))]
        return max(sum(costs[end - count : end]) for end, count in zip(ends, split, strict=True))

    best = min(costliest((i, j, 8 - i - j)) for i in range(1, 7) for j in range(1, 8 - i))
    found = balance(costs, 3)
    assert sum(found) == 8 and costliest(found) == best
    assert balance(costs, 8) == (1,) * 8
    assert balance(costs, 1) == (8,)
    # Nothing in the first four pieces is trained: they cannot stand alone.
    assert balance(costs, 2, [False] * 4 + [True] * 4)[0] > 4


def test_the_large_parts_of_the_paper_model_are_spread_evenly():
    config = load_config("paper-2b", ["parallel.pipeline_parallel_size=4"])
    split, parts = pipeline_split(config), chain_parts(config)
    starts = [sum(split[:stage]) for stage in range(4)]
    flops = [sum(part.flops for part in parts[start : start + n]) for start, n in zip(starts, split, strict=True)]
    assert sum(split) == len(parts)
    assert max(flops) < 1.15 * sum(flops) / 4


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["parallel.pipeline_parallel_size=2", "parallel.zero_stage=2"], ["zero_stage=2", "use zero_stage=1"]),
        (["parallel.pipeline_parallel_size=2", "parallel.pipeline_split=[3]"], ["pipeline_split=[3]", "2 stages"]),
        (["parallel.offload_optimizer=true", "parallel.zero_stage=0"], ["offload_optimizer", "zero_stage"]),
    ],
)
def test_layouts_that_cannot_run_are_refused(tiny, overrides, named):
    with pytest.raises(ConfigError) as refused:
        tiny(2, *overrides)
    assert all(word in str(refused.value) for word in named) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["parallel.pipeline_split=[1,1]"], ["adds up to 2", "steps with parameters"]),
        (
            [
                "training.vae_update.mode=frozen",
                "training.vae_update.from_scratch=false",
                "parallel.pipeline_split=[2,9]",
            ],
            ["stage 0", "nothing that is trained"],
        ),
    ],
)
def test_splits_that_do_not_fit_the_model_are_refused(tiny, overrides, named):
    config = tiny(2, "parallel.pipeline_parallel_size=2", *overrides)
    with pytest.raises(ConfigError) as refused:
        pipeline_split(config)
    assert all(word in str(refused.value) for word in named)
    with pytest.raises(ConfigError, match="use fewer stages"):
        pipeline_split(tiny(2, "parallel.pipeline_parallel_size=40"))


def test_a_job_that_does_not_fit_the_layout_is_refused():
    with pytest.raises(ConfigError, match="multiple of 2"):
        initialize_parallel(pipeline_parallel_size=2)


def test_a_split_that_leaves_a_stage_empty_is_no_split():
    with pytest.raises(ValueError, match="must be positive"):
        cut_chain([Step("a -> b", lambda a: a, modules=[torch.nn.Linear(1, 1)])], (1, 0), ["a"])
