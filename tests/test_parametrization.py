"""Roles of parameters: every one has one, start and rate follow from it, and folding is the same training."""

import math
from collections.abc import Iterator

import pytest
import torch

from cola_megatron.config import ConfigError, RunConfig, load_config
from cola_megatron.config.parametrization import ParametrizationConfig
from cola_megatron.families import FAMILIES, family_of
from cola_megatron.layers.roles import FIXED, Roles
from cola_megatron.models.pipelined import PipelinedModel
from cola_megatron.parallel import initialize_parallel, initialize_parameters, mark_parameter
from cola_megatron.parallel.parameters import marks_of
from cola_megatron.training.optimizer import parameter_groups
from tests.ranks import run_ranks
from tests.support import TINY
from tests.test_autoregressive_training import LAYOUTS, SMALL, curve, run, weights
from tests.test_families import PRESETS
from tests.test_layouts import FP32_CURVE, FP32_GRADIENT, steps_under_layout

COMPLETEP = [f"model.transformer.parametrization.{key}" for key in ("kind=completep", "base_width=8", "base_depth=1")]
STANDARD = "model.transformer.parametrization.kind=standard"


def small(family: str, *overrides: str) -> RunConfig:
    return load_config(f"tiny{PRESETS[family]}", [*(TINY if family == "cola" else SMALL), *overrides])


def configs(kind: str) -> Iterator[RunConfig]:
    """Every network of every family; Cola in both stages, and its VAE in both forms."""
    for family in FAMILIES:
        stages = [["stage=1"], ["stage=2"], ["stage=1", "model.vae.post_norm=false"]] if family == "cola" else [[]]
        for overrides in stages:
            config = small(family, *overrides)
            yield family_of(config).with_parametrization(config, kind)


def started(config: RunConfig) -> PipelinedModel:
    groups = initialize_parallel()
    model = family_of(config).build(config, groups)
    initialize_parameters(model, config.seed, groups)
    return model


def role_of(model: PipelinedModel, name: str) -> str:
    return marks_of(model.get_parameter(name)).role.name


def test_a_parameter_without_a_role_is_refused():
    with pytest.raises(TypeError, match=r"shape \(3,\) has no role: see layers/roles.py"):
        mark_parameter(torch.nn.Parameter(torch.ones(3)), torch.Tensor.fill_, None)
    for config in configs("completep"):
        for name, parameter in started(config).named_parameters():
            assert marks_of(parameter).role.name, name


def test_what_every_parameter_of_cola_is():
    model = started(small("cola"))
    expected = {
        "vae.encoder.embedding.weight": "embedding",
        "vae.encoder.patch.weight": "hidden",
        "vae.encoder.head.weight": "readout",
        "vae.encoder.head.bias": "vector_of_readout",
        "vae.encoder.blocks.0.attention_norm.weight": "vector_on_stream",
        "vae.encoder.blocks.0.attention.qkv.weight": "in_branch",
        "vae.encoder.blocks.0.attention.query_norm.weight": "vector_in_branch",
        "vae.encoder.blocks.0.attention.output.weight": "ends_branch",
        "vae.encoder.blocks.0.attention.output.bias": "vector_ends_branch",
        "vae.encoder.blocks.0.ffn.output.weight": "in_branch",
        "vae.encoder.blocks.0.ffn_norm.weight": "vector_ends_branch",
        "vae.decoder.input.weight": "embedding",
        "vae.decoder.unpatch.weight": "hidden",
        "vae.decoder.norm.weight": "vector",
        "vae.decoder.head.linear.weight": "readout",
        "dit.input.weight": "embedding",
        "dit.time_embedding.input.weight": "embedding",
        "dit.time_embedding.output.weight": "hidden",
        "dit.blocks.0.attention.output.weight": "in_branch",
        "dit.blocks.0.ffn.output.bias": "vector_in_branch",
        "dit.blocks.0.ffn_shift_scale.linear.weight": "in_branch",
        "dit.blocks.0.ffn_gate.linear.weight": "ends_branch",
        "dit.blocks.0.ffn_gate.linear.bias": "vector_ends_branch",
        "dit.output_shift_scale.linear.weight": "hidden",
        "dit.output.weight": "readout",
    }
    assert {name: role_of(model, name) for name in expected} == expected
    pre_norm = started(small("cola", "stage=1", "model.vae.post_norm=false"))
    assert role_of(pre_norm, "vae.decoder.blocks.0.attention_norm.weight") == "vector_in_branch"
    assert role_of(pre_norm, "vae.decoder.blocks.0.ffn.output.weight") == "ends_branch"


