"""Generation by Plaid: a whole continuation at once (`sampler.py`).

Samples of one length, prompt and continuation together, share their passes: no padding is seen by anyone. Head and
choice are computed sample by sample.

Shapes: S positions, B samples of one length, C channels of an embedding, N new tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cola_megatron.families.plaid.categorical import embeddings_of, predict
from cola_megatron.families.plaid.denoiser import Denoiser
from cola_megatron.families.plaid.network import PlaidParts
from cola_megatron.families.plaid.sampler import Estimate, Prompts, State, noise_of, sample, time_grid
from cola_megatron.families.plaid.settings import PlaidSettings
from cola_megatron.inference.noise import TOKEN_DRAWS, generator_of
from cola_megatron.inference.protocol import Request, TokenBlock, TokenPreview
from cola_megatron.inference.sampling import choose_tokens
from cola_megatron.models.transformer import Transformer

NOISE = "hashed"
"""The formula of a sample's draws (`inference.noise`): no two samples share any."""


class PlaidGenerator:
    """Plaid as a family: begins sessions. The networks must be in evaluation mode."""

    def __init__(self, transformer: Transformer, plaid: PlaidParts):
        self.denoiser = Denoiser(transformer, plaid)

    def start(self, requests: Sequence[Request], settings: PlaidSettings, padding_id: int = -1) -> "PlaidSession":
        """A batch under way.

        Args:
            padding_id: not asked; nothing is padded.
        """
        return PlaidSession(self.denoiser, requests, settings)


@dataclass(frozen=True)
class _Sample:
    index: int
    """Of its request."""
    sample_id: int
    prompt: tuple[int, ...]
    length: int
    """Of prompt and continuation."""


class PlaidSession:
    """A batch under way (`inference.protocol.Session`): one block for each sample, its whole continuation."""

    def __init__(self, denoiser: Denoiser, requests: Sequence[Request], settings: PlaidSettings):
        self.denoiser, self.settings = denoiser, settings
        self._requests = 0
        self._samples: list[_Sample] = []
        self.admit(requests)

    @property
    def running(self) -> list[int]:
        """Indices of the requests that are not finished."""
        return [each.index for each in self._samples]

    def drop(self, samples: Sequence[int]) -> None:
        """Ends these samples."""
        self._samples = [each for each in self._samples if each.index not in samples]

    def admit(self, requests: Sequence[Request]) -> None:
        """Further samples."""
        for request in requests:
            new = self.settings.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
            prompt = tuple(request.token_ids)
            self._samples.append(_Sample(self._requests, request.sample_id, prompt, len(prompt) + new))
            self._requests += 1

    def advance(self, preview_steps: Sequence[int] = ()) -> Iterator[TokenPreview | TokenBlock]:
        """The continuation of every running sample; before it its likeliest tokens at some of the steps."""
        samples, self._samples = self._samples, []
        for length in sorted({each.length for each in samples}):
            group = _Group(self.denoiser, [each for each in samples if each.length == length], self.settings)
            yield from group.run(preview_steps)


