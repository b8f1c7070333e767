"""What goes wrong with checkpoints."""

from cola_megatron.errors import ExitCode, UserError


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, damaged, or of another config; one line with the cure."""


class NotFinite(UserError, ArithmeticError):
    """What was to be saved holds values that are not numbers."""

    exit_code = ExitCode.DIVERGED


class DamagedCheckpoint(CheckpointError):
    """Files of a checkpoint are missing, cut short, unreadable or not what was written.

    Its only argument is the reason; the message adds the cure for those who asked for this very checkpoint.
    """

    def __str__(self) -> str:
        return f"{self.reason}; use another checkpoint of the run, or bring this one back from a copy"

    @property
    def reason(self) -> str:
        """What is wrong, without the cure."""
        return self.args[0]