def test_the_base_size_is_the_standard_one_bit_for_bit():
    for config, standard in zip(configs("completep"), configs("standard"), strict=True):
        models = [started(each) for each in (config, standard)]
        first, second = (dict(model.named_parameters()) for model in models)
        assert all(torch.equal(first[name], second[name]) for name in second)
        groups = [
            [{**group, "params": len(group["params"])} for group in parameter_groups(model, config)] for model in models
        ]
        assert groups[0] == groups[1]
        assert {(group["learning_rate_ratio"], group["eps"]) for group in groups[1]} <= {(1.0, 1e-8)}


def test_the_start_follows_from_the_role_at_four_times_the_width_and_twice_the_depth():
    """Whatever a matrix is drawn from: a normal distribution, or a uniform one whose bound follows from its shape."""
    seen: set[str] = set()
    for config in configs("completep"):
        family = family_of(config)
        width, depth = family.size(config)
        large = started(family.scaled(config, 4 * width, 2 * depth))
        base = dict(started(config).named_parameters())
        for name, parameter in large.named_parameters():
            role = marks_of(parameter).role
            expected = base[name].detach().std().item() if name in base else 0.0
            if expected and parameter.numel() > 4000:
                seen.add(role.name)
                assert parameter.detach().std().item() / expected == pytest.approx(role.start, rel=0.12), name
    assert seen == {"embedding", "hidden", "in_branch", "ends_branch", "readout", "fixed"}


def test_rates_and_decay_follow_from_the_role():
    config = family_of(small("autoregressive")).with_parametrization(small("autoregressive"), "completep")
    config = family_of(config).scaled(config, 128, 4)  # 4 times the width, 2 times the depth
    model = started(config)
    of = {id(parameter): group for group in parameter_groups(model, config) for parameter in group["params"]}
    expected = {  # rate, epsilon
        "embedding.weight": (1, 1 / 4),
        "blocks.0.attention_norm.weight": (1, 1 / 8),
        "blocks.0.attention.qkv.weight": (1 / 4, 1 / 8),
        "blocks.0.attention.output.weight": (1 / 8, 1 / 4),
        "blocks.3.ffn.output.weight": (1 / 8, 1 / 4),
        "norm.weight": (1, 1 / 4),
        "head.linear.weight": (1 / 4, 1),
    }
    for name, (rate, eps) in expected.items():
        group = of[id(model.get_parameter(f"transformer.{name}"))]
        assert (group["learning_rate_ratio"], group["eps"]) == pytest.approx((rate, 1e-8 * eps)), name
        decay = 0.01 if "norm" not in name else 0.0
        assert group["weight_decay"] * rate == pytest.approx(decay), name


