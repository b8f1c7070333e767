"""What a run says of itself while it trains: the metrics, progress.json, and a bar, or lines where nobody watches."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from cola_megatron.config import RunConfig
from cola_megatron.errors import ExitCode, UserError
from cola_megatron.parallel import ProcessGroups
from cola_megatron.records.goodput import Accounts, Goodput, begin_attempt
from cola_megatron.records.metrics import MetricsLog
from cola_megatron.records.progress import ProgressFile
from cola_megatron.records.run_folder import record_start
from cola_megatron.records.texts import TextsLog


class RunRecorder:
    """Records one start of a run on the main process; on the others every method does nothing."""

    def __init__(self, config: RunConfig, start: int, log: MetricsLog, accounts: Accounts, show: bool):
        self._log, self._accounts, self._steps = log, accounts, config.training.steps
        self._progress = ProgressFile(config.run_folder, start, config.training.steps)
        self._texts = TextsLog(config.run_folder, start)
        watched = sys.stderr.isatty()
        self._bar = tqdm(
            total=self._steps, initial=start, disable=not (show and watched), unit="step", desc=config.name
        )
        self._lines = show and not watched

    def stepped(self, step: int, loss: float, tokens: int) -> None:
        """A step is done."""
        self._bar.update()
        self._progress.stepped(step, loss, tokens)

    def train(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        """Records a step; `seconds` is the time of the run until here."""
        self._log.write("train", step, {**metrics, **self._accounts.metrics(seconds), "seconds": seconds})
        said = f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:,.0f} tokens/s"
        self._bar.set_postfix_str(said)
        if self._lines:
            print(f"step {step:,} of {self._steps:,}: {said}", file=sys.stderr, flush=True)

    def record(self, kind: str, step: int, values: Mapping[str, object]) -> None:
        """Records anything else."""
        self._log.write(kind, step, values)

    def texts(self, kind: str, step: int, texts: Sequence[dict[str, Any]]) -> None:
        """Records what the model wrote of held-out texts."""
        self._texts.write(kind, step, texts)

    def state(self, state: str) -> None:
        """What the run does from now on, for progress.json; before a checkpoint its records go to the disk."""
        if state == "saving":
            self._log.flush()
        self._progress.write(state)

    def goodput(self, seconds: float) -> Goodput:
        """Restarts, lost steps and goodput so far."""
        return self._accounts.metrics(seconds)

    def close(self) -> None:
        """Ends the log and the bar."""
        self._bar.close()
        self._log.close()


class _NoRecorder(RunRecorder):
    """On every process but the main one."""

    def __init__(self) -> None:
        pass

    def _nothing(self, *arguments: Any, **named: Any) -> None:
        return None

    stepped = train = record = texts = state = close = _nothing

    def goodput(self, seconds: float) -> Goodput:
        return {}


@contextlib.contextmanager
def open_recorder(config: RunConfig, start: int, groups: ProcessGroups, show: bool) -> Iterator[RunRecorder]:
    """Notes this start in the run folder and opens its recorder; every rank waits until later records are gone."""
    recorder: RunRecorder = _NoRecorder()
    if groups.is_main:
        record_start(config)
        device = torch.cuda.get_device_name(groups.device) if groups.device.type == "cuda" else "cpu"
        accounts = begin_attempt(config.run_folder, start, groups.world_size, device)
        recorder = RunRecorder(config, start, MetricsLog(config, start), accounts, show)
    groups.barrier()
    with contextlib.closing(recorder):
        try:
            yield recorder
        except Exception as error:
            diverged = isinstance(error, UserError) and error.exit_code == ExitCode.DIVERGED
            with contextlib.suppress(OSError):  # what went wrong is what counts
                recorder.state("diverged" if diverged else "failed")
            raise
