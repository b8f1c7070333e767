"""Speed of generation: the engine against a plain loop, and its latency against batch, steps and length.

    python -m tools.bench_inference                       all tables; minutes on two cores
    python -m tools.bench_inference --only ratio --json   the comparison alone, for scripts
    python -m tools.bench_inference --only slots          mixed lengths: places given on, against fixed batches
    python -m tools.bench_inference --threads 1 --cpu-time     where others compute on the same machine

Weights are random: speed does not depend on them. Before anything is timed both forms must give the same tokens.

Counted per latent and layer of width w, an evaluation of the velocity takes 12 w^2 multiply-adds in the matrices, and
6 w^2 more where AdaLN is evaluated for every latent. So the plain loop's two passes compute 1.5 times what the
engine's do. The rest of the ratio is what a product with 16 rows costs more, per row, than one with 32, and what the
small operations cost.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from cola_megatron.families.autoregressive.session import AutoregressiveGenerator
from cola_megatron.families.autoregressive.settings import AutoregressiveSettings
from cola_megatron.inference.generate import FlowGenerator, FlowSession
from cola_megatron.inference.protocol import Request, TokenBlock
from cola_megatron.inference.settings import FlowSettings
from cola_megatron.parallel import ProcessGroups, initialize_parallel
from tools.bench_networks import networks, transformer
from tools.bench_slots import COLUMNS, Slots, Work, as_row, compare
from tools.plain_generation import generate_plainly


@dataclass(frozen=True)
class Case:
    """What is generated."""

    batch: int
    steps: int
    prompt_tokens: int
    new_tokens: int

    @property
    def settings(self) -> FlowSettings:
        """Guidance 7 and the repetition penalty of the published package."""
        return FlowSettings(max_new_tokens=self.new_tokens, steps=self.steps, guidance_scale=7.0)

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random token ids, alike in every run."""
        generator = torch.Generator().manual_seed(66)
        return torch.randint(0, vocab_size, (self.batch, self.prompt_tokens), generator=generator).tolist()


@dataclass(frozen=True)
class Ratio:
    """The engine against the plain loop; prompts are part of the time."""

    case: Case
    engine: float
    """Tokens per second, median of the repeats."""
    plain: float
    ratio: float
    same_tokens: bool
    largest_difference: float
    """Of a latent, between the two."""
    engine_seconds: list[float]
    """One per repeat; the two forms alternate."""
    plain_seconds: list[float]


@dataclass(frozen=True)
class Latency:
    """Milliseconds per block of the whole batch, and where they go; medians of the repeats."""

    case: Case
    tokens_per_second: float
    block: float
    prior: float
    """Drawing the block from the prior, and committing it."""
    decoder: float
    prompts: float
    """Encoding all prompts and filling the caches, once."""


