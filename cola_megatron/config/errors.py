"""What a wrong config raises."""

from cola_megatron.errors import ExitCode, UserError


class ConfigError(UserError, ValueError):
    """A config that cannot run; the message is one line with the key, the value and what would be right."""

    exit_code = ExitCode.WRONG_USE
