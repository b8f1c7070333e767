"""Check of the speed of generation."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from cola_megatron.inference.generate import FlowGenerator
from cola_megatron.inference.graphs import Recorder, record_on_cuda
from cola_megatron.inference.protocol import Request, TokenBlock
from cola_megatron.inference.settings import FlowSettings
from cola_megatron.models.cola import Cola
from cola_megatron.parallel import initialize_parameters
from tools.gpu_setting import Record, Setting, synchronize


def check_generation(setting: Setting, batch: int) -> list[Record]:
    """Speed of guided generation with random weights: 16 Euler steps a block, both passes in one batch.

    On a GPU again with the steps replayed as CUDA graphs; that must give the tokens which the same shapes give without.
    """
    config = setting.config(setting.preset, "training.vae_update.from_scratch=true")
    model = Cola(config, setting.groups)
    initialize_parameters(model, config.seed, setting.groups)
    model = model.to(setting.device, torch.bfloat16).eval().requires_grad_(False)
    random = np.random.default_rng(0)
    prompts = random.integers(0, config.model.vocab_size, (batch, 64 if setting.on_gpu else 16)).tolist()
    new_tokens = (32 if setting.quick else 128) if setting.on_gpu else 16
    detail = f"{setting.preset}, bf16, prompts of {len(prompts[0])} tokens, {new_tokens} new ones, 16 steps, guidance 7"

    def run(recorder: Recorder | None) -> tuple[list[TokenBlock], float]:
        assert model.dit is not None, "a model of stage 2"
        generator = FlowGenerator(model.vae, model.dit, recorder)
        timed_generation(setting, generator, prompts, 1)
        blocks, seconds = timed_generation(setting, generator, prompts, new_tokens)
        return blocks, sum(len(block.token_ids) for block in blocks) / seconds

    blocks, rate = run(None)
    ok = all(
        block.latents is not None and block.latents.isfinite().all() and max(block.token_ids) < config.model.vocab_size
        for block in blocks
    )
    records = [Record(f"generate.batch{batch}", bool(ok), rate, "tokens/s", detail)]
    if setting.on_gpu:
        expected, _ = run(repeat_in_python)
        blocks, rate = run(record_on_cuda)
        ok = [block.token_ids for block in blocks] == [block.token_ids for block in expected]
        records.append(Record(f"generate.batch{batch}.graphs", ok, rate, "tokens/s", detail))
    return records


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
