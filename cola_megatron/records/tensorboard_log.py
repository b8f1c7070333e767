"""The records of metrics.jsonl as scalars in event files, where `training.log.tensorboard` asks for them."""

from collections.abc import Mapping
from importlib.util import find_spec

from cola_megatron.config import ConfigError, RunConfig

FOLDER = "tensorboard"
"""In the run folder; `tensorboard --logdir RUNS_FOLDER` shows all runs below it."""


def require_tensorboard(config: RunConfig) -> None:
    """Every process calls it before anything long or written; raises ConfigError where the package is missing."""
    if config.training.log.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError(
            "training.log.tensorboard=true needs the package tensorboard: make setup EXTRAS=report, or leave it out"
        )


class TensorBoardLog:
    """Writes below RUN_FOLDER/tensorboard, one event file for each start of the run.

    A start says from which step on earlier files no longer count (`purge_step`), so that every step is shown once.

    Args:
        resumed_at: the step of the checkpoint that the run goes on from; 0: none.
    """

    def __init__(self, config: RunConfig, resumed_at: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(config.run_folder / FOLDER), purge_step=resumed_at + 1)

    def write(self, kind: str, step: int, values: Mapping[str, object]) -> None:
        """The numbers among the values, as KIND/NAME at the step (counted from 1)."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Writes what is still in memory."""
        self._writer.close()
