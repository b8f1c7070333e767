"""Stored configs of earlier schemas: what each kind of change does to them, and what is said of keys that are gone."""

import json
from pathlib import Path
from typing import Annotated, ClassVar

import pytest
import yaml

from cola_megatron.config import (
    ConfigError,
    RunConfig,
    Section,
    dump_config,
    load_config,
    load_tree,
    stored_config,
    stored_tree,
)
from cola_megatron.config.changes import (
    SCHEMA_KEY,
    Added,
    Removed,
    Renamed,
    schema_after,
    upgraded,
    what_became_of,
    without_left_over,
)
from cola_megatron.config.facts import OURS
from cola_megatron.config.history import CHANGES
from cola_megatron.config.stored import upgraded_tree
from cola_megatron.config.types import Float, PositiveInt

OLD = Path(__file__).parent / "data" / "old_runs" / "schema_1" / "runs" / "stage2"

HISTORY = (
    Renamed("section.width", "section.size"),
    Added("section.rate", 0.0),
    Removed("section.sort", "everything is sorted now", reproduced=(True,)),
    Renamed("section", "part"),
    Removed("part.verbose", "logging decides", reproduced=None),
)


class Part(Section):
    size: Annotated[PositiveInt, OURS] = 4
    rate: Annotated[Float, OURS] = 0.5


class Tree(Section):
    history: ClassVar = HISTORY
    name: Annotated[str, OURS] = "tree"
    part: Part = Part()


def load(tmp_path: Path, text: str) -> Tree:
    path = tmp_path / "tree.yaml"
    path.write_text(text)
    return load_tree(Tree, path)


FIRST = {"name": "old", "section": {"width": 8, "sort": True, "verbose": True}}


def test_a_tree_of_every_schema_is_brought_up_to_date():
    now = {"name": "old", "part": {"size": 8, "rate": 0.0}}
    assert upgraded(FIRST, HISTORY, "x") == now
    third = {SCHEMA_KEY: 3, "name": "old", "section": {"size": 8, "rate": 0.25, "sort": True, "verbose": False}}
    assert upgraded(third, HISTORY, "x") == {"name": "old", "part": {"size": 8, "rate": 0.25}}
    assert upgraded({SCHEMA_KEY: 6, **now}, HISTORY, "x") == now
    assert FIRST["section"] == {"width": 8, "sort": True, "verbose": True}


def test_a_value_that_cannot_be_reproduced_stays_and_is_refused_with_the_reason(tmp_path):
    unsorted = {**FIRST, "section": {**FIRST["section"], "sort": False}}
    assert upgraded(unsorted, HISTORY, "x")["part"] == {"size": 8, "rate": 0.0, "sort": False}
    with pytest.raises(ConfigError, match=r"part.sort=False: unknown key; was removed in schema 4: everything is sor"):
        load(tmp_path, yaml.safe_dump({SCHEMA_KEY: 1, **unsorted}))


def test_what_was_left_over_is_taken_out_to_read_what_a_run_made():
    unsorted = {**FIRST, "section": {**FIRST["section"], "sort": False}}
    now = {"name": "old", "part": {"size": 8, "rate": 0.0}}
    assert without_left_over(upgraded(unsorted, HISTORY, "x"), HISTORY, keep=lambda key: False) == now
    kept = without_left_over(upgraded(unsorted, HISTORY, "x"), HISTORY, keep=lambda key: key == "part.sort")
    assert kept["part"]["sort"] is False


def test_a_key_may_belong_to_one_section_of_a_union():
    changes = (Added("model.depth", 2, where=("model.family", "latent")),)
    assert upgraded({"model": {"family": "latent"}}, changes, "x") == {"model": {"family": "latent", "depth": 2}}
    assert upgraded({"model": {"family": "masked"}}, changes, "x") == {"model": {"family": "masked"}}
    assert upgraded({}, changes, "x") == {}


