"""`ColaDLM`: a trained model in one process, for notebooks and for the command line."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from cola_megatron.config import ModelConfig
from cola_megatron.errors import UserError
from cola_megatron.inference.generate import MAX_SAMPLE_ID, GenerationSettings, generate_blocks
from cola_megatron.interop.published import TOKENIZER, read_published, write_published
from cola_megatron.models.dit import DiT, two_copy_times
from cola_megatron.models.text_vae import LOGVAR_MIN, TextVAE
from cola_megatron.parallel import initialize_parallel, load_full_state_dict

PADDING_TOKENS = ("<|pad|>", "<|endoftext|>")


@dataclass(frozen=True)
class Generation:
    """One continuation. `token_ids` and `latents` cover whole blocks as generated, `text` starts after the prompt."""

    text: str
    token_ids: torch.Tensor
    """(blocks * block_size * patch_size,), int64; begins with the prompt's part of the first block."""
    latents: torch.Tensor
    """(blocks, block_size, d), float32, in the prior's coordinates."""
    prompt_tokens: int
    """How many of `token_ids` repeat the end of the prompt; `text` starts after them."""


class ColaDLM:
    """Text VAE, prior and tokenizer in evaluation mode.

    Build it with `from_published` or `from_checkpoint`. Latents are float32; L tokens are L / patch latents of d
    channels.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, torch.Tensor],
        tokenizer: Path | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        groups = initialize_parallel()
        self.config = config
        self.device = torch.device(device) if device is not None else groups.device
        self.vae, self.dit = TextVAE(config.vocab_size, config.vae, groups), None
        load_full_state_dict(self.vae, _part(weights, "vae"), groups)
        if any(name.startswith("dit.") for name in weights):
            self.dit = DiT(config.dit, groups)
            load_full_state_dict(self.dit, _part(weights, "dit"), groups)
        for network in (self.vae, self.dit):
            if network is not None:
                network.to(self.device, dtype).eval().requires_grad_(False)
        self.tokenizer_path = tokenizer
        self.tokenizer = _read_tokenizer(tokenizer) if tokenizer is not None else None

    @classmethod
    def from_published(cls, folder: str | Path, **options) -> "ColaDLM":
        """A folder with `cola_vae/`, `cola_dit/` and (for text) `tokenizer.json`.

        Raises:
            PublishedError: the folder is incomplete or holds something else.
        """
        folder = Path(folder)
        config, weights = read_published(folder)
        tokenizer = folder / TOKENIZER
        return cls(config, weights, tokenizer if tokenizer.is_file() else None, **options)

    @classmethod
    def from_checkpoint(cls, run_folder: str | Path, **options) -> "ColaDLM":
        """A run folder (its newest checkpoint) or one checkpoint folder; a stage-1 run has no prior.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        from cola_megatron.training.checkpoint import read_weights, require_checkpoint

        config, weights = read_weights(require_checkpoint(Path(run_folder)))
        tokenizer = config.data.path / TOKENIZER if config.data.path is not None else None
        return cls(config.model, weights, tokenizer if tokenizer and tokenizer.is_file() else None, **options)

    def save_published(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes the published layout; raises PublishedError where it cannot hold this model."""
        weights = {f"vae.{name}": tensor for name, tensor in self.vae.state_dict().items()}
        if self.dit is not None:
            weights |= {f"dit.{name}": tensor for name, tensor in self.dit.state_dict().items()}
        cpu_weights = {name: tensor.cpu() for name, tensor in weights.items()}
        write_published(Path(folder), self.config, cpu_weights, self.tokenizer_path, dtype)

    @torch.no_grad()
    def encode(self, ids: torch.Tensor | Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior of one text: ids (L,) -> mean and log variance, (L / patch, d) each.

        A deterministic encoder (`config.vae.variational` false) answers the smallest log variance, -30.

        Raises:
            ValueError: L is 0 or not divisible by patch_size * block_size of the VAE, or an id is out of range or no
                integer.
        """
        ids = torch.as_tensor(ids, device=self.device)
        vae = self.config.vae
        if ids.dim() != 1 or ids.numel() == 0 or ids.numel() % (vae.patch_size * vae.block_size):
            raise ValueError(
                "ids must be one sequence of a length divisible by patch_size * block_size = "
                f"{vae.patch_size} * {vae.block_size}, not of shape {tuple(ids.shape)}"
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
        lengths = _integers("lengths", lengths)
        if sum(lengths) != z.shape[0] or min(lengths, default=0) < 1:
            raise ValueError(f"lengths {lengths} must be positive and add up to the {z.shape[0]} rows of z")
        parts = z.to(self.device, torch.float32).split(lengths)
        return torch.cat([self.vae.decoder(part[:, None])[:, 0].float() for part in parts])

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

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        ids: Sequence[int] | None = None,
        noise_seed: int = 66,
        steps: int = 16,
        guidance_scale: float = 7.0,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        repetition_penalty: float = 1.1,
        padding_id: int | None = None,
    ) -> list[Generation]:
        """Continues each prompt.

        Args:
            prompts: texts, or token ids where they are known.
            ids: one integer per prompt; a sample's noise depends on (noise_seed, id, block) alone. Default 0, 1, ...
            max_new_tokens: generation covers this many tokens in whole blocks; a prompt that ends inside a block has
                its last tokens in the first of them.
            padding_id: fills a prompt's last block; by default the tokenizer's `<|pad|>`, else `<|endoftext|>`.

        Raises:
            ValueError: settings, ids or token ids out of range, ids that do not match the prompts, no tokenizer.
            UserError: no prior.
        """
        dit = self._prior()
        if self.tokenizer is None:
            raise ValueError("this model came without a tokenizer.json")
        sample_ids = list(range(len(prompts))) if ids is None else _integers("ids", ids)
        if len(sample_ids) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(sample_ids)} ids")
        for sample in sample_ids:
            if abs(sample) > MAX_SAMPLE_ID:
                raise ValueError(f"ids: {sample} must lie in -{MAX_SAMPLE_ID} .. {MAX_SAMPLE_ID}")
        if not prompts:
            return []
        settings = GenerationSettings(
            steps=steps,
            guidance_scale=guidance_scale,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            noise_seed=noise_seed,
        )
        token_ids = [self._token_ids(index, prompt) for index, prompt in enumerate(prompts)]
        padding = self._padding_id() if padding_id is None else padding_id
        if not 0 <= padding < self.config.vocab_size:
            raise ValueError(f"padding_id={padding} must lie in 0 .. {self.config.vocab_size - 1}")
        blocks = generate_blocks(self.vae, dit, token_ids, sample_ids, padding, settings)
        return [
            Generation(
                self.tokenizer.decode(block.token_ids[block.prompt_tokens :].tolist(), skip_special_tokens=False),
                block.token_ids,
                block.latents,
                block.prompt_tokens,
            )
            for block in blocks
        ]

    def _prior(self) -> DiT:
        if self.dit is None:
            raise UserError("this model has no prior: it comes from a stage-1 run; train stage 2 first")
        return self.dit

    def _token_ids(self, index: int, prompt: str | Sequence[int]) -> list[int]:
        name = f"prompts[{index}]"
        if isinstance(prompt, str):
            token_ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        else:
            token_ids = _integers(name, prompt)
        for token in token_ids:
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(f"{name}: token id {token} must lie in 0 .. {self.config.vocab_size - 1}")
        return token_ids

    def _check_latents(self, name: str, z: torch.Tensor, dims: int) -> None:
        channels, form = self.config.vae.latent_dim, "(rows, d)" if dims == 2 else "(B, L, d)"
        if z.dim() != dims or z.shape[-1] != channels:
            raise ValueError(f"{name} must have shape {form} with d = {channels} channels, not {tuple(z.shape)}")

    def _padding_id(self) -> int:
        for token in PADDING_TOKENS:
            found = self.tokenizer.token_to_id(token)
            if found is not None:
                return found
        raise ValueError(f"the tokenizer has none of {', '.join(PADDING_TOKENS)}; give padding_id")


def _integers(name: str, values: Iterable[int]) -> list[int]:
    try:
        return [operator.index(value) for value in values]
    except TypeError as error:
        raise ValueError(f"{name} must be integers: {error}") from None


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise UserError(f"{path}: not a readable tokenizer.json: {error}") from error


def _part(weights: dict[str, torch.Tensor], network: str) -> dict[str, torch.Tensor]:
    prefix = f"{network}."
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
