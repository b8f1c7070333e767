"""Time that a checkpoint of the published model takes to write."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator

from cola_megatron.checkpoint.writer import CheckpointWriter, Saved
from cola_megatron.training.engine import Engine
from tools.gpu_setting import Record, Setting
from tools.gpu_training import fresh_engine, synthetic_batches


def check_save(setting: Setting) -> Iterator[Record]:
    """A save that training waits for, and (not in a quick look) one beside training: GB/s, and seconds of waiting."""
    forms = (False,) if setting.quick else (False, True)
    with tempfile.TemporaryDirectory() as folder:
        sizes = ("stage=2", "training.global_batch_size=1", "training.micro_batch_size=1", f"runs_folder={folder}")
        one_step = "training.compile_blocks=never"  # is not worth the compilation
        config = setting.config(setting.large_preset, *sizes, one_step)
        with fresh_engine(config, setting.groups) as engine:
            engine.step(synthetic_batches(config, 1, setting.device), 0)  # AdamW has moments only then
            for asynchronous in forms:
                yield save(setting, engine, 1, asynchronous)


def save(setting: Setting, engine: Engine, steps: int, asynchronous: bool) -> Record:
    """One save after so many steps; its folder is gone again afterwards, for a disk may not hold two."""
    saved: list[Saved] = []
    with CheckpointWriter(engine, "synthetic", setting.groups, asynchronous, saved.append) as writer:
        began = time.perf_counter()
        writer.save(steps)
        waited = time.perf_counter() - began
    took, folder = saved[0], engine.config.run_folder
    rate = took.bytes / took.seconds / 1e9
    shutil.rmtree(folder, ignore_errors=True)
    about = f"{setting.large_preset}, {took.bytes / 1e9:.2f} GB, complete after {took.seconds:.1f} s"
    if asynchronous:
        detail = f"{about}; training goes on after this, the first such save brings in its host memory"
        return Record("checkpoint.asynchronous.wait", True, waited, "s", detail)
    return Record("checkpoint.synchronous", True, rate, "GB/s", f"{about}, in {folder.parent}")
