"""Sections that a tag chooses among: refusals, suggestions and text inside them are those of any section."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Discriminator, Field, Tag

from cola_megatron.config import ConfigError, Section, load_tree
from cola_megatron.config.facts import FREE
from cola_megatron.config.types import PositiveInt
from cola_megatron.config.walk import free_keys


class Depth(Section):
    layers: PositiveInt = 2


class Latent(Section):
    family: Literal["latent"]
    path: str | None = None
    depth: Depth = Depth()


class Masked(Section):
    family: Literal["masked", "absorbing"]
    width: PositiveInt = 8
    path: Path = Path("weights")
    scale: Annotated[float, Field(gt=0)] = 1.0
    workers: Annotated[PositiveInt, FREE] = 1


Model = Annotated[Latent | Masked, Field(discriminator="family")]


class Tree(Section):
    model: Model = Latent(family="latent")
    second: Model | None = None
    more: list[Model] = Field(default_factory=list)
    names: dict[str, str] = Field(default_factory=dict)


def load(tmp_path: Path, tree: dict, *overrides: str) -> Tree:
    path = tmp_path / "tree.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_tree(Tree, path, overrides)


@pytest.mark.parametrize(
    ("overrides", "refusal"),
    [
        ("model.depth.layer=3", "model.depth.layer=3: unknown key; did you mean layers?"),
        ("model.family=masked & model.widht=3", "model.widht=3: unknown key; did you mean width?"),
        ("model.widht=3 & model.family=absorbing", "model.widht=3: unknown key; did you mean width?"),
        ("model.family=masked & model.depth.layers=3", "model.depth={'layers': 3}: unknown key"),
        ("model.family=masked & model.zzz=3", "known here: family, width, path, scale, workers"),
        ("model.family=masekd", "model.family='masekd': there is none of that name; did you mean masked?"),
        ("model.family=7", "model.family='7': there is none of that name; known here: latent, masked, absorbing"),
        ("second.path=x", "second.family is missing; give one of latent, masked, absorbing"),
        ("second.family=masked & second.width=true", "second.width=True: input should be a number, not true or false"),
        ("second.family=masked & second.width=0", "second.width=0: input should be greater than 0"),
        ("second.family=masked & second.paht=x", "second.paht='x': unknown key; did you mean path?"),
        ("model=3", "model=3: input should be a valid dictionary"),
        ("more=[{family: masked, widht: 3}]", "more.0.widht=3: unknown key; did you mean width?"),
        ("more=[{family: maskd}]", "more.0.family='maskd': there is none of that name; did you mean masked?"),
    ],
)
def test_what_is_wrong_inside_a_chosen_section_is_refused_by_its_own_key(tmp_path, overrides, refusal):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, {"model": {"family": "latent"}}, *overrides.split(" & "))
    assert refusal in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["007", "1e3", "true", "2024-01-01", "null_"])
def test_text_inside_a_chosen_section_stays_text(tmp_path, text):
    for overrides in (["model.family=masked", f"model.path={text}"], [f"model.path={text}", "model.family=masked"]):
        assert load(tmp_path, {}, *overrides).model.path == Path(text)
    assert load(tmp_path, {}, f"model.path={text}", "model.family=latent").model.path == text
    assert load(tmp_path, {}, f"names.some={text}").names == {"some": text}


def test_numbers_inside_a_chosen_section_are_numbers(tmp_path):
    model = load(tmp_path, {"model": {"family": "absorbing"}}, "model.scale=1e-4", "model.width=16").model
    assert (model.scale, model.width) == (1e-4, 16)


def test_a_section_without_tag_keeps_its_null(tmp_path):
    assert load(tmp_path, {"model": {"family": "latent", "path": "x"}}, "model.path=null").model.path is None
    assert load(tmp_path, {}, "second=null").second is None


def test_free_keys_are_found_in_every_section_of_a_union():
    assert free_keys(Tree) == {"model.workers", "second.workers"}


def family_or_latent(given: Any) -> str:
    return given.get("family", "latent") if isinstance(given, dict) else given.family


class DefaultTree(Section):
    model: Annotated[
        Annotated[Latent, Tag("latent")] | Annotated[Masked, Tag("masked")], Discriminator(family_or_latent)
    ] = Latent(family="latent")


@pytest.mark.parametrize(
    ("override", "refusal"),
    [
        ("model.depth.layer=3", "model.depth.layer=3: unknown key; did you mean layers?"),
        ("model.family=masekd", "model.family='masekd': there is none of that name; did you mean masked?"),
    ],
)
def test_a_tag_that_a_function_finds_is_as_good(tmp_path, override, refusal):
    path = tmp_path / "tree.yaml"
    path.write_text("model: {family: latent}")
    with pytest.raises(ConfigError) as error:
        load_tree(DefaultTree, path, [override])
    assert refusal in str(error.value)
    path.write_text("model: {family: masked}")
    assert load_tree(DefaultTree, path, ["model.path=007"]).model.path == Path("007")
