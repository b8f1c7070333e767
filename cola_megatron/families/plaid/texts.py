"""Held-out texts as Plaid in training continues them, in any layout.

A pass is a chain over the steps of training, so pipeline, tensor parallelism and ZeRO 3 run it as they run a
measurement: every rank takes part, and all get the answer. Texts, prompts and noise are fixed, so that what is written
compares over steps and between runs.

Shapes: K texts, S positions, C channels of an embedding, V vocabulary on this rank.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from cola_megatron.families.plaid.categorical import embeddings_of, predict
from cola_megatron.families.plaid.chain import Plaid
from cola_megatron.families.plaid.sampler import Prompts, noise_of, sample, time_grid
from cola_megatron.families.texts import Continuation
from cola_megatron.inference.noise import generator_of
from cola_megatron.models.compiled_blocks import uncompiled
from cola_megatron.models.steps import Step, run_steps
from cola_megatron.models.transformer_steps import as_head, block_steps
from cola_megatron.parallel.pipeline import Neighbours, Tensors, forward_only

PROMPT_TOKENS, NEW_TOKENS = 48, 32
"""How much is given at most, and written."""
STEPS, SCORE_TEMPERATURE, NOISE_SEED = 64, 0.9, 66
STRIP_STEPS = (0, 16, 32, 48, STEPS)
"""Steps at which the likeliest tokens are kept: at t = 1, 0.75, 0.5, 0.25 and 0."""


def write_texts(model: Plaid, texts_KL: np.ndarray, on_pass: Callable[[], None]) -> Sequence[Continuation]:
    """How the model continues these texts; every rank calls it, and gets the same."""
    device, length = model.groups.device, texts_KL.shape[1]
    given = min(PROMPT_TOKENS, length // 2)
    tokens_KS = torch.from_numpy(texts_KL[:, : given + NEW_TOKENS]).to(device)
    texts, size = tokens_KS.shape
    known = _Known(model, on_pass)(tokens_KS)
    network, channels = _Network(model, size, on_pass), model.config.model.diffusion.embedding_dim
    generators = [generator_of(NOISE_SEED, text, 0, formula="hashed") for text in range(texts)]
    held_SB1 = (torch.arange(size, device=device)[:, None] < given).expand(size, texts)[..., None]
    found: list[list[tuple[float, list[int]]]] = [[] for _ in range(texts)]
    states = sample(
        lambda z_SKC, gamma_K, told_SKC: network(z_SKC, gamma_K, told_SKC)[0],
        Prompts(known["x"].double(), held_SB1),
        lambda: noise_of(generators, (size, channels), device),
        known["gamma"],
        SCORE_TEMPERATURE,
    )
    for state in states:
        if state.step in STRIP_STEPS:
            _, likeliest_SK = network(state.z_SBC, state.gamma_B, state.told_SBC)
            for strip, tokens in zip(found, likeliest_SK.t()[:, given:].tolist(), strict=True):
                strip.append((state.time, tokens))
    rows = zip(tokens_KS.tolist(), found, strict=True)
    return [Continuation(row[:given], strip[-1][1], row[given:], strip) for row, strip in rows]


class _Known:
    """What every rank must know before it begins: the texts' embeddings and the noise levels of the grid."""

    def __init__(self, model: Plaid, on_pass: Callable[[], None]):
        self.model, self.on_pass = model, on_pass

    def __call__(self, tokens_KS: torch.Tensor) -> Tensors:
        model, device = self.model, tokens_KS.device
        embeddings, schedule, *others = [step for step in model.noise_steps() if step.modules] + [
            Step.idle(step.part, step.modules) for step in model.network_steps() if step.modules
        ]
        chain = [
            embeddings,
            schedule,
            Step("tokens, embeddings -> x", lambda tokens, table: embeddings_of(tokens, table, model.groups)),
            *others,
        ]
        times = time_grid(STEPS, device)
        batch = {"tokens": tokens_KS, "time": times, "self_conditioned": torch.zeros_like(times, dtype=torch.bool)}
        channels = model.config.model.diffusion.embedding_dim
        like = {
            "x": torch.zeros(*tokens_KS.t().shape, channels, device=device),
            "gamma": torch.zeros_like(times),
        }
        found = _run(model, chain, batch, like)
        self.on_pass()
        return found


class _Network:
    """x_hat (float64) and the likeliest tokens at every position."""

    def __init__(self, model: Plaid, length: int, on_pass: Callable[[], None]):
        self.model, self.on_pass = model, on_pass
        self.context = model.denoiser.context(length, model.groups.device)
        denoiser = model.denoiser

        def head(
            hidden_SBH: torch.Tensor, z_SBC: torch.Tensor, gamma_B: torch.Tensor, embeddings_VC: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            logits_SBV = denoiser.logits(denoiser.to_head(hidden_SBH), z_SBC, gamma_B, embeddings_VC)
            chosen_SB = denoiser.whole(logits_SBV).argmax(-1)
            nobody_B = torch.zeros(z_SBC.shape[1], device=z_SBC.device)
            return predict(logits_SBV, embeddings_VC, chosen_SB, nobody_B, model.groups).estimate_SBC, chosen_SB

        embeddings, schedule = [step for step in model.noise_steps() if step.modules]
        plaid = model.plaid
        self.chain = [
            embeddings,
            Step.idle(schedule.part, schedule.modules),
            Step("z, gamma, told -> hidden", plaid.input, part="plaid.input", modules=[plaid.input]),
            *block_steps(model.transformer),
            as_head(model.transformer, Step("hidden, z, gamma, embeddings -> estimate, chosen", head)),
        ]

    def __call__(
        self, z_SKC: torch.Tensor, gamma_K: torch.Tensor, told_SKC: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        z_SKC = z_SKC.float()
        told_SKC = torch.zeros_like(z_SKC) if told_SKC is None else told_SKC.float()
        batch = {"z": z_SKC, "gamma": gamma_K, "told": told_SKC, "context": self.context}
        like = {"estimate": torch.zeros_like(z_SKC), "chosen": torch.zeros(z_SKC.shape[:2], dtype=torch.long)}
        found = _run(self.model, self.chain, batch, {name: tensor.to(z_SKC.device) for name, tensor in like.items()})
        self.on_pass()
        return found["estimate"].double(), found["chosen"]


@torch.no_grad()
def _run(model: Plaid, chain: list[Step], batch: dict[str, object], like: Tensors) -> Tensors:
    """One pass; its results, which have the shapes and types of `like`, go to every stage of a pipeline."""
    stage, found = model.own_stage_of(chain, set(batch), list(like)), dict(like)

    def forward(taken: Tensors) -> Tensors:
        state = run_steps(stage.steps, {**batch, **taken}, keep=[*stage.hands_on, *like])
        found.update({name: state[name] for name in like if name in state and name not in taken})
        return {name: state[name] for name in stage.hands_on}

    with uncompiled():
        forward_only(Neighbours(model.groups, stage.takes, stage.hands_on), 1, forward)
    if model.groups.pipeline_parallel_size > 1:
        for tensor in found.values():
            dist.all_reduce(tensor, group=model.groups.pipeline_group)  # each is made in one stage
    return found
