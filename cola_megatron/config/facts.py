"""What a field says of its key beside type, default and meaning, as markers in its annotation.

    eps: Annotated[PositiveFloat, OURS] = 1e-8
    steps: Annotated[PositiveInt, PUBLISHED, FREE] = 250_000
    log: Annotated[LogConfig, FREE] = LogConfig()

The meaning is the docstring under the field.
"""

from enum import Enum, StrEnum

from pydantic.fields import FieldInfo

__all__ = ["FREE", "OURS", "PUBLISHED", "TUNED", "Origin", "Resume", "is_free", "origin_of"]


class Origin(StrEnum):
    """Where a default comes from."""

    PUBLISHED = "published"
    """The paper (arXiv 2605.06548), its released package or its blog states it."""
    OURS = "ours"
    """A choice of this project: not published, or about how this project runs."""
    TUNED = "tuned"
    """Ours, and chosen by a measurement that the docstring names."""


class Resume(Enum):
    """Whether the value may differ between a checkpoint and the run that resumes it; without a marker it may not."""

    FREE = "free"
    """It changes how a run is run, not what it computes. On a section: every key in it."""


PUBLISHED, OURS, TUNED = Origin.PUBLISHED, Origin.OURS, Origin.TUNED
FREE = Resume.FREE


def origin_of(field: FieldInfo) -> Origin | None:
    """Where the default of a field comes from; None where the field does not say."""
    return next((entry for entry in field.metadata if isinstance(entry, Origin)), None)


def is_free(field: FieldInfo) -> bool:
    """Whether the field is marked `FREE`."""
    return FREE in field.metadata
