"""What DeepSpeed says, away from standard output: that belongs to whoever runs a command and reads its answer."""

import contextlib
import io
import logging
from collections.abc import Iterator
from types import ModuleType

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet_deepspeed() -> Iterator[ModuleType]:
    """DeepSpeed, to build an engine with; what it prints meanwhile goes to our log at the level of debugging.

    ZeRO 1 in bfloat16 prints the memory in use ten times, whatever its config says (and starts torch's count of the
    peak anew each time). DeepSpeed's warnings, then and later, go where those of every other library go: to standard
    error, unless somebody has set up logging.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            import deepspeed  # slow, and only training needs it

            deepspeeds = logging.getLogger("DeepSpeed")
            deepspeeds.setLevel(logging.WARNING)
            deepspeeds.handlers.clear()  # its own one writes to standard output
            deepspeeds.propagate = True
            yield deepspeed
    finally:
        for line in printed.getvalue().splitlines():
            logger.debug("DeepSpeed: %s", line)
