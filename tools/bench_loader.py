"""What one loader process needs for a micro-batch: its tokens and all random draws of the step.

    python -m tools.bench_loader base paper-2b base-plaid

A step waits for data where the loader's processes together need longer for a micro-batch than the device does. Time is
of the processor; samples are random tokens in the place of those of shards, which are read at tens of thousands of
sequences a second (docs/data.md).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from cola_megatron.config import load_config
from cola_megatron.config.load import preset_names
from cola_megatron.training.batches import MicroBatches
from tools.bench_ranks import RandomSamples


def main(arguments: list[str] | None = None) -> None:
    """Prints a row for each preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="+", choices=preset_names(), metavar="PRESET")
    parser.add_argument("--repeats", type=int, default=21, help="of which the median is printed (default 21)")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{'preset':<28}{'sequences':>10}{'ms':>8}{'sequences/s':>13}")
    for preset in chosen.presets:
        size, seconds = measure(preset, chosen.repeats)
        print(f"{preset:<28}{size:>10}{seconds * 1e3:>8.2f}{size / seconds:>13,.0f}")


def measure(preset: str, repeats: int) -> tuple[int, float]:
    """Sequences of a micro-batch, and the processor's seconds for one."""
    config = load_config(preset)
    batches = MicroBatches(config, RandomSamples(config), replica=0, replicas=1)
    seconds = []
    for index in range(2 + repeats):
        began = time.process_time()
        batches[index]
        seconds.append(time.process_time() - began)
    return config.training.micro_batch_size, statistics.median(seconds[2:])


if __name__ == "__main__":
    main()
