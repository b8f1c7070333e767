"""How a command ends when it fails: the base of every error for the person at the command line, and the exit codes."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the `cola` command, besides 128 + N where signal N ended the process.

    They tell whoever started it, such as a batch script, what is worth another try; docs/slurm.md has the table.
    """

    DONE = 0
    FAILED = 1
    """One line says why; the same again would fail again."""
    WRONG_USE = 2
    """A bad option or config."""
    CRASHED = 70
    """An exception that nobody foresaw, with its traceback; another try may go well."""
    RANK_LOST = 71
    """Another rank of the job died, failed or fell silent."""
    HUNG = 72
    """No progress for the configured time; stacks were written."""
    BAD_NODE = 73
    """The preflight named nodes that should not be used."""
    DIVERGED = 74
    """The loss or the gradient was not a number, or rose beyond the limits of the policy."""
    STOPPED = 75
    """A signal asked for the end: the state is saved, and the run is to be continued."""

    @property
    def is_worth_another_try(self) -> bool:
        """Whether the same command may go well when it is started again."""
        return self in RETRIED


RETRIED = frozenset({ExitCode.CRASHED, ExitCode.RANK_LOST, ExitCode.HUNG, ExitCode.BAD_NODE, ExitCode.STOPPED})


class UserError(Exception):
    """One line that names the thing and the cure; the command line prints it without a traceback."""

    exit_code = ExitCode.FAILED
    """What the process ends with."""


class RendezvousFailed(UserError):
    """The processes of a job did not find each other; one line with the address.

    It is here so that `cola launch` need not load all of megatron-core for it, on every node.
    """

    exit_code = ExitCode.CRASHED  # another try uses another port, and other nodes perhaps
