"""What DeepSpeed says, away from standard output: that belongs to whoever runs a command and reads its answer."""

import contextlib
import gc
import io
import logging
from collections.abc import Iterator
from types import ModuleType

logger = logging.getLogger(__name__)


class _NoCollection:
    """Python's `gc` for where DeepSpeed states the memory in use: it collects before each of the ten statements, which
    takes a third of a second each among the objects of all imported libraries."""

    def collect(self) -> int:
        """Nothing: what an engine leaves over goes when Python sees fit."""
        return 0


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
            from deepspeed.runtime import utils

            deepspeeds = logging.getLogger("DeepSpeed")
            deepspeeds.setLevel(logging.WARNING)
            deepspeeds.handlers.clear()  # its own one writes to standard output
            deepspeeds.propagate = True
            utils.gc = _NoCollection()
            try:
                yield deepspeed
            finally:
                utils.gc = gc
    finally:
        for line in printed.getvalue().splitlines():
            logger.debug("DeepSpeed: %s", line)
