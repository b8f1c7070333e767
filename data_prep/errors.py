"""The one error of data preparation that a user can cure."""

from cola_megatron.errors import UserError

__all__ = ["DataPrepError"]


class DataPrepError(UserError, ValueError):
    """The settings, a source or the output folder is at fault: one line that names the place and the cure."""
