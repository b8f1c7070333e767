"""Held-out texts as Plaid in training continues them, in any layout, each text for one document.

A pass is a chain over the steps of training, in which every rank takes part and of which all get the answer. Texts,
prompts and noise are fixed, so that what is written compares over steps and between runs. Passes have no gradients, so
prompts are held by replacement alone (`sampler.py`); generation from a checkpoint also guides by them.

Shapes: K texts, S positions, C channels of an embedding, V vocabulary on this rank.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from cola_megatron.families.chain_pass import ChainPass
from cola_megatron.families.plaid.categorical import embeddings_of, predict
from cola_megatron.families.plaid.chain import Plaid
from cola_megatron.families.plaid.sampler import Estimate, Prompts, State, noise_of, sample, time_grid
from cola_megatron.families.texts import Continuation, given_and_end
from cola_megatron.inference.noise import generator_of
from cola_megatron.models.steps import Step
from cola_megatron.models.transformer_steps import as_head, block_steps
from cola_megatron.parallel.sequence_parts import whole_sequence

STEPS, SCORE_TEMPERATURE, NOISE_SEED = 64, 0.9, 66
STRIP_STEPS = (0, 16, 32, 48, STEPS)
"""Steps at which the likeliest tokens are kept: at t = 1, 0.75, 0.5, 0.25 and 0."""


def write_texts(model: Plaid, texts_KL: np.ndarray, on_pass: Callable[[], None]) -> Sequence[Continuation]:
    """How the model continues these texts; every rank calls it, and gets the same."""
    groups, channels = model.groups, model.config.model.diffusion.embedding_dim
    texts, length = texts_KL.shape
    given, size = given_and_end(length)
    size -= size % groups.sequence_parts  # ranks cut what they divide; all see each other, so none is a filler
    tokens_KS = torch.from_numpy(texts_KL[:, :size].astype(np.int64)).to(groups.device)
    network = _Network(model, size, on_pass)
    generators = [generator_of(NOISE_SEED, text, 0, formula="hashed") for text in range(texts)]
    held_SB1 = (torch.arange(size, device=groups.device)[:, None] < given).expand(size, texts)[..., None]
    strips: list[list[tuple[float, list[int]]]] = [[] for _ in range(texts)]
    states = sample(
        lambda z_SKC, gamma_K, told_SKC: Estimate(network(z_SKC, gamma_K, told_SKC)[0]),
        Prompts(network.embeddings_of(tokens_KS), held_SB1),
        lambda: noise_of(generators, (size, channels), groups.device),
        network.levels(time_grid(STEPS, groups.device)),
        SCORE_TEMPERATURE,
    )
    for state in states:
        if state.step in STRIP_STEPS:
            for strip, tokens in zip(strips, network.likeliest(state)[:, given:].tolist(), strict=True):
                strip.append((state.time, tokens))
    rows = zip(tokens_KS.tolist(), strips, strict=True)
    return [Continuation(row[:given], strip[-1][1], row[given:], strip) for row, strip in rows]


class _Network:
    """The model's networks, each as a pass of the whole chain.

    Args:
        length: positions of a text.
    """

    def __init__(self, model: Plaid, length: int, on_pass: Callable[[], None]):
        self.model, self.on_pass, denoiser, plaid = model, on_pass, model.denoiser, model.plaid
        self.context = denoiser.context(length, model.groups.device)

        def head(
            hidden_SBH: torch.Tensor, z_SBC: torch.Tensor, gamma_B: torch.Tensor, embeddings_VC: torch.Tensor
        ) -> torch.Tensor:
            """x_hat and, behind its channels, the likeliest token (which float32 holds exactly)."""
            logits_SBV = denoiser.logits(denoiser.to_head(hidden_SBH), z_SBC, gamma_B, embeddings_VC)
            chosen_SB = denoiser.whole(logits_SBV).argmax(-1)
            nobody_B = torch.zeros(z_SBC.shape[1], device=z_SBC.device)
            found = predict(logits_SBV, embeddings_VC, chosen_SB, nobody_B, model.groups)
            return whole_sequence(torch.cat((found.estimate_SBC, chosen_SB[..., None].float()), dim=-1), model.groups)

        embeddings, schedule = (step for step in model.noise_steps() if step.modules)
        network = [
            Step("z, gamma, told -> hidden", plaid.input, part="plaid.input", modules=[plaid.input]),
            *block_steps(model.transformer),
            as_head(model.transformer, Step("hidden, z, gamma, embeddings -> answer", head)),
        ]
        lookup = Step("tokens, embeddings -> x", lambda tokens, table: embeddings_of(tokens, table, model.groups))
        self._lookup = ChainPass(model, [embeddings, lookup, *_idle([schedule, *network])], ["x"], ["tokens"])
        names = ["time", "self_conditioned"]
        self._levels = ChainPass(model, [*_idle([embeddings]), schedule, *_idle(network)], ["gamma"], names)
        names = ["z", "gamma", "told", "context"]
        self._network = ChainPass(model, [embeddings, *_idle([schedule]), *network], ["answer"], names)

    def embeddings_of(self, tokens_KS: torch.Tensor) -> torch.Tensor:
        """(S, K, C), float64."""
        channels = self.model.config.model.diffusion.embedding_dim
        return self._run(
            self._lookup, torch.zeros(*tokens_KS.t().shape, channels, device=tokens_KS.device), tokens=tokens_KS
        ).double()

    def levels(self, times: torch.Tensor) -> torch.Tensor:
        """gamma at these times."""
        told = torch.zeros_like(times, dtype=torch.bool)
        return self._run(self._levels, times, time=times, self_conditioned=told)

    def likeliest(self, state: State) -> torch.Tensor:
        """Tokens (K, S)."""
        return self(state.z_SBC, state.gamma_B, state.told_SBC)[1].t()

    def __call__(
        self, z_SKC: torch.Tensor, gamma_K: torch.Tensor, told_SKC: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x_hat (S, K, C), float64, and the likeliest tokens (S, K)."""
        z_SKC = z_SKC.float()
        told_SKC = torch.zeros_like(z_SKC) if told_SKC is None else told_SKC.float()
        like = z_SKC.new_zeros(*z_SKC.shape[:2], z_SKC.shape[2] + 1)
        answer = self._run(self._network, like, z=z_SKC, gamma=gamma_K, told=told_SKC, context=self.context)
        return answer[..., :-1].double(), answer[..., -1].long()

    def _run(self, run: ChainPass, like: torch.Tensor, **batch: object) -> torch.Tensor:
        found = run(batch, like)
        self.on_pass()
        return found


def _idle(steps: Sequence[Step]) -> list[Step]:
    return [Step.idle(step.part, step.modules) for step in steps]
