"""What every section of the config tree shares."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from cola_megatron.config.changes import Change


class Section(BaseModel):
    """A section: unknown keys are refused, values cannot change once read, defaults are checked like given values.

    Numbers are finite (`config.types` has their types); a number where text belongs is that text.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        use_attribute_docstrings=True,
    )

    history: ClassVar[Sequence[Change] | None] = None
    """Of a whole tree that is stored with the number of its schema: the changes since there is a number."""
