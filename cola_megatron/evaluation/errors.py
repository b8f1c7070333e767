"""What goes wrong with benchmark data and results."""

from cola_megatron.errors import UserError


class EvaluationError(UserError):
    """One line that names the file, the line or the column, and the cure."""
