"""Check of the speed of generation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from cola_megatron.families.cola.chain import Cola
from cola_megatron.inference.generate import FlowGenerator
from cola_megatron.inference.graphs import record_on_cuda
from cola_megatron.inference.protocol import Request, TokenBlock
from cola_megatron.inference.settings import FlowSettings
from cola_megatron.models.dit import DiT
from cola_megatron.models.text_vae import TextVAE
from tools.gpu_setting import Record, Setting, random_model, synchronize


def check_generation(setting: Setting, batch: int) -> Iterator[Record]:
    """Speed of guided generation with random weights: 16 Euler steps a block, both passes in one batch.

    On a GPU again with the steps replayed as CUDA graphs; that must give the tokens which the same shapes give without.
    What is timed has run once before, because kernels are chosen when a width of the cache is first met; recording the
    graphs of a session is part of its time.
    """
    config = setting.config(setting.large_preset, "training.vae_update.from_scratch=true")
    model = random_model(config, setting.groups, spread=0.02).to(torch.bfloat16).eval().requires_grad_(False)
    assert isinstance(model, Cola) and model.dit is not None, "a model of stage 2"
    random = np.random.default_rng(0)
    prompts = random.integers(0, config.model.vocab_size, (batch, 64 if setting.on_gpu else 16)).tolist()
    new_tokens = (32 if setting.quick else 64) if setting.on_gpu else 16
    shape = f"prompts of {len(prompts[0])} tokens, {new_tokens} new ones, 16 steps, guidance 7"

    generator = FlowGenerator(model.vae, model.dit)
    _, first = timed_generation(setting, generator, prompts, new_tokens)
    blocks, seconds = timed_generation(setting, generator, prompts, new_tokens)
    ok = all(
        block.latents is not None and block.latents.isfinite().all() and max(block.token_ids) < config.model.vocab_size
        for block in blocks
    )
    tokens = sum(len(block.token_ids) for block in blocks)
    detail = f"{setting.large_preset}, bf16, {shape}; the first run took {first:.1f} s, this one {seconds:.2f} s"
    yield Record(f"generate.batch{batch}", bool(ok), tokens / seconds, "tokens/s", detail)
    if setting.on_gpu:
        yield with_graphs(setting, model.vae, model.dit, prompts, new_tokens)


def with_graphs(setting: Setting, vae: TextVAE, dit: DiT, prompts: list[list[int]], new_tokens: int) -> Record:
    """The same with CUDA graphs, against the same shapes without."""
    expected, _ = timed_generation(setting, FlowGenerator(vae, dit, repeat_in_python), prompts, new_tokens)
    generator = FlowGenerator(vae, dit, record_on_cuda)
    _, first = timed_generation(setting, generator, prompts, new_tokens)
    blocks, seconds = timed_generation(setting, generator, prompts, new_tokens)
    pairs = list(zip(blocks, expected, strict=True))
    ok = all(block.token_ids == other.token_ids for block, other in pairs)
    difference = max(
        (block.latents - other.latents).abs().max().item()
        for block, other in pairs
        if block.latents is not None and other.latents is not None
    )
    tokens = sum(len(block.token_ids) for block in blocks)
    detail = f"the first run took {first:.1f} s; latents differ by {difference:.1e} from those without graphs"
    return Record(f"generate.batch{len(prompts)}.graphs", ok, tokens / seconds, "tokens/s", detail)


def repeat_in_python(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
    """A recorder that records nothing: the shapes of recorded steps, launched from Python every time."""
    output = run().clone()
    return lambda: output.copy_(run()), output


def timed_generation(
    setting: Setting, generator: FlowGenerator, prompts: list[list[int]], new_tokens: int
) -> tuple[list[TokenBlock], float]:
    """The generated blocks and the seconds they took, prompts included."""
    settings = FlowSettings(steps=16, guidance_scale=7.0, max_new_tokens=new_tokens)
    synchronize(setting)
    began = time.perf_counter()
    session = generator.start([Request(prompt, index) for index, prompt in enumerate(prompts)], settings, 0)
    blocks: list[TokenBlock] = []
    while session.running:
        blocks += [block for block in session.advance() if isinstance(block, TokenBlock)]
    synchronize(setting)
    return blocks, time.perf_counter() - began
