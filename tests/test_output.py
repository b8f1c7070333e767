"""Output that nobody reads any more: it never ends a run, and ends a command that prints its answer quietly."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cola_megatron.checkpoint.find import newest_checkpoint
from cola_megatron.records.output import Output, outliving_its_readers
from cola_megatron.training.loop import train

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def unread() -> Iterator[None]:
    """Standard output and standard error lead into a pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        yield


def test_a_run_whose_output_nobody_reads_goes_on_to_its_end(tiny):
    config = tiny(1)
    with unread():
        summary = train(config, progress=True)
    assert summary.finished and newest_checkpoint(config.run_folder).name == "step_00000006"


def test_a_full_disk_under_the_log_does_not_end_a_run_either():
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115  closing it fails, too
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        with outliving_its_readers():
            print("step 1", file=sys.stderr, flush=True)
    with pytest.raises(OSError, match="No space left"):  # an answer that could not be given is no success
        print("answer", file=Output(full, ends=True), flush=True)
    with contextlib.suppress(OSError):
        full.close()


def test_a_command_whose_answer_is_not_read_to_its_end_ends_quietly():
    """`cola config paper-2b | head -1`, of which the reader is gone at once."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "launchers.cli", "config", "paper-2b"]
    ended = subprocess.run(words, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_training_in_a_thread_leaves_the_signals_of_the_process_alone(tiny):
    config, before, found = tiny(1, "training.steps=1"), signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: found.append(train(config, progress=False)))
    thread.start()
    thread.join()
    assert found[0].finished and signal.getsignal(signal.SIGTERM) == before