def test_a_folded_multiplier_trains_the_same_function():
    """y = c W x, and y = W' x with W' = c W from start, rate, decay and epsilon: the same function at every step."""
    multiplier, rate, decay, eps = 1 / 8, 0.01, 0.1, 1e-3
    random = torch.Generator().manual_seed(0)
    start = torch.randn(4, 5, generator=random)
    x = torch.randn(16, 5, generator=random)
    target = torch.randn(16, 4, generator=random)

    def outputs(start: torch.Tensor, outside: float, rate: float, decay: float, eps: float) -> list[torch.Tensor]:
        weight = torch.nn.Parameter(start)
        optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=decay, eps=eps)
        found = []
        for _ in range(20):
            found.append(outside * x @ weight.t())
            optimizer.zero_grad()
            (found[-1] - target).square().mean().backward()
            optimizer.step()
        return [each.detach() for each in found]

    outside = outputs(start.clone(), multiplier, rate, decay, eps)
    folded = outputs(start * multiplier, 1.0, rate * multiplier, decay / multiplier, eps / multiplier)
    for first, second in zip(outside, folded, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def test_mup_knows_no_depth():
    section = ParametrizationConfig.model_validate({"kind": "mup", "base_width": 16, "base_depth": 1})
    roles = Roles(section, width=64, depth=7)
    assert roles.ends_branch.rate == roles.in_branch.rate == 1 / 4 and roles.vector_on_stream.rate == 1
    assert FIXED.start == FIXED.rate == FIXED.eps == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kind=mup", "model.transformer.parametrization.kind=mup needs base_width"),
        ("{kind: completep, base_width: 8}", "model.transformer.parametrization.kind=completep needs base_depth"),
        ("kind=deep", "'standard', 'mup' or 'completep'"),
    ],
)
def test_a_base_that_is_missing_is_named_in_one_line(override, message):
    joint = "=" if override.startswith("{") else "."
    with pytest.raises(ConfigError) as refusal:
        small("autoregressive", f"model.transformer.parametrization{joint}{override}")
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_other_sizes_keep_heads_and_proportions():
    config = load_config("tiny-autoregressive", ["model.transformer.num_key_value_heads=2"])
    transformer = family_of(config).scaled(config, 256, 12).model.transformer
    assert (transformer.hidden_size, transformer.num_layers, transformer.ffn_hidden_size) == (256, 12, 1104)
    assert (transformer.num_attention_heads, transformer.key_value_heads, transformer.head_dim) == (8, 4, 32)
    cola = load_config("paper-2b", [])
    model = family_of(cola).scaled(cola, 1024, 12).model
    assert (model.vae.hidden_size, model.vae.head_dim, model.vae.encoder_layers) == (768, 128, 2)
    assert (model.dit.hidden_size, model.dit.num_attention_heads, model.dit.num_layers) == (1024, 8, 12)
    for family in FAMILIES:
        config = small(family)
        assert family_of(config).scaled(config, *family_of(config).size(config)) == config
    with pytest.raises(
        ConfigError, match=r"width 100: model\.transformer has 4 heads at hidden_size=32.*multiple of 8"
    ):
        family_of(small("plaid")).scaled(small("plaid"), 100, 2)


def assert_same_training(expected, found) -> None:
    (metrics, gradients), (own, moments) = expected, found
    for mine, one in zip(own, metrics, strict=True):
        assert mine["loss"] == pytest.approx(one["loss"], rel=FP32_CURVE)
    for name, gradient in gradients.items():
        assert (moments[name] - gradient).norm() <= FP32_GRADIENT * gradient.norm(), name


def test_training_is_the_same_in_every_layout():
    config = [*SMALL, *COMPLETEP, "training.micro_batch_size=2"]
    expected = steps_under_layout(load_config("tiny-autoregressive", config), 1)
    assert math.isfinite(expected[0][-1]["loss"])
    for layout in ("TP 2, sequence parallel, in chunks", "PP 2", "DP 2, ZeRO 3"):
        ranks, overrides = LAYOUTS[layout]
        found = steps_under_layout(load_config("tiny-autoregressive", [*config, *overrides]), ranks)
        assert_same_training(expected, found)


def test_stop_and_resume_is_bit_identical_and_goes_on_in_another_layout(corpus, tmp_path):
    def config(name: str, *overrides: str) -> RunConfig:
        paths = [f"data.path={corpus}", f"runs_folder={tmp_path / 'runs'}", f"name={name}"]
        return load_config("tiny-autoregressive", [*SMALL, *COMPLETEP, *paths, "training.steps=4", *overrides])

    run(config("straight"))
    for name in ("halves", "elsewhere"):
        run(config(name, "training.stop_after=2"))
    run(config("halves"))
    assert curve(config("halves")) == curve(config("straight"))
    expected = weights(config("straight"))
    assert all(torch.equal(value, expected[name]) for name, value in weights(config("halves")).items())
    ranks, parallel = LAYOUTS["TP 2 x PP 2"]
    run_ranks(run, ranks, config("elsewhere", *parallel))
    for name, value in weights(config("elsewhere")).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)
    with pytest.raises(Exception, match=r"parametrization\.kind was 'completep', now 'standard'"):
        run(config("halves", STANDARD))
    # A new run may go on from its weights and moments under other rates, and says so.
    forked = config("fork", f"training.start_from={tmp_path / 'runs' / 'straight'}", "training.steps=5", STANDARD)
    run(forked)
    assert len(curve(forked)) == 1 and "parametrization.kind" in (forked.run_folder / "start.json").read_text()
