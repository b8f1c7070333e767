"""Generation by Plaid: ancestral sampling from t = 1 to 0, a whole continuation at once.

As published: the sampler of a variational diffusion model in float64, x_hat of the step before as the estimate that
the network is told, the predicted noise over `score_temperature`, and at t = 0 the likeliest token. A prompt is held by
replacement (ours; the published code steers by gradients of log p(token | z_t) instead): it begins as
q(z_1 | prompt), and wherever x_hat is used the prompt's positions have their true embeddings. By `ancestral_step` its
state is then a draw of q(z_t | prompt) at every t.

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
from cola_megatron.families.plaid.settings import PlaidSettings
from cola_megatron.inference.noise import TOKEN_DRAWS, generator_of
from cola_megatron.inference.protocol import Request, TokenBlock, TokenPreview
from cola_megatron.inference.sampling import choose_tokens
from cola_megatron.models.transformer import Transformer
from cola_megatron.objectives.plaid import ancestral_step, noisy_embeddings, tempered_estimate
from cola_megatron.parallel.megatron import gather_from_tensor_model_parallel_region

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
        self._samples = []
        for index, request in enumerate(requests):
            new = settings.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
            prompt = tuple(request.token_ids)
            self._samples.append(_Sample(index, request.sample_id, prompt, len(prompt) + new))

    @property
    def running(self) -> list[int]:
        """Indices of the requests that are not finished."""
        return [sample.index for sample in self._samples]

    def drop(self, samples: Sequence[int]) -> None:
        """Ends these samples."""
        self._samples = [sample for sample in self._samples if sample.index not in samples]

    def advance(self, preview_steps: Sequence[int] = ()) -> Iterator[TokenPreview | TokenBlock]:
        """The continuation of every running sample; before it its likeliest tokens at some of the steps."""
        samples, self._samples = self._samples, []
        for length in sorted({sample.length for sample in samples}):
            yield from _Group(self.denoiser, [each for each in samples if each.length == length], self.settings).run(
                preview_steps
            )


class _Group:
    """Samples of one length."""

    @torch.no_grad()
    def __init__(self, denoiser: Denoiser, samples: Sequence[_Sample], settings: PlaidSettings):
        self.denoiser, self.samples, self.settings = denoiser, samples, settings
        self.device = next(denoiser.plaid.parameters()).device
        length, groups = samples[0].length, denoiser.groups
        self.embeddings_VC = denoiser.plaid.embeddings()
        self.context = denoiser.context(length, self.device)
        fill = [[*each.prompt, *[0] * (length - len(each.prompt))] for each in samples]
        self.held_SBC = embeddings_of(torch.tensor(fill, device=self.device), self.embeddings_VC, groups).double()
        starts_B = torch.tensor([len(each.prompt) for each in samples], device=self.device)
        self.is_held_SB1 = (torch.arange(length, device=self.device)[:, None] < starts_B)[..., None]
        self._generators = [generator_of(settings.noise_seed, each.sample_id, 0, formula=NOISE) for each in samples]

    @torch.no_grad()
    def run(self, preview_steps: Sequence[int]) -> Iterator[TokenPreview | TokenBlock]:
        """Previews, then one block for each sample."""
        settings, schedule = self.settings, self.denoiser.plaid.schedule
        times = torch.linspace(1.0, 0.0, settings.steps + 1, dtype=torch.float64, device=self.device)
        gammas = schedule(times).gamma_B.detach()
        noise_SBC = self._noise()
        begin_B = gammas[:1].expand(len(self.samples))
        z_SBC = torch.where(self.is_held_SB1, noisy_embeddings(self.held_SBC, noise_SBC, begin_B), noise_SBC)
        estimate_SBC: torch.Tensor | None = None
        for step in range(settings.steps):
            from_B, to_B = (gammas[place].expand(len(self.samples)) for place in (step, step + 1))
            likeliest: list[list[int]] = []
            estimate_SBC = self._estimate(z_SBC, from_B, estimate_SBC, likeliest if step in preview_steps else None)
            for sample, ids in zip(self.samples, likeliest, strict=False):
                yield TokenPreview(sample.index, step, times[step].item(), ids, 0)
            used_SBC = tempered_estimate(z_SBC, estimate_SBC, from_B, settings.score_temperature)
            used_SBC = torch.where(self.is_held_SB1, self.held_SBC, used_SBC)
            z_SBC = ancestral_step(z_SBC, used_SBC, self._noise(), from_B, to_B)
        for sample, ids in zip(self.samples, self._tokens(z_SBC, gammas[-1], estimate_SBC), strict=True):
            yield TokenBlock(sample.index, ids, 0, last=True)

    def _noise(self) -> torch.Tensor:
        shape = (self.samples[0].length, self.embeddings_VC.shape[1])
        noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for generator in self._generators]
        return torch.stack(noise, dim=1).to(self.device)

    def _estimate(
        self,
        z_SBC: torch.Tensor,
        gamma_B: torch.Tensor,
        told_SBC: torch.Tensor | None,
        likeliest: list[list[int]] | None,
    ) -> torch.Tensor:
        """x_hat, the prompt's being known; and the likeliest new tokens, where they are asked for."""
        estimate_SBC = self.held_SBC.clone()
        for row, logits_N1V in enumerate(self._logits_of_new(z_SBC, gamma_B, told_SBC)):
            new = slice(len(self.samples[row].prompt), None)
            none_N1 = torch.zeros(logits_N1V.shape[:2], dtype=torch.long, device=self.device)
            nobody = torch.zeros(1, device=self.device)
            found = predict(logits_N1V, self.embeddings_VC, none_N1, nobody, self.denoiser.groups)
            estimate_SBC[new, row] = found.estimate_SBC[:, 0].double()
            if likeliest is not None:
                likeliest.append(self._whole(logits_N1V)[:, 0].argmax(-1).tolist())
        return estimate_SBC

    def _tokens(
        self, z_SBC: torch.Tensor, gamma: torch.Tensor, told_SBC: torch.Tensor | None
    ) -> Iterator[list[int]]:
        settings = self.settings
        for row, logits_N1V in enumerate(self._logits_of_new(z_SBC, gamma.expand(len(self.samples)), told_SBC)):
            sample_id = self.samples[row].sample_id
            generators = [generator_of(settings.noise_seed, sample_id, 0, TOKEN_DRAWS, NOISE)]
            logits_1NV = self._whole(logits_N1V).transpose(0, 1)
            ids_1N = choose_tokens(logits_1NV, settings.temperature, generators, settings.top_k, settings.top_p)
            yield ids_1N[0].tolist()

    def _logits_of_new(
        self, z_SBC: torch.Tensor, gamma_B: torch.Tensor, told_SBC: torch.Tensor | None
    ) -> Iterator[torch.Tensor]:
        """Logits of the continuation of one sample after the other, (N, 1, V on this rank)."""
        z_SBC = z_SBC.float()
        if told_SBC is None and self.denoiser.plaid.input.estimate is not None:
            told_SBC = torch.zeros_like(z_SBC)
        told_SBC = None if told_SBC is None else told_SBC.float()
        hidden_SBH = self.denoiser.to_head(self.denoiser.hidden(z_SBC, gamma_B, told_SBC, self.context))
        for row, sample in enumerate(self.samples):
            new, one = slice(len(sample.prompt), None), slice(row, row + 1)
            yield self.denoiser.logits(hidden_SBH[new, one], z_SBC[new, one], gamma_B[one], self.embeddings_VC)

    def _whole(self, logits_N1V: torch.Tensor) -> torch.Tensor:
        """Over the whole vocabulary, on every rank."""
        groups = self.denoiser.groups
        whole = gather_from_tensor_model_parallel_region(logits_N1V, group=groups.tensor_group)
        return whole[..., : self.denoiser.transformer.vocab_size]
