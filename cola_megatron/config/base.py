"""What every section of the config tree shares."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A section: unknown keys are refused, values cannot change once read, defaults are checked like given values.

    Numbers are finite, and `true` is not one of them; a number where text belongs is that text.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_1(cls, value: Any, info: ValidationInfo) -> Any:
        given = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, bool) for item in given) and _is_number(cls.model_fields[info.field_name].annotation):
            raise PydanticCustomError("number_type", "Input should be a number, not true or false")
        return value


def _is_number(annotation: Any) -> bool:
    return annotation in (int, float) or type(annotation) is int or any(map(_is_number, get_args(annotation)))
