"""Block-wise generation by flow: encode the prompts, draw latent blocks, decode each (paper section 2.3).

The definition that it computes is in `guided_sampling.py`; here are batches, caches, and prompts of any length.

Shapes: B running samples, S latents of one block, C latent channels, T = S * P tokens of one block, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cola_megatron.inference.decoder import BlockDecoder, encode_prompts
from cola_megatron.inference.fast_forward import prepare
from cola_megatron.inference.first_block import FirstBlock, PromptLayout, lay_out
from cola_megatron.inference.graphs import Recorder
from cola_megatron.inference.noise import REPAINT_DRAWS, TOKEN_DRAWS, block_noise, generator_of
from cola_megatron.inference.prior import BlockPrior, TimeGrid
from cola_megatron.inference.protocol import Request, TokenBlock, TokenPreview
from cola_megatron.inference.sampling import choose_tokens, penalize_repetition
from cola_megatron.inference.settings import FlowSettings
from cola_megatron.inference.settling import Settling
from cola_megatron.inference.solvers import Evaluation
from cola_megatron.models.dit import DiT
from cola_megatron.models.text_vae import TextVAE


class FlowGenerator:
    """Cola DLM as a family: begins sessions.

    The networks are prepared for inference (`fast_forward.py`); they must be in evaluation mode, without gradients.

    Args:
        recorder: see `graphs.py`.
    """

    def __init__(self, vae: TextVAE, dit: DiT, recorder: Recorder | None = None):
        self.vae, self.dit, self.recorder = vae, dit, recorder
        for network in (vae.encoder, vae.decoder, dit):
            prepare(network, network.groups)
        self._grid: TimeGrid | None = None

    def start(self, requests: Sequence[Request], settings: FlowSettings, padding_id: int) -> "FlowSession":
        """Encodes the prompts and fills the caches.

        Args:
            padding_id: fills a prompt up to what the encoder takes, or up to whole blocks; see `first_block.py`.
        """
        grid = self._time_grid(settings.steps)
        return FlowSession(self.vae, self.dit, grid, requests, settings, padding_id, self.recorder)

    @torch.no_grad()
    def _time_grid(self, steps: int) -> TimeGrid:
        if self._grid is None or self._grid.clean_row != steps:
            self._grid = TimeGrid(self.dit, steps)
        return self._grid


@dataclass
class _Sample:
    """One running sample; the batch is a list of these, in order of their contexts' length."""

    index: int
    """Of its request."""
    sample_id: int
    blocks: int
    layout: PromptLayout
    held_NC: torch.Tensor
    """The prompt's latents inside the first generated block."""
    done: int = 0
    """Blocks that are settled."""

    @property
    def repeated(self) -> int:
        """Tokens of the next block that repeat the prompt."""
        return 0 if self.done else self.layout.repeated_tokens


