"""Recipe files mean what they say."""

from pathlib import Path

import pytest

from cola_megatron.config import ConfigError
from data_prep.recipe import Recipe
from launchers.prep_recipes import from_file

RECIPE = """output: out
sources:
  - {name: web, inputs: [a.jsonl]}
"""


def recipe(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE + text)
    return from_file(path, list(overrides), None)


def test_a_key_without_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.yaml:5: deduplication\.near has no value; write near: \{\} for"):
        recipe(tmp_path, "deduplication:\n  near:\n  exact: true\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml:4: cleaning has no value"):
        recipe(tmp_path, "cleaning:\n")
    with pytest.raises(ConfigError, match=r"^deduplication\.near=: has no value"):
        recipe(tmp_path, "", "deduplication.near=")


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.yaml:5: seed stands in line 4 as well; leave one out"):
        recipe(tmp_path, "seed: 1\nseed: 2\n")
    (tmp_path / "recipe.yaml").write_text("output: out\nsources:\n  - name: web\n    inputs: [a]\n    inputs: [b]\n")
    with pytest.raises(ConfigError, match=r":5: sources\.0\.inputs stands in line 4 as well"):
        from_file(tmp_path / "recipe.yaml", [], None)


def test_on_and_off_are_said(tmp_path: Path) -> None:
    on, off = recipe(tmp_path, "deduplication: {near: {}}\n"), recipe(tmp_path, "deduplication: {near: null}\n")
    assert on.deduplication.near is not None and off.deduplication.near is None
