"""Rules for learning rate and batch: their values by hand, what they set in a config, what they refuse."""

from pathlib import Path
from typing import Annotated

import pytest

from cola_megatron.config import ConfigError, RunConfig, Section, load_config, resolve_tree
from cola_megatron.config.facts import OURS
from cola_megatron.planning.compute import parameters_of
from cola_megatron.scaling.batch_rules import BATCH
from cola_megatron.scaling.learning_rate_rules import FINAL_RATE, RATE, PublishedRate
from cola_megatron.scaling.rule import Facts, facts_of
from cola_megatron.scaling.rules import Batch, LearningRate, rules

# 864e6 parameters are eight times the reference of the ladder.
FACTS = Facts(parameters=864_000_000, tokens=2e10, width=3072, depth=24)


class Study(Section):
    learning_rate: Annotated[LearningRate, OURS] = PublishedRate()
    batch: Annotated[Batch | None, OURS] = None


def rate_rule(**tree):
    return resolve_tree(Study, {"learning_rate": tree}).learning_rate


def batch_rule(**tree):
    return resolve_tree(Study, {"batch": tree}).batch


@pytest.fixture
def base() -> RunConfig:
    """179 M parameters in 19 blocks of width 768; 512 sequences of 512 tokens at a rate of 3e-4 that decays to 3e-5."""
    return load_config("base-autoregressive")


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"rule": "published"}, 3e-4),
        ({"rule": "constant", "rate": 2e-3}, 2e-3),
        ({"rule": "olmo_ladder"}, 0.0047 / 2),
        ({"rule": "olmo_ladder", "coefficient": 0.00235}, 0.00235 / 2),
        ({"rule": "width"}, 3e-4 / 2),
        ({"rule": "width", "rate": 1e-3, "base_width": 384, "exponent": -1}, 1e-3 / 8),
        ({"rule": "power_law", "coefficient": 5.0, "exponent": -0.5, "reference": 216e6}, 2.5),
        ({"rule": "power_law", "of": "depth", "coefficient": 1e-3, "exponent": 1.0, "reference": 12}, 2e-3),
        # ln 1.79 - 0.713 ln 8.64e8 + 0.307 ln 2e10 = 0.58222 - 14.67146 + 7.28173
        ({"rule": "step_law"}, 1.1055e-3),
    ],
)
def test_a_rate_is_what_its_formula_says(base, tree, expected):
    assert rate_rule(**tree).value(FACTS, base) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize(
    ("tree", "tokens"),
    [
        ({"rule": "published"}, 512 * 512),
        ({"rule": "olmo_ladder"}, 160 * 2048 * 4),
        ({"rule": "power_law", "of": "tokens", "coefficient": 1000, "exponent": 0.5, "reference": 2e8}, 10_000),
        ({"rule": "power_lines", "tokens": 2e9}, 512 * 512 * 2.4155),  # 10^0.383
        ({"rule": "power_lines", "tokens": 2e9, "batch_tokens": 1000, "exponent": 1}, 10_000),
        # ln 0.58 + 0.571 ln 2e10 = -0.54473 + 13.54355
        ({"rule": "step_law"}, 441_900),
    ],
)
def test_a_batch_is_what_its_formula_says(base, tree, tokens):
    assert batch_rule(**tree).value(FACTS, base) == pytest.approx(tokens, rel=2e-4)


def test_the_facts_are_those_of_the_config(base):
    assert facts_of(base) == (parameters_of(base)["without embeddings"], 100_000 * 512 * 512, 768, 19)
    assert facts_of(base, tokens=5e9).tokens == 5e9
    for preset, shape in (
        ("paper-2b", (2048, 24)),
        ("paper-2b-plaid", (2048, 27)),
        ("tiny-masked-diffusion", (128, 6)),
    ):
        assert facts_of(load_config(preset))[2:] == shape
    assert facts_of(load_config("paper-2b", ["stage=1"]))[2:] == (1536, 8)


def test_a_published_rule_sets_nothing(base):
    assert (
        rate_rule(rule="published").decide(base).overrides == {} == batch_rule(rule="published").decide(base).overrides
    )
    odd = load_config("base-autoregressive", ["training.global_batch_size=48"])
    assert batch_rule(rule="published", divisor=32).decide(odd).overrides == {}


def test_what_a_rule_sets_is_a_config(base):
    chosen = {
        **rate_rule(rule="width", rate=1e-3, base_width=192).decide(base).overrides,
        **batch_rule(rule="olmo_ladder").decide(base).overrides,
    }
    assert chosen == {RATE: 5e-4, FINAL_RATE: 5e-5, BATCH: chosen[BATCH]}
    again = load_config("base-autoregressive", [f"{key}={value}" for key, value in chosen.items()])
    assert again.training.optimizer.learning_rate == 5e-4


def test_the_step_law_ends_at_its_own_rate(base):
    assert rate_rule(rule="step_law").decide(base).overrides[FINAL_RATE] == 1e-5
    assert (
        rate_rule(rule="step_law", coefficient=1e-3).decide(base).overrides[FINAL_RATE] < 1e-5
    )  # never above the peak


def test_a_batch_is_rounded_to_whole_micro_batches_and_says_so(base):
    rule = {"rule": "power_law", "coefficient": 100 * 512, "exponent": 0.0}  # 100 sequences
    for divisor, batch, rounding in (
        (None, 96, "-4.0%"),
        (16, 96, "-4.0%"),
        (64, 128, "+28.0%"),
        (512, 512, "+412.0%"),
    ):
        found = batch_rule(**rule, divisor=divisor).decide(base)
        assert found.overrides == {BATCH: batch}
        assert found.wanted == pytest.approx(100) and f"={batch} by power_law" in found.words
        assert f"100 rounded to a multiple of {divisor or 16}, {rounding}" in found.words
    exact = batch_rule(rule="power_law", coefficient=96 * 512, exponent=0.0).decide(base)
    assert exact.overrides == {BATCH: 96} and "rounded" not in exact.words
    with pytest.raises(ConfigError, match=r"divisor=24 of the batch rule power_law must be a multiple of .*size=16"):
        batch_rule(**rule, divisor=24).decide(base)


def test_what_is_no_rule_is_refused():
    for tree, words in (
        ({"learning_rate": {"rule": "olmo"}}, r"learning_rate"),
        ({"learning_rate": {"rule": "power_law", "exponent": 1.0}}, r"learning_rate\.coefficient"),
        ({"learning_rate": {"rule": "olmo_ladder", "slope": 1.0}}, r"learning_rate\.slope"),
        ({"batch": {"rule": "power_lines"}}, r"batch\.tokens"),
    ):
        with pytest.raises(ConfigError, match=words):
            resolve_tree(Study, tree)


def test_the_page_has_every_rule_with_its_formula_and_source():
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    section = page[page.index("## Rules for learning rate and batch") :]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    found = {(row[0].strip("`"), row[1].strip("`")): row[2:] for row in rows}
    for key, name, kind in rules():
        assert found[key, name] == [kind.formula, kind.source, kind.fitted_on], (key, name)
