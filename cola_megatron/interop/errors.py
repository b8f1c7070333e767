"""What reading and writing foreign layouts raises."""

from cola_megatron.errors import UserError


class PublishedError(UserError, ValueError):
    """A folder that is not a complete model in the published layout, or that we cannot represent; one line."""