class _Group:
    """Samples of one length."""

    @torch.no_grad()
    def __init__(self, denoiser: Denoiser, samples: Sequence[_Sample], settings: PlaidSettings):
        self.denoiser, self.samples, self.settings = denoiser, samples, settings
        self.device = next(denoiser.plaid.parameters()).device
        length, groups = samples[0].length, denoiser.groups
        self.embeddings_VC = denoiser.plaid.embeddings()
        self.context = denoiser.context(length, self.device)
        rows = [[*each.prompt, *[0] * (length - len(each.prompt))] for each in samples]
        known_SBC = embeddings_of(torch.tensor(rows, device=self.device), self.embeddings_VC, groups).double()
        starts_B = torch.tensor([len(each.prompt) for each in samples], device=self.device)
        self.prompts = Prompts(known_SBC, (torch.arange(length, device=self.device)[:, None] < starts_B)[..., None])

    @torch.no_grad()
    def run(self, preview_steps: Sequence[int]) -> Iterator[TokenPreview | TokenBlock]:
        """Previews, then one block for each sample."""
        settings = self.settings
        generators = [generator_of(settings.noise_seed, each.sample_id, 0, formula=NOISE) for each in self.samples]
        shape = (self.samples[0].length, self.embeddings_VC.shape[1])
        gammas = self.denoiser.plaid.schedule(time_grid(settings.steps, self.device)).gamma_B
        states = sample(
            self._estimate,
            self.prompts,
            lambda: noise_of(generators, shape, self.device),
            gammas,
            settings.score_temperature,
        )
        for state in states:
            if state.step < settings.steps and state.step in preview_steps:
                for each, ids in zip(self.samples, self._tokens(state, temperature=0.0), strict=True):
                    yield TokenPreview(each.index, state.step, state.time, ids, 0)
        for each, ids in zip(self.samples, self._tokens(state, settings.temperature), strict=True):
            yield TokenBlock(each.index, ids, 0, last=True)

    def _estimate(self, z_SBC: torch.Tensor, gamma_B: torch.Tensor, told_SBC: torch.Tensor | None) -> Estimate:
        """x_hat of the continuations (that of a prompt is asked of nobody), and the pull of the prompts."""
        weight, nobody = self.settings.prompt_guidance, torch.zeros(1, device=self.device)
        estimate_SBC = self.prompts.embeddings_SBC.clone()
        with torch.set_grad_enabled(weight > 0):
            z_SBC = z_SBC.float().detach().requires_grad_(weight > 0)
            hidden_SBH, log_p = self._hidden(z_SBC, gamma_B, told_SBC), torch.zeros((), device=self.device)
            for row, each in enumerate(self.samples):
                given, new = slice(len(each.prompt)), slice(len(each.prompt), None)
                with torch.no_grad():
                    logits_N1V = self._logits(hidden_SBH, z_SBC, gamma_B, row, new)
                    no_tokens_N1 = torch.zeros(logits_N1V.shape[:2], dtype=torch.long, device=self.device)
                    found = predict(logits_N1V, self.embeddings_VC, no_tokens_N1, nobody, self.denoiser.groups)
                    estimate_SBC[new, row] = found.estimate_SBC[:, 0].double()
                if weight > 0 and each.prompt:
                    tokens_N1 = torch.tensor(each.prompt, device=self.device)[:, None]
                    logits_N1V = self._logits(hidden_SBH, z_SBC, gamma_B, row, given)
                    found = predict(logits_N1V, self.embeddings_VC, tokens_N1, nobody, self.denoiser.groups)
                    log_p = log_p - found.nll_SB.sum()
        if not log_p.requires_grad:
            return Estimate(estimate_SBC)
        return Estimate(estimate_SBC, weight * torch.autograd.grad(log_p, z_SBC)[0].double())

    def _tokens(self, state: State, temperature: float) -> Iterator[list[int]]:
        settings, z_SBC = self.settings, state.z_SBC.float()
        hidden_SBH = self._hidden(z_SBC, state.gamma_B, state.told_SBC)
        for row, each in enumerate(self.samples):
            logits_N1V = self._logits(hidden_SBH, z_SBC, state.gamma_B, row, slice(len(each.prompt), None))
            logits_1NV = self.denoiser.whole(logits_N1V).transpose(0, 1)
            generators = [generator_of(settings.noise_seed, each.sample_id, 0, TOKEN_DRAWS, NOISE)]
            ids_1N = choose_tokens(logits_1NV, temperature, generators, settings.top_k, settings.top_p)
            yield ids_1N[0].tolist()

    def _hidden(self, z_SBC: torch.Tensor, gamma_B: torch.Tensor, told_SBC: torch.Tensor | None) -> torch.Tensor:
        """What the head reads, (S, B, H)."""
        told_SBC = torch.zeros_like(z_SBC) if told_SBC is None else told_SBC.float()
        return self.denoiser.to_head(self.denoiser.hidden(z_SBC, gamma_B, told_SBC, self.context))

    def _logits(
        self, hidden_SBH: torch.Tensor, z_SBC: torch.Tensor, gamma_B: torch.Tensor, row: int, positions: slice
    ) -> torch.Tensor:
        """Of some positions of one sample, (N, 1, V on this rank): those of a batch would take much memory."""
        one = slice(row, row + 1)
        return self.denoiser.logits(hidden_SBH[positions, one], z_SBC[positions, one], gamma_B[one], self.embeddings_VC)
