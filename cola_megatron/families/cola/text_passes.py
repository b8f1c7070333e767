"""Passes of single networks during training, in any layout: tokens to latents, latents to velocities or to tokens.

A pass is a chain over the same parts as training in which all networks but one are idle, so pipeline, tensor
parallelism and ZeRO 3 run it as they run a measurement: every rank takes part, and all get the answer. There are no
caches, and nothing is prepared for inference (`inference/fast_forward.py`), for the weights will change: it is for few
and short texts.

Shapes: K texts, R rows of a pass, L tokens, N latents before a block, S latents of it, C channels.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from cola_megatron.families.chain_pass import ChainPass
from cola_megatron.families.cola.chain import Cola
from cola_megatron.families.cola.measured_steps import whole_logits
from cola_megatron.inference.settings import FlowSettings
from cola_megatron.inference.solvers import RULES, Evaluation, integrate, uniform_grid
from cola_megatron.layers.masks import AttentionMask, block_causal_visibility
from cola_megatron.layers.time_embedding import TimeRows
from cola_megatron.models.steps import Step
from cola_megatron.parallel.sequence_parts import whole_sequence


class TextPasses:
    """The passes of one model.

    Args:
        on_pass: called after every pass.
    """

    def __init__(self, model: Cola, on_pass: Callable[[], None] = lambda: None):
        self.model, self.on_pass = model, on_pass

    def encode(self, tokens_KL: torch.Tensor, documents_KN: torch.Tensor | None = None) -> torch.Tensor:
        """Posterior means in the prior's coordinates, (N, K, C)."""
        vae = self.model.vae
        texts, latents = len(tokens_KL), tokens_KL.shape[1] // vae.config.patch_size
        context = vae.encoder.context(latents, tokens_KL.device, documents_KN)
        run = _pass(self.model, "encoder", ("mean", "logvar"), {"tokens", "encoder_context"})
        like = torch.zeros(latents, texts, vae.config.latent_dim, device=tokens_KL.device)
        return vae.to_prior(self._answer(run, like, tokens=tokens_KL, encoder_context=context))

    def decode(self, z_NKC: torch.Tensor, documents_KN: torch.Tensor | None = None) -> torch.Tensor:
        """The most likely tokens, (K, L)."""
        vae = self.model.vae
        context = vae.decoder.context(len(z_NKC), z_NKC.device, documents_KN)
        run = _pass(self.model, "decoder", ("chosen",), {"latents", "decoder_context"})
        tokens = len(z_NKC) * vae.config.patch_size
        like = torch.zeros(tokens, z_NKC.shape[1], dtype=torch.long, device=z_NKC.device)
        return self._answer(run, like, latents=z_NKC, decoder_context=context).t()

    def draw(self, z_NKC: torch.Tensor, noise_SKC: torch.Tensor, settings: FlowSettings) -> Iterator[Evaluation]:
        """The solver's evaluations of the next block; the last one is the block itself, at t = 0."""
        dit, device = self.model.prior, z_NKC.device
        before, texts = z_NKC.shape[:2]
        times_T = uniform_grid(settings.steps, device)
        positions = torch.arange(before + len(noise_SKC), device=device)
        visible = block_causal_visibility(positions, positions, dit.config.block_size).repeat(2 * texts, 1, 1)
        visible[texts:, before:, :before] = False  # the second half of the rows: this block alone, for the guidance
        index_SR = (positions >= before).long()[:, None].expand(-1, 2 * texts)
        batch = {
            "flow_context": dit.context_at(positions, AttentionMask(visible[:, None])),
            "time_index": dit.local_index(TimeRows(index_SR)),
        }
        run = _pass(self.model, "flow", ("velocity",), {"two_copies", "distinct_times", *batch})
        like = torch.zeros(len(positions), 2 * texts, z_NKC.shape[2], device=device)

        def velocity(z_SKC: torch.Tensor, step: int) -> torch.Tensor:
            rows_SRC = torch.cat((z_NKC, z_SKC)).repeat(1, 2, 1)
            distinct = torch.stack((torch.zeros_like(times_T[step]), times_T[step]))
            v_SRC = self._answer(run, like, two_copies=rows_SRC, distinct_times=distinct, **batch)[before:]
            in_context, alone = v_SRC[:, :texts], v_SRC[:, texts:]
            return alone + settings.guidance_scale * (in_context - alone)

        end = yield from integrate(RULES[settings.solver], velocity, noise_SKC, times_T.tolist())
        yield Evaluation(settings.steps, 0.0, end, torch.zeros_like(end))

    def _answer(self, run: ChainPass, like: torch.Tensor, **batch: Any) -> torch.Tensor:
        answer = run(batch, like)
        self.on_pass()
        return answer


def _pass(model: Cola, network: str, results: tuple[str, ...], batch: set[str]) -> ChainPass:
    """One network at work, the others idle."""
    return ChainPass(model, _chain(model, network), results, batch)


def _chain(model: Cola, network: str) -> list[Step]:
    """The steps with parameters; contexts and times come with the batch, for their lengths are not training's."""
    chosen = Step(
        "hidden -> chosen", lambda hidden: whole_sequence(whole_logits(model, hidden).argmax(-1), model.groups)
    )
    networks = {
        "encoder": model.encoder_steps("tokens", gradient=False),
        "reference": model.reference_steps(train_vae=False),
        "flow": model.flow_steps() if model.dit is not None else (),
        "decoder": model.decoder_steps(chosen),
    }
    return [
        step if name == network else Step.idle(step.part, step.modules)
        for name, steps in networks.items()
        for step in steps
        if step.modules
    ]