@pytest.mark.parametrize(
    ("key", "fate"),
    [
        ("section.width", "was renamed to part.size in schema 5"),
        ("section.rate", "was renamed to part.rate in schema 5"),
        ("section.sort", "was removed in schema 4: everything is sorted now"),
        ("section.verbose", "was removed in schema 6: logging decides"),
        ("section", "was renamed to part in schema 5"),
        ("part.size", None),
        ("sections.width", None),
    ],
)
def test_what_became_of_a_key(key, fate):
    assert what_became_of(key, HISTORY) == fate


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("section: {width: 3}", "section={'width': 3}: unknown key; was renamed to part in schema 5"),
        ("part: {width: 3}", "part.width=3: unknown key; known here: size, rate"),
        ("part: {verbose: true}", "part.verbose=True: unknown key; was removed in schema 6: logging decides"),
        ("section: 3", "section=3: unknown key; was renamed to part"),
        ("schema: 7", "has a config of schema 7, and this version of cola_megatron reads schemas up to 6"),
        ("schema: new", "schema='new' is not a number from 1 to 6"),
        ("schema: 0", "schema=0 is not a number from 1 to 6"),
        ("schema: true", "schema=True is not a number from 1 to 6"),
        ("schema: 1\nsection: 3", "section is a value, not a section"),
    ],
)
def test_a_file_that_is_not_understood_is_refused_in_one_line(tmp_path, text, refusal):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert refusal in str(error.value) and "\n" not in str(error.value)


def test_a_file_without_a_number_is_of_the_present_unless_it_is_a_whole_old_one(tmp_path):
    assert load(tmp_path, "part: {size: 3}").part == Part(size=3, rate=0.5)
    assert load(tmp_path, "{}").part.rate == 0.5
    assert load(tmp_path, yaml.safe_dump(FIRST)).part == Part(size=8, rate=0.0)
    assert load(tmp_path, "schema: 1\nsection: {width: 3}").part == Part(size=3, rate=0.0)
    everything = "name: mine\npart: {size: 3, rate: 0.25}"
    assert load(tmp_path, everything).part == Part(size=3, rate=0.25)


def test_an_override_names_no_schema(tmp_path):
    with pytest.raises(ConfigError, match="schema=1: unknown key"):
        load_config("tiny", ["schema=1"])


def test_a_config_is_stored_with_its_number_first():
    config = load_config("tiny")
    assert next(iter(stored_tree(config).items())) == (SCHEMA_KEY, schema_after(CHANGES))
    assert dump_config(config).startswith(f"schema: {schema_after(CHANGES)}\n")
    assert stored_config(json.loads(json.dumps(stored_tree(config))), "here") == config


def test_the_changes_lead_from_the_first_schema_to_the_keys_of_today():
    """Fails where a key was added, renamed or removed without a line in `config/history.py`."""
    old = yaml.safe_load((OLD / "config.yaml").read_text())
    assert keys(upgraded_tree(old, OLD)) == keys(load_config("tiny").model_dump(mode="json"))


def test_an_old_run_is_the_same_run_whoever_reads_its_config():
    path = OLD / "config.yaml"
    state = json.loads((OLD / "checkpoints" / "step_00000004" / "state.json").read_text())
    assert load_config(path) == stored_config(state["config"], path)


def test_every_change_was_needed():
    """A line about a key that no earlier schema had is a slip of the pen."""
    tree = yaml.safe_load((OLD / "config.yaml").read_text())
    known = keys(tree)
    for change in CHANGES:
        named = change.old if isinstance(change, Renamed) else change.key if isinstance(change, Removed) else None
        assert named is None or any(f"{key}.".startswith(f"{named}.") for key in known), named
        tree = change(tree)
        known |= keys(tree)


def keys(tree: dict, prefix: str = "") -> set[str]:
    found = set()
    for name, value in tree.items():
        found |= keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}"}
    return found


def test_only_trees_that_are_stored_have_a_history():
    assert RunConfig.history is CHANGES
    assert Part.history is None and SCHEMA_KEY not in stored_tree(Part())