class FlowSession:
    """A batch under way (`protocol.Session`).

    Prompts that do not fill their last block are handled as `settings.first_block` says; that block counts towards
    `max_new_tokens`.
    """

    def __init__(
        self,
        vae: TextVAE,
        dit: DiT,
        grid: TimeGrid,
        requests: Sequence[Request],
        settings: FlowSettings,
        padding_id: int,
        recorder: Recorder | None = None,
    ):
        self.vae, self.dit, self.grid, self.settings, self.padding_id = vae, dit, grid, settings, padding_id
        self.device = grid.times_T.device
        self.shape = (dit.config.block_size, dit.config.latent_dim)
        self.prior = BlockPrior(dit, grid, settings, recorder)
        self.decoder = BlockDecoder(vae, self.shape[0])
        self._requests = 0
        self._samples: list[_Sample] = []
        self._unremembered_SBC: torch.Tensor | None = None
        self._seen_BV: torch.Tensor | None = None
        if settings.repetition_penalty != 1.0:
            self._seen_BV = torch.zeros(0, self.decoder.vocab_size, dtype=torch.bool, device=self.device)
        self.admit(requests)

    @property
    def running(self) -> list[int]:
        """Indices of the requests that are not finished."""
        return sorted(sample.index for sample in self._samples)

    @torch.no_grad()
    def admit(self, requests: Sequence[Request]) -> None:
        """Further samples, which begin with the next block: encodes their prompts and fills the caches."""
        if not requests:
            return
        self._remember()
        (block_size, _), patch_size = self.shape, self.vae.config.patch_size
        # The encoder sees whole blocks of its own; one that is longer than the prior's sees what there is of it.
        of_vae = self.vae.config.block_size
        unit = patch_size * (of_vae if block_size % of_vae == 0 else block_size)
        layouts = [
            lay_out(request.token_ids, self.settings.first_block, block_size, patch_size, unit, self.padding_id)
            for request in requests
        ]
        contexts, capacity = [], 0
        latents = encode_prompts(self.vae, [layout.token_ids for layout in layouts], self.device)
        for request, layout, z_NC in zip(requests, layouts, latents, strict=True):
            tokens = self.settings.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
            blocks = -(-tokens // (block_size * patch_size))
            held_NC = z_NC[layout.whole : layout.whole + layout.held]
            self._samples.append(_Sample(self._requests, request.sample_id, blocks, layout, held_NC))
            self._requests += 1
            contexts.append(z_NC[: layout.whole])
            capacity = max(capacity, layout.whole + blocks * block_size)
        self.prior.admit(contexts, capacity)
        self.decoder.admit(contexts, capacity)
        if self._seen_BV is not None:
            new_BV = self._seen_BV.new_zeros(len(requests), self.decoder.vocab_size)
            self._seen_BV = torch.cat((self._seen_BV, new_BV))
        self._arrange()

    @torch.no_grad()
    def advance(self, preview_steps: Sequence[int] = ()) -> Iterator[TokenPreview | TokenBlock]:
        """One block of every running sample; before it its estimates at some of the solver's steps (0 is the first)."""
        if not self._samples:
            return
        self._remember()
        noise_SBC = self._noise()
        first = self._first_block(noise_SBC)
        drawing, z_SBC = self.prior.draw(noise_SBC, first), None
        settling = Settling(self.settings.settle_every, self.settings.steps, len(self._samples))
        while settling.left:
            try:
                evaluation = next(drawing)
            except StopIteration as end:
                z_SBC = end.value
                break
            if not (settling.due(evaluation.step) or evaluation.step in preview_steps):
                continue
            clean_SBC = evaluation.clean if first is None else first.hold(evaluation.clean, 0.0)
            if evaluation.step in preview_steps:
                yield from self._previews(evaluation, clean_SBC, settling.left)
            if settling.due(evaluation.step):
                self._look(evaluation.step, clean_SBC, settling)
        z_SBC = settling.block(z_SBC)
        ids_BT = self._tokens(self.decoder.decode(z_SBC))
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, ids_BT, True)
        blocks = []
        of_samples = zip(self._samples, ids_BT.tolist(), z_SBC.cpu().unbind(1), settling.taken, strict=True)
        for sample, ids, z_SC, steps in of_samples:
            last = sample.done + 1 == sample.blocks
            blocks.append(TokenBlock(sample.index, ids, sample.repeated, last, z_SC, steps))
            sample.done += 1
        # The prior reads it when the next block begins: by then finished samples are gone.
        self._unremembered_SBC = z_SBC
        self.drop([block.sample for block in blocks if block.last])
        yield from blocks

    @torch.no_grad()
    def drop(self, samples: Sequence[int]) -> None:
        """Ends these samples: batch and caches close up."""
        rows = [row for row, sample in enumerate(self._samples) if sample.index not in samples]
        if len(rows) == len(self._samples):
            return
        self.prior.keep(rows)
        self.decoder.keep(rows)
        self._take(rows)

    def _previews(self, evaluation: Evaluation, clean_SBC: torch.Tensor, rows: Sequence[int]) -> Iterator[TokenPreview]:
        for row, ids in zip(rows, self._estimated(clean_SBC, rows), strict=True):
            sample = self._samples[row]
            yield TokenPreview(sample.index, evaluation.step, evaluation.time, ids, sample.repeated)

    def _look(self, step: int, clean_SBC: torch.Tensor, settling: Settling) -> None:
        rows = settling.left
        if settling.look(step, self._estimated(clean_SBC, rows), clean_SBC[:, rows]) and settling.left:
            self.prior.go_on_with(settling.left)

    def _estimated(self, clean_SBC: torch.Tensor, rows: Sequence[int]) -> list[list[int]]:
        """Tokens of some samples, if the block were this."""
        ids: list[list[int]] = self._tokens(self.decoder.look(clean_SBC[:, rows], rows), rows).tolist()
        return ids

    def _arrange(self) -> None:
        """In order of their contexts: neighbours of one length share their attention."""
        lengths = self.prior.cache.lengths
        rows = sorted(range(len(lengths)), key=lengths.__getitem__)
        if rows != list(range(len(lengths))):
            self.prior.arrange(rows)
            self.decoder.arrange(rows)
            self._take(rows)

    def _take(self, rows: Sequence[int]) -> None:
        self._samples = [self._samples[row] for row in rows]
        rows_B = torch.tensor(rows, dtype=torch.long, device=self.device)
        if self._seen_BV is not None:
            self._seen_BV = self._seen_BV[rows_B]
        if self._unremembered_SBC is not None:
            self._unremembered_SBC = self._unremembered_SBC[:, rows_B]

    def _remember(self) -> None:
        if self._unremembered_SBC is not None and self._samples:
            self.prior.remember(self._unremembered_SBC)
        self._unremembered_SBC = None

    def _noise(self) -> torch.Tensor:
        seed, formula = self.settings.noise_seed, self.settings.noise
        noise = [block_noise(seed, each.sample_id, each.done, self.shape, formula) for each in self._samples]
        return torch.stack(noise, dim=1).to(self.device)

    def _first_block(self, noise_SBC: torch.Tensor) -> FirstBlock | None:
        begun = [(row, each.held_NC) for row, each in enumerate(self._samples) if each.layout.held and not each.done]
        if not begun:
            return None
        clean_SBC = torch.zeros_like(noise_SBC)
        held_SB = torch.zeros(noise_SBC.shape[:2], dtype=torch.bool, device=self.device)
        for row, z_NC in begun:
            clean_SBC[: len(z_NC), row] = z_NC
            held_SB[: len(z_NC), row] = True
        settings = self.settings
        return FirstBlock(
            held_SB,
            clean_SBC,
            noise_SBC,
            self._generators(REPAINT_DRAWS),
            settings.first_block == "partial_repaint",
            settings.repaint_until,
            settings.repaint_rounds,
        )

    def _tokens(self, logits_NTV: torch.Tensor, rows: Sequence[int] | None = None) -> torch.Tensor:
        """Ids (N, T) of some samples; None: of all."""
        settings, generators = self.settings, None
        rows = range(len(self._samples)) if rows is None else rows
        if self._seen_BV is not None:
            logits_NTV = penalize_repetition(logits_NTV, self._seen_BV[list(rows)], settings.repetition_penalty)
        if settings.temperature:
            generators = self._generators(TOKEN_DRAWS, rows)
        return choose_tokens(logits_NTV, settings.temperature, generators, settings.top_k, settings.top_p)

    def _generators(self, draws: int, rows: Sequence[int] | None = None) -> list[torch.Generator]:
        seed, formula = self.settings.noise_seed, self.settings.noise
        samples = self._samples if rows is None else [self._samples[row] for row in rows]
        return [generator_of(seed, each.sample_id, each.done, draws, formula) for each in samples]
