"""The coordinate check: CompleteP passes it in every family, the standard parametrisation does not, and the command."""

import json
import os

import pytest
import torch

from cola_megatron.config import ConfigError, RunConfig, load_config
from cola_megatron.families import FAMILIES, family_of
from cola_megatron.scaling.coordinates import CoordinateCheck, Slope, check_coordinates
from tests.commands import cola
from tests.test_families import PRESETS

SMALL = ["model.vocab_size=128", "data.sequence_length=32"]
SIZES = {
    "cola": [
        "model.vae={encoder_layers: 2, decoder_layers: 2, hidden_size: 32, ffn_hidden_size: 128, "
        "num_attention_heads: 2, latent_dim: 8}",
        "model.dit={num_layers: 2, hidden_size: 32, num_attention_heads: 2, head_dim: 16, latent_dim: 8, "
        "block_size: 8, rotary_dim: 12}",
    ]
}
TRANSFORMER = [
    "model.transformer={num_layers: 4, hidden_size: 32, ffn_hidden_size: 128, num_attention_heads: 2}",
]
DEPTHS = {"cola": [2, 4, 8]}


def small(family: str, kind: str, *overrides: str) -> RunConfig:
    config = load_config(f"tiny{PRESETS[family]}", [*SMALL, *SIZES.get(family, TRANSFORMER), *overrides])
    return family_of(config).with_parametrization(config, kind)


def check(family: str, kind: str, *overrides: str, widths=(32, 64, 128), depths=None, **options) -> CoordinateCheck:
    config = small(family, kind, *overrides)
    return check_coordinates(config, widths, depths or DEPTHS.get(family, [4, 8, 16]), steps=5, **options)


def failing(found: CoordinateCheck) -> dict[str, set[str]]:
    return {
        axis: {slope.coordinate for slope in found.slopes if slope.axis == axis and not slope.holds}
        for axis in ("width", "depth")
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_completep_passes_in_every_family_and_standard_fails_along_both_axes(family):
    torch.set_num_threads(1)
    found = check(family, "completep", seeds=2)
    assert found.passes, [slope for slope in found.slopes if not slope.holds]
    assert all(slope.change is not None for slope in found.slopes)
    standard = failing(check(family, "standard"))
    assert standard["width"] and standard["depth"]


def test_mup_passes_along_the_width_and_fails_along_the_depth():
    found = failing(check("autoregressive", "mup", seeds=2))
    assert not found["width"] and {"attention branch", "feed-forward branch"} <= found["depth"]


def test_one_size_of_an_axis_leaves_it_out():
    found = check("autoregressive", "completep", widths=(32,), depths=(2, 4))
    assert {slope.axis for slope in found.slopes} == {"depth"}
    (alone,) = found.traces["width"]
    assert len(alone.rms["logits"]) == 6 and alone.change["logits"][0] == 0 and alone.blocks["logits"] == 4


def test_the_sizes_of_the_check_do_not_change_what_it_draws():
    """The trace of one size is the same whatever it is checked with."""
    first = check("plaid", "completep", widths=(32, 64), depths=(4,)).traces["width"]
    second = check("plaid", "completep", widths=(64,), depths=(2, 4)).traces["width"]
    assert second == [trace for trace in first if trace.width == 64]


@pytest.mark.parametrize(
    ("change", "rms", "wanted", "holds"),
    [
        (0.0, 0.0, 0.0, True),
        (0.3, 0.0, 0.0, False),
        (-0.45, -0.4, 0.0, True),
        (-0.6, -0.4, 0.0, False),
        (0.0, 0.3, 0.0, False),
        (-1.1, -1.0, -1.0, True),
        (-0.1, -0.1, -1.0, False),
        (None, None, 0.0, True),
    ],
)
def test_a_change_may_fall_with_its_random_part_and_not_grow(change, rms, wanted, holds):
    assert Slope("logits", "depth", change, rms, wanted, 0.25).holds is holds


def test_what_was_not_trained_does_not_hold():
    found = check("autoregressive", "completep", widths=(32, 64), depths=(4,), learning_rate=0.0)
    assert found.slopes and all(slope.is_still and slope.change is None for slope in found.slopes)
    assert not found.passes and not any(slope.holds for slope in found.slopes)


def test_a_size_that_the_family_cannot_have_is_refused_before_training():
    seen = []
    with pytest.raises(ConfigError, match=r"width 40: model\.transformer has 2 heads at hidden_size=32"):
        check("autoregressive", "completep", widths=(32, 40), on_run=lambda *size: seen.append(size))
    assert not seen


def test_the_command_prints_draws_and_ends_with_its_verdict(tmp_path):
    pytest.importorskip("matplotlib")
    words = ["tiny-autoregressive", *SMALL, *TRANSFORMER, "--widths", "32,64,128", "--depths", "4,8", "--steps", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    passed = cola(
        "sweep", "coordinates", *words, "--output", str(tmp_path / "check"), "--bound", "0.4", env=environment
    )
    assert passed.returncode == 0, passed.stderr
    assert "all slopes hold" in passed.stdout and passed.stdout.count("attention branch") == 2
    tree = json.loads((tmp_path / "check" / "coordinates.json").read_text())
    assert tree["passes"] is True and [each["width"] for each in tree["traces"]["width"]] == [32, 64, 128]
    assert (tmp_path / "check" / "coordinates.png").stat().st_size > 10_000
    failed = cola("sweep", "coordinates", *words, "--parametrization", "standard", "--json", env=environment)
    assert failed.returncode == 1 and json.loads(failed.stdout)["passes"] is False
    wrong = cola("sweep", "coordinates", "tiny-autoregressive", "--widths", "32,x")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert "--widths 32,x: give whole numbers above 0 with commas between them" in wrong.stderr
