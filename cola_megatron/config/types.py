"""Numbers of a config. Use these and not `int` and `float`: pydantic takes `true` for 1, here it is refused.

Other bounds, and choices among numbers, end in `NOT_BOOL`, which looks at a value first when it comes last:

    zero_stage: Annotated[int, Field(ge=0, le=3), NOT_BOOL] = 1
    stage: Annotated[Literal[1, 2], NOT_BOOL] = 2
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

__all__ = [
    "NOT_BOOL",
    "Float",
    "Int",
    "NonNegativeFloat",
    "NonNegativeInt",
    "PositiveFloat",
    "PositiveInt",
    "Share",
]


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "Input should be a number, not true or false")
    return value


NOT_BOOL = BeforeValidator(_not_bool)

Int = Annotated[int, NOT_BOOL]
PositiveInt = Annotated[int, Field(gt=0), NOT_BOOL]
NonNegativeInt = Annotated[int, Field(ge=0), NOT_BOOL]
Float = Annotated[float, NOT_BOOL]
PositiveFloat = Annotated[float, Field(gt=0), NOT_BOOL]
NonNegativeFloat = Annotated[float, Field(ge=0), NOT_BOOL]
Share = Annotated[float, Field(ge=0, le=1), NOT_BOOL]