class Bench:
    """The networks in both forms, with the same weights."""

    def __init__(self, options: argparse.Namespace, groups: ProcessGroups):
        self.options, self.groups = options, groups
        self.device, self.vocab_size = groups.device, options.vocab_size
        self.clock = time.process_time if options.cpu_time else time.perf_counter
        dtype = getattr(torch, options.dtype)
        self.plain_vae, self.plain_dit = networks(options, groups, dtype)
        self.vae, dit = networks(options, groups, dtype)
        self.generator = FlowGenerator(self.vae, dit)
        if options.prepare_plain:
            FlowGenerator(self.plain_vae, self.plain_dit)  # prepares them

    def start(self, case: Case) -> FlowSession:
        """A session of the engine."""
        requests = [Request(prompt, index) for index, prompt in enumerate(case.prompts(self.vocab_size))]
        return self.generator.start(requests, case.settings, padding_id=0)

    def engine(self, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (B, tokens) and latents (blocks, S, B, C)."""
        session = self.start(case)
        ids: list[list[int]] = [[] for _ in range(case.batch)]
        latents: list[list[torch.Tensor]] = [[] for _ in range(case.batch)]
        while session.running:
            for block in session.advance():
                assert isinstance(block, TokenBlock) and block.latents is not None, "without previews, with a flow"
                ids[block.sample] += block.token_ids
                latents[block.sample].append(block.latents)
        return torch.tensor(ids), torch.stack([torch.stack(blocks) for blocks in latents], dim=2)

    def plain(self, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        """The same from the plain loop."""
        return generate_plainly(self.plain_vae, self.plain_dit, case.prompts(self.vocab_size), case.settings)

    def compare(self, case: Case, repeats: int) -> Ratio:
        """Both forms, alternating."""
        (ids, latents), (plain_ids, plain_latents) = self.engine(case), self.plain(case)
        seconds: dict[Callable[[Case], object], list[float]] = {self.engine: [], self.plain: []}
        for _ in range(repeats):
            for form, taken in seconds.items():
                taken.append(self.timed(functools.partial(form, case)))
        tokens = case.batch * case.new_tokens
        engine, plain = (tokens / statistics.median(taken) for taken in seconds.values())
        return Ratio(
            case,
            engine,
            plain,
            engine / plain,
            torch.equal(ids, plain_ids.cpu()),
            (latents - plain_latents.cpu()).abs().max().item(),
            *seconds.values(),
        )

    def latency(self, case: Case, repeats: int) -> Latency:
        """The engine alone, its parts timed apart."""
        blocks = case.new_tokens // self.generator.dit.config.block_size
        runs = [self._parts(case) for _ in range(repeats + 1)][1:]  # the first one warms up
        parts = {name: statistics.median(run[name] for run in runs) * 1e3 for name in runs[0]}
        return Latency(
            case,
            case.batch * case.new_tokens / (parts["prompts"] + parts["blocks"]) * 1e3,
            parts["blocks"] / blocks,
            (parts["draw"] + parts["remember"]) / blocks,
            parts["decode"] / blocks,
            parts["prompts"],
        )

    def _parts(self, case: Case) -> dict[str, float]:
        began = self.now()
        session = self.start(case)
        seconds = {"prompts": self.now() - began, "draw": 0.0, "remember": 0.0, "decode": 0.0}

        def measured(name: str, method: Callable) -> Callable:
            def run(*arguments: Any) -> Any:
                started = self.now()
                value = method(*arguments)
                seconds[name] += self.now() - started
                return value

            return run

        prior: Any = session.prior
        decoder: Any = session.decoder
        prior.remember = measured("remember", prior.remember)
        decoder.decode = measured("decode", decoder.decode)
        draw = prior.draw

        def drawn(*arguments: Any) -> Generator[Any, None, torch.Tensor]:
            started = self.now()
            block = yield from draw(*arguments)
            seconds["draw"] += self.now() - started
            return block

        prior.draw = drawn
        began = self.now()
        while session.running:
            for _ in session.advance():
                pass
        return seconds | {"blocks": self.now() - began}

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds."""
        began = self.now()
        work()
        return self.now() - began

    def now(self) -> float:
        """Seconds on a clock, when the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock()

    def slots(self) -> Iterator[Slots]:
        """Requests of mixed lengths, by flow and by tokens."""
        options, places = self.options, max(self.options.batch)
        work = Work(places, 4 * places, 2 * options.prompt_tokens, 4 * options.new_tokens, self.vocab_size)
        flow = FlowSettings(steps=options.steps, guidance_scale=7.0)
        by_token = AutoregressiveGenerator(transformer(options, self.groups))
        arguments = (work, options.repeats, self.now)
        yield compare("cola", lambda batch: self.generator.start(batch, flow, 0), flow, *arguments)
        one = AutoregressiveSettings()
        yield compare("autoregressive", lambda batch: by_token.start(batch, one, 0), one, *arguments)


def sweep(options: argparse.Namespace) -> Iterator[Case]:
    """One thing varied at a time."""
    middle = Case(options.batch[0], options.steps, options.prompt_tokens, options.new_tokens)
    yield from (replace(middle, batch=batch) for batch in dict.fromkeys([*options.batch, 32]))
    yield from (replace(middle, steps=steps) for steps in (4, 8, 32))
    yield from (replace(middle, prompt_tokens=tokens) for tokens in (256, 1024))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; exits with 2 for a wrong use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 6, "width": 512, "block-size": 16, "steps": 16, "prompt-tokens": 64, "new-tokens": 64}
    for name, default in (sizes | {"vocab-size": 16384, "repeats": 5}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: torch's own choice")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prepare-plain", action="store_true", help="give the plain loop the engine's products too")
    parser.add_argument("--only", choices=("ratio", "latency", "slots"))
    parser.add_argument("--cpu-time", action="store_true", help="time of this process's cores, not of the clock")
    parser.add_argument("--json", action="store_true", help="a JSON document on stdout; the tables go to stderr")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command: 0, or 1 where the two forms disagree."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = Bench(options, initialize_parallel())
    file = sys.stderr if options.json else sys.stdout
    ratios, latencies, slots = [], [], []
    if options.only in (None, "ratio"):
        print(f"{'batch':>6}{'engine tokens/s':>17}{'plain tokens/s':>16}{'ratio':>7}  same tokens", file=file)
        for batch in options.batch:
            case = Case(batch, options.steps, options.prompt_tokens, options.new_tokens)
            ratios.append(found := bench.compare(case, options.repeats))
            figures = f"{batch:>6}{found.engine:>17.1f}{found.plain:>16.1f}{found.ratio:>7.2f}"
            print(f"{figures}  {found.same_tokens}", file=file, flush=True)
    if options.only in (None, "latency"):
        columns = ("batch", "steps", "prompt", "tokens/s", "ms/block", "prior", "decoder", "prompts")
        print("".join(f"{name:>10}" for name in columns), file=file)
        for case in sweep(options):
            latencies.append(took := bench.latency(case, options.repeats))
            times = (took.tokens_per_second, took.block, took.prior, took.decoder, took.prompts)
            cells = f"{case.batch:>10}{case.steps:>10}{case.prompt_tokens:>10}"
            print(cells + "".join(f"{figure:>10.1f}" for figure in times), file=file, flush=True)
    if options.only in (None, "slots"):
        print(COLUMNS, file=file)
        for given_on in bench.slots():
            slots.append(given_on)
            print(as_row(given_on), file=file, flush=True)
    if options.json:
        about = {"options": vars(options), "torch": torch.__version__, "threads": torch.get_num_threads()}
        records = {
            "ratios": [asdict(found) for found in ratios],
            "latencies": [asdict(found) for found in latencies],
            "slots": [asdict(found) for found in slots],
        }
        print(json.dumps(about | records, indent=1))
    agree = [found.same_tokens for found in ratios] + [found.same_tokens for found in slots]
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main())
