"""From a key to the types in a tree of sections: through optional sections, lists, mappings and tagged unions.

A tagged union is a field that takes one of several sections, told apart by a key that each of them has as a `Literal`:

    model: Annotated[ColaModel | LlamaModel, Field(discriminator="family")]

In the place of an error pydantic writes the tag behind such a field, and an index behind a list.
"""

import inspect
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from cola_megatron.config.facts import is_free

Kind = type[BaseModel]


class Place(NamedTuple):
    """Where an error is."""

    key: str
    """Dotted, as in an override."""
    section: Kind | None
    """The one that the last part of the key belongs to; None: it is an item of a list or a mapping."""


def alternatives(annotation: Any) -> Iterator[Any]:
    """The types that an annotation allows."""
    if get_origin(annotation) is Annotated:
        yield from alternatives(annotation.__origin__)
    elif get_origin(annotation) in (Union, types.UnionType):
        for each in get_args(annotation):
            yield from alternatives(each)
    else:
        yield annotation


def sections_in(annotation: Any) -> list[Kind]:
    """The sections that an annotation allows; those in its lists and mappings are not among them."""
    return [each for each in alternatives(annotation) if inspect.isclass(each) and issubclass(each, BaseModel)]


def tags_of(members: Sequence[Kind]) -> tuple[str, dict[Any, Kind]]:
    """The key that tells the sections of a tagged union apart, and for each of its values the section.

    Raises:
        TypeError: no key does.
    """
    for key in members[0].model_fields:
        found = [
            (tag, each)
            for each in members
            if key in each.model_fields and get_origin(each.model_fields[key].annotation) is Literal
            for tag in get_args(each.model_fields[key].annotation)
        ]
        if {each for _, each in found} == set(members) and len(dict(found)) == len(found):
            return key, dict(found)
    names = ", ".join(each.__name__ for each in members)
    raise TypeError(f"no key tells {names} apart: give each a Literal of its own")


def below(annotation: Any, part: str | int) -> list[Any]:
    """The annotations that a part of a key leads to: of a field in any section there, or of an item."""
    found = []
    for each in alternatives(annotation):
        if inspect.isclass(each) and issubclass(each, BaseModel):
            found += [each.model_fields[part].annotation] if part in each.model_fields else []
        elif get_origin(each) in (list, dict):
            found.append(get_args(each)[-1])
        elif get_origin(each) is tuple:
            items = get_args(each)
            found += [items[0]] if items[-1] is Ellipsis else items
    return found


def place_of(kind: Kind, location: Sequence[str | int]) -> Place:
    """What pydantic's place of an error in a tree of this kind means."""
    key: list[str] = []
    section: Kind | None = None
    here: list[Any] = [kind]
    for part in location:
        members = [each for annotation in here for each in sections_in(annotation)]
        if len(members) > 1:
            here = [tags_of(members)[1].get(part)]
            continue
        section = members[0] if members else None
        key.append(str(part))
        here = [each for annotation in here for each in below(annotation, part)]
    return Place(".".join(key), section)


def annotations_of(kind: Kind, key: str) -> list[Any]:
    """The types that a dotted key has, one for every section of a union that knows it; none: an unknown key."""
    here: list[Any] = [kind]
    for part in key.split("."):
        here = [each for annotation in here for each in below(annotation, part)]
    return here


def free_keys(kind: Kind, prefix: str = "") -> frozenset[str]:
    """Dotted names of the fields marked `FREE`; a free section stands for its keys."""
    found = set()
    for name, field in kind.model_fields.items():
        key = f"{prefix}{name}"
        if is_free(field):
            found.add(key)
            continue
        for section in sections_in(field.annotation):
            found |= free_keys(section, f"{key}.")
    return frozenset(found)
