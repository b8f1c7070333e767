"""`ColaDLM`: a trained Cola DLM in one process, for notebooks and for the command line."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cola_megatron.config import ColaModelConfig
from cola_megatron.errors import UserError
from cola_megatron.families.cola.published import PublishedModel, write_published
from cola_megatron.inference import likelihood, robustness
from cola_megatron.inference.fast_forward import prepare
from cola_megatron.inference.generate import FlowGenerator, FlowSession
from cola_megatron.inference.graphs import Recorder, compiled, record_on_cuda
from cola_megatron.inference.likelihood_terms import Likelihood, Progress
from cola_megatron.inference.protocol import Request
from cola_megatron.inference.requests import integers, read_settings
from cola_megatron.inference.scored_texts import Text
from cola_megatron.inference.settings import FlowSettings, LikelihoodSettings
from cola_megatron.inference.text_model import TextModel
from cola_megatron.interop.stored_model import CheckpointModel
from cola_megatron.interop.weight_files import MAX_SHARD_BYTES
from cola_megatron.interop.weight_source import HeldWeights
from cola_megatron.models.dit import DiT, two_copy_times
from cola_megatron.models.text_vae import LOGVAR_MIN, TextVAE
from cola_megatron.parallel import gather_state_dict, load_full_state_dict
from cola_megatron.parallel.megatron import gather_from_tensor_model_parallel_region


class ColaDLM(TextModel):
    """Text VAE, prior and tokenizer in evaluation mode.

    Build it with `from_published` or `from_checkpoint`. Latents are float32; L tokens are L / patch latents of d
    channels. It is an `inference.protocol.Generator`.

    Args:
        device: by default the GPU of this process, or the CPU.
        dtype: of the weights and of the activations between them.
        tensor_parallel_size: processes that share each matrix. Under torchrun every one of them makes the same calls
            and gets the same answers.
        cuda_graphs: replay the solver's steps as CUDA graphs; see `inference/graphs.py` for what is known about it.
        compile_steps: compile them; with both, the graphs are of what was compiled.

    Raises:
        ValueError: CUDA graphs without a GPU; either with tensor parallelism.
    """

    config: ColaModelConfig
    settings_class = FlowSettings

    def __init__(
        self,
        config: ColaModelConfig,
        weights: dict[str, torch.Tensor],
        tokenizer: Path | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        tensor_parallel_size: int = 1,
        cuda_graphs: bool = False,
        compile_steps: bool = False,
    ):
        self.cuda_graphs, self.compile_steps = cuda_graphs, compile_steps
        super().__init__(config, weights, tokenizer, device, dtype, tensor_parallel_size)

    def build(self, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        """See `TextModel.build`."""
        config, groups = self.config, self.groups
        if self.cuda_graphs and (self.device.type != "cuda" or groups.tensor_parallel_size > 1):
            raise ValueError("cuda_graphs=True needs a GPU and tensor_parallel_size=1; leave it out")
        if self.compile_steps and groups.tensor_parallel_size > 1:
            raise ValueError("compile_steps=True needs tensor_parallel_size=1; leave it out")
        self.vae, self.dit = TextVAE(config.vocab_size, config.vae, groups), None
        load_full_state_dict(self.vae, _part(weights, "vae"), groups)
        if any(name.startswith("dit.") for name in weights):
            self.dit = DiT(config.dit, groups)
            load_full_state_dict(self.dit, _part(weights, "dit"), groups)
        for network in (self.vae, self.dit):
            if network is not None:
                prepare(network.to(self.device, dtype).eval().requires_grad_(False), groups)
        recorder: Recorder | None = record_on_cuda if self.cuda_graphs else None
        if self.compile_steps:
            recorder = compiled(recorder)
        self._flow = FlowGenerator(self.vae, self.dit, recorder) if self.dit is not None else None

    @property
    def block_tokens(self) -> int:
        """Tokens of one block of the prior."""
        return self.config.dit.block_size * self.config.vae.patch_size

    def require_generation(self) -> None:
        """Raises UserError for a stage-1 model."""
        self._prior()

    def start(self, requests: Sequence[Request], settings: FlowSettings, padding_id: int) -> FlowSession:
        """Encodes the prompts and fills the caches."""
        assert self._flow is not None, "there is one with every prior"
        return self._flow.start(requests, settings, padding_id)

    @classmethod
    def from_published(cls, folder: str | Path, **options) -> "ColaDLM":
        """A folder with `cola_vae/`, `cola_dit/` and (for text) `tokenizer.json`, or the published download.

        Raises:
            PublishedError: the folder is incomplete or holds something else.
        """
        return cls.from_source(PublishedModel(Path(folder)), **options)

    @classmethod
    def from_checkpoint(cls, run_folder: str | Path, **options) -> "ColaDLM":
        """A run folder (its newest checkpoint) or one checkpoint folder; a stage-1 run has no prior.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        model = CheckpointModel(Path(run_folder))
        if not isinstance(model.config, ColaModelConfig):
            raise UserError(f"{run_folder} is no Cola DLM: its model.family is {model.config.family}; use load_model")
        return cls.from_source(model, **options)

    def save_published(
        self, folder: str | Path, dtype: torch.dtype = torch.float32, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        """Writes the published layout, in shards where it is larger than one.

        Raises:
            PublishedError: the layout cannot hold this model, or the folder holds parts of another one.
        """
        networks = {"vae": self.vae} | ({"dit": self.dit} if self.dit is not None else {})
        weights = {
            f"{part}.{name}": tensor
            for part, network in networks.items()
            for name, tensor in gather_state_dict(network, self.groups).items()
        }
        if self.groups.tensor_parallel_rank == 0:
            write_published(
                Path(folder),
                self.config,
                HeldWeights(weights),
                self.tokenizer_path,
                dtype,
                max_shard_bytes=max_shard_bytes,
            )
        if self.groups.tensor_parallel_size > 1:
            torch.distributed.barrier(group=self.groups.tensor_group)

    @torch.no_grad()
    def encode(self, ids: torch.Tensor | Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior of one text: ids (L,) -> mean and log variance, (L / patch, d) each.

        A deterministic encoder (`config.vae.variational` false) answers the smallest log variance, -30.

        Raises:
            ValueError: L is 0 or not divisible by patch_size of the VAE, or an id is out of range or no
                integer.
        """
        ids = torch.as_tensor(ids, device=self.device)
        vae = self.config.vae
        if ids.dim() != 1 or ids.numel() == 0 or ids.numel() % vae.patch_size:
            raise ValueError(
                f"ids must be one sequence of a length divisible by patch_size = {vae.patch_size}, not of shape "
                f"{tuple(ids.shape)}"
            )
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"ids must be integers, not {ids.dtype}")
        if int(ids.min()) < 0 or int(ids.max()) > self.config.vocab_size:
            raise ValueError(f"ids must lie in 0 .. {self.config.vocab_size} ({self.config.vocab_size} is [MASK])")
        posterior = self.vae.encoder(ids[None].long())
        mean = posterior.mean[:, 0]
        if posterior.logvar is None:
            return mean, torch.full_like(mean, LOGVAR_MIN)
        return mean, posterior.logvar[:, 0]

    @torch.no_grad()
    def decode(self, z: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Logits of several texts: z (sum of lengths, d) -> (sum of lengths * patch, vocab), float32.

        Raises:
            ValueError: z has another shape, or the lengths do not add up to its rows.
        """
        self._check_latents("z", z, 2)
        lengths = integers("lengths", lengths)
        if sum(lengths) != z.shape[0] or min(lengths, default=0) < 1:
            raise ValueError(f"lengths {lengths} must be positive and add up to the {z.shape[0]} rows of z")
        parts = z.to(self.device, torch.float32).split(lengths)
        logits = torch.cat([self.vae.decoder(part[:, None])[:, 0].float() for part in parts])
        whole = gather_from_tensor_model_parallel_region(logits, group=self.groups.tensor_group)
        return whole[:, : self.config.vocab_size]

    @torch.no_grad()
    def velocity(self, z_clean: torch.Tensor, z_noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Velocity of the noisy copy given the clean one (the training pass): (B, L, d), (B, L, d), t -> (B, L, d).

        Args:
            t: in [0, 1], (B,) or (B, blocks).

        Raises:
            ValueError: shapes that do not fit, or a t out of range. UserError: no prior.
        """
        dit = self._prior()
        self._check_latents("z_clean", z_clean, 3)
        self._check_latents("z_noisy", z_noisy, 3)
        batch, length, _ = z_noisy.shape
        block_size = self.config.dit.block_size
        t = torch.as_tensor(t, dtype=torch.float32, device=self.device)
        time_BN = t[:, None] if t.dim() == 1 else t
        if z_clean.shape != z_noisy.shape or length == 0 or length % block_size:
            raise ValueError(
                f"z_clean {tuple(z_clean.shape)} and z_noisy {tuple(z_noisy.shape)} must agree, "
                f"with a length divisible by block_size={block_size}"
            )
        if time_BN.shape not in ((batch, 1), (batch, length // block_size)):
            raise ValueError(
                f"t has shape {tuple(t.shape)}; it must be ({batch},) or ({batch}, {length // block_size})"
            )
        outside = t[~((t >= 0) & (t <= 1))]  # NaN is neither
        if outside.numel():
            raise ValueError(f"t={outside[0].item()} must lie in 0 .. 1")
        clean_length = length - block_size
        z_SBC = torch.cat((z_clean[:, :clean_length], z_noisy), dim=1).transpose(0, 1).to(self.device, torch.float32)
        velocity_SBC = dit(
            z_SBC,
            two_copy_times(time_BN, length, clean_length, None),
            dit.two_copy_context(length, clean_length, None, self.device),
        )
        return velocity_SBC[clean_length:].transpose(0, 1)

    def fixed_outputs(self) -> dict[str, torch.Tensor]:
        """Of `encode`, `decode` and, where there is a prior, `velocity`; float32."""
        generator, vae, block_size = torch.Generator().manual_seed(0), self.config.vae, self.config.dit.block_size
        latents = 3 * math.lcm(vae.block_size, block_size)
        ids = torch.randint(0, self.config.vocab_size, (latents * vae.patch_size,), generator=generator)
        clean, noisy = torch.randn(2, 1, latents, vae.latent_dim, generator=generator)
        mean, logvar = self.encode(ids)
        outputs = {"encode, mean": mean, "encode, log variance": logvar, "decode": self.decode(clean[0], [latents])}
        if self.dit is not None:
            outputs["velocity"] = self.velocity(clean, noisy, torch.tensor([0.5]))
        return outputs

    def log_likelihood(
        self,
        texts: Sequence[str | Sequence[int]],
        contexts: Sequence[str | Sequence[int]] | None = None,
        ids: Sequence[int] | None = None,
        *,
        padding_id: int | None = None,
        batch_size: int = 16,
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Likelihood]:
        """Estimates log p(text), or log p(text | context), of each text: ELBO, IWAE and their terms, in nats.

        log p(text | context) is estimated as log p(context, text) - log p(context), with the same draws in both: a
        difference of two bounds, which is an estimate and no bound. See `inference/likelihood.py`.

        Args:
            texts: texts, or token ids where they are known.
            contexts: what goes before each text; None or an empty one: nothing.
            ids: one integer per text; a text's draws depend on (noise_seed, id, draw) alone. Default 0, 1, ...
            padding_id: fills texts up to whole blocks; by default as for `generate`.
            batch_size: latents of texts that are integrated at once. No result depends on it.
            progress: told (texts done, texts in all), where contexts count as texts of their own.
            options: any fields of `inference.settings.LikelihoodSettings`.

        Raises:
            ValueError: a text without tokens; settings, ids or token ids out of range; numbers that do not match; texts
                without a tokenizer. UserError: no prior, or an encoder without a density.
        """
        dit = self._prior()
        settings = read_settings(LikelihoodSettings, options, "a likelihood")
        scored = self._read_texts(texts, contexts, ids, batch_size)
        padding = self._padding_of_texts(padding_id)
        return likelihood.estimate(self.vae, dit, scored, settings, padding, batch_size, progress)

    def reconstruction_curve(
        self,
        texts: Sequence[str | Sequence[int]],
        times: Sequence[float],
        ids: Sequence[int] | None = None,
        *,
        padding_id: int | None = None,
        batch_size: int = 16,
        noise_seed: int = LikelihoodSettings.noise_seed,
        progress: Progress | None = None,
    ) -> robustness.RobustnessCurve:
        """Accuracy and cross entropy of decoding z_t = (1 - t) z0 + t z1, z0 the posterior means of the texts.

        Args:
            times: t in [0, 1].
            texts, ids, padding_id, batch_size, noise_seed, progress: as for `log_likelihood`.

        Raises:
            ValueError: as `log_likelihood`, and a time out of range.
        """
        settings = read_settings(LikelihoodSettings, {"noise_seed": noise_seed}, "a likelihood")
        scored = [Text(text.token_ids, text.sample_id) for text in self._read_texts(texts, None, ids, batch_size)]
        return robustness.reconstruction_curve(
            self.vae, scored, times, settings.noise_seed, self._padding_of_texts(padding_id), batch_size, progress
        )

    def _prior(self) -> DiT:
        if self.dit is None:
            raise UserError("this model has no prior: it comes from a stage-1 run; train stage 2 first")
        return self.dit

    def _check_latents(self, name: str, z: torch.Tensor, dims: int) -> None:
        channels, form = self.config.vae.latent_dim, "(rows, d)" if dims == 2 else "(B, L, d)"
        if z.dim() != dims or z.shape[-1] != channels:
            raise ValueError(f"{name} must have shape {form} with d = {channels} channels, not {tuple(z.shape)}")


def _part(weights: dict[str, torch.Tensor], network: str) -> dict[str, torch.Tensor]:
    prefix = f"{network}."
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
