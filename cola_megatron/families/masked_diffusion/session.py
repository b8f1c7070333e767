"""Generation by unmasking, block after block (LLaDA, arXiv 2502.09992; by blocks BD3-LM, arXiv 2503.09573).

A block begins as [MASK]s. Every step predicts all tokens of the block that are still masked and keeps the n predictions
that are most probable (or n random ones); n is the number of masked tokens over the number of steps, one more in the
first steps where that does not divide.

Shapes: T tokens of a block, N of the blocks of several samples laid end to end, H hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch

from cola_megatron.config.masked_diffusion import MaskedDiffusionModelConfig
from cola_megatron.families.masked_diffusion.blocks import Block, Sample, schedule
from cola_megatron.families.masked_diffusion.passes import CachedBlocks, Passes, WholeSequences
from cola_megatron.families.masked_diffusion.settings import MaskedDiffusionSettings
from cola_megatron.inference.fast_forward import prepare
from cola_megatron.inference.noise import REPAINT_DRAWS, TOKEN_DRAWS, generator_of
from cola_megatron.inference.protocol import Request, TokenBlock, TokenPreview
from cola_megatron.inference.sampling import choose_tokens, penalize_repetition
from cola_megatron.models.transformer import Transformer
from cola_megatron.parallel.megatron import gather_from_tensor_model_parallel_region

ROWS_OF_LOGITS = 1024
"""Tokens whose logits are held at once, unless a single block has more."""


class MaskedDiffusionGenerator:
    """The family in inference: begins sessions.

    The transformer is prepared for inference (`inference/fast_forward.py`); it must be in evaluation mode, without
    gradients.
    """

    def __init__(self, transformer: Transformer, config: MaskedDiffusionModelConfig):
        self.transformer, self.config = transformer, config
        prepare(transformer, transformer.groups)

    def start(
        self, requests: Sequence[Request], settings: MaskedDiffusionSettings, padding_id: int
    ) -> "MaskedDiffusionSession":
        """Begins with all new tokens masked.

        Args:
            padding_id: not needed: a block that no prompt fills is unmasked around it.

        Raises:
            ValueError: a prompt holds [MASK], or `block_length` is not the block size of a model that has one.
        """
        return MaskedDiffusionSession(self.transformer, self.config, requests, settings)


class MaskedDiffusionSession:
    """A batch under way (`protocol.Session`).

    All of a sample's new tokens have their place from the beginning, and its answer has exactly as many as were asked
    for. A model that was trained by blocks unmasks its own blocks, counted from the beginning of the prompt.
    """

    def __init__(
        self,
        transformer: Transformer,
        config: MaskedDiffusionModelConfig,
        requests: Sequence[Request],
        settings: MaskedDiffusionSettings,
    ):
        self.transformer, self.config, self.settings = transformer, config, settings
        self.device = next(transformer.parameters()).device
        self.by_blocks = config.block_size is not None
        if self.by_blocks and settings.block_length not in (None, config.block_size):
            raise ValueError(
                f"block_length={settings.block_length}: this model was trained by blocks of {config.block_size} and "
                "generates by them; leave block_length out"
            )
        self.passes: Passes
        if config.block_size is None:
            self.passes = WholeSequences(transformer)
        else:
            self.passes = CachedBlocks(transformer, config.block_size)
        self._requests = 0
        self._samples: list[Sample] = []
        self._unsettled: list[slice] = []
        self.admit(requests)

    @property
    def running(self) -> list[int]:
        """Indices of the requests that are not finished."""
        return sorted(sample.index for sample in self._samples)

    @torch.no_grad()
    def advance(self, preview_steps: Sequence[int] = ()) -> Iterator[TokenPreview | TokenBlock]:
        """One block of every running sample; before it, after some of the steps (0 is the first), its tokens so far.

        A preview leaves out what is still masked; its time is the share of the block that is.
        """
        self._settle()
        blocks = [self._block(sample) for sample in self._samples]
        for step in range(max((len(block.kept) for block in blocks), default=0)):
            self._unmask([block for block in blocks if step < len(block.kept)], blocks, step)
            if step in preview_steps:
                yield from [self._preview(block, step) for block in blocks if step < len(block.kept)]
        settled = []
        for block in blocks:
            sample = block.sample
            sample.start, sample.blocks = block.place.stop, sample.blocks + 1
            ids = sample.tokens_L[block.place.start : block.stop].tolist()
            settled.append(TokenBlock(sample.index, ids, block.repeated, block.place.stop >= sample.end))
        # By blocks, the cache takes it when the next one begins: by then finished samples are gone.
        self._unsettled = [block.place for block in blocks]
        self.drop([block.sample for block in settled if block.last])
        yield from settled

    @torch.no_grad()
    def admit(self, requests: Sequence[Request]) -> None:
        """Further samples, which begin with the next block.

        Raises:
            ValueError: a prompt holds [MASK].
        """
        new = [self._sample(self._requests + place, request) for place, request in enumerate(requests)]
        if not new:
            return
        self._settle()
        self._requests += len(new)
        self._samples += new
        self.passes.admit(self._rows(new), [sample.start for sample in new for _ in range(self._copies)])
        # Neighbours of one length share their attention.
        places = sorted(range(len(self._samples)), key=lambda place: self._samples[place].start)
        if places != list(range(len(places))):
            self.passes.arrange(self._rows_of(places))
            self._samples = [self._samples[place] for place in places]

    @torch.no_grad()
    def drop(self, samples: Sequence[int]) -> None:
        """Ends these samples: batch and caches close up."""
        kept = [place for place, sample in enumerate(self._samples) if sample.index not in samples]
        if len(kept) == len(self._samples):
            return
        self._samples = [self._samples[place] for place in kept]
        self.passes.keep(self._rows_of(kept))
        if self._unsettled:
            self._unsettled = [self._unsettled[place] for place in kept]

    def _settle(self) -> None:
        if self._unsettled:
            places = [place for place in self._unsettled for _ in range(self._copies)]
            self.passes.settle(self._rows(self._samples), places)
            self._unsettled = []

    def _rows_of(self, places: Sequence[int]) -> list[int]:
        return [place * self._copies + copy for place in places for copy in range(self._copies)]

    @property
    def _copies(self) -> int:
        """Rows of each sample."""
        return 2 if self.settings.guidance_scale else 1

    def _sample(self, index: int, request: Request) -> Sample:
        mask_id, size = self.config.mask_id, self.config.block_size
        if mask_id in request.token_ids:
            raise ValueError(f"prompts[{index}] holds token id {mask_id}, which is [MASK] to this model")
        new = self.settings.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        prompt = len(request.token_ids)
        end = prompt + new
        length = end if size is None else -(-end // size) * size
        tokens_L = torch.full((length,), mask_id, device=self.device)
        tokens_L[:prompt] = torch.tensor(list(request.token_ids), dtype=torch.long, device=self.device)
        start = prompt if size is None else prompt // size * size
        seen_V = None
        if self.settings.repetition_penalty != 1.0:
            seen_V = torch.zeros(self.config.vocab_size, dtype=torch.bool, device=self.device)
        return Sample(index, request.sample_id, tokens_L, prompt, end, start, seen_V=seen_V)

    def _block(self, sample: Sample) -> Block:
        size = self.config.block_size or self.settings.block_length or sample.end - sample.prompt
        place = slice(sample.start, min(sample.start + size, len(sample.tokens_L)))
        masked = place.stop - max(place.start, sample.prompt)
        seed = self.settings.noise_seed
        draws, choice = (
            generator_of(seed, sample.sample_id, sample.blocks, kind, formula="hashed")
            for kind in (TOKEN_DRAWS, REPAINT_DRAWS)
        )
        kept = schedule(masked, len(sample.tokens_L) - sample.prompt, self.settings.steps)
        return Block(sample, place, kept, masked, draws, choice)

    def _rows(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """The samples' tokens; with guidance each is followed by a copy without its prompt."""
        rows = []
        for sample in samples:
            rows.append(sample.tokens_L)
            if self._copies == 2:
                without_L = sample.tokens_L.clone()
                without_L[: sample.prompt] = self.config.mask_id
                rows.append(without_L)
        return rows

    def _unmask(self, active: list[Block], all_blocks: list[Block], step: int) -> None:
        """One step of the blocks that have one."""
        # A cache holds all rows: those without a step go along.
        passed = all_blocks if self.by_blocks else active
        rows = self._rows([block.sample for block in passed])
        hidden = self.passes.hidden(rows, [block.place for block in passed for _ in range(self._copies)])
        copies = [hidden[first : first + self._copies] for first in range(0, len(hidden), self._copies)]
        group: list[tuple[Block, list[torch.Tensor]]] = []
        for block, of_block in zip(passed, copies, strict=True):
            if step >= len(block.kept):
                continue
            tokens = sum(len(x_TH) for _, members in group for x_TH in members) + sum(map(len, of_block))
            if group and tokens > ROWS_OF_LOGITS:
                self._keep_most_confident(group, step)
                group = []
            group.append((block, of_block))
        self._keep_most_confident(group, step)

    def _keep_most_confident(self, group: list[tuple[Block, list[torch.Tensor]]], step: int) -> None:
        logits_NV = self._logits(group)
        lengths = [len(block.tokens_T) for block, _ in group]
        if self.settings.temperature == 0.0:
            ids_N = logits_NV.argmax(-1)
        else:
            ids_N = torch.cat(
                [
                    self._drawn(block, logits_TV)
                    for (block, _), logits_TV in zip(group, logits_NV.split(lengths), strict=True)
                ]
            )
        # log p / (1 - p): as large as p is, and float32 still tells it apart where p is nearly 1.
        of_ids_N = logits_NV.gather(-1, ids_N[:, None])[:, 0]
        confidence_N = of_ids_N - logits_NV.scatter_(-1, ids_N[:, None], -torch.inf).logsumexp(-1)
        for (block, _), ids_T, confidence_T in zip(
            group, ids_N.split(lengths), confidence_N.split(lengths), strict=True
        ):
            if self.settings.remasking == "random":
                confidence_T = torch.rand(len(ids_T), generator=block.choice).to(self.device)
            masked_T = block.tokens_T == self.config.mask_id
            order_T = confidence_T.masked_fill(~masked_T, -torch.inf).argsort(descending=True, stable=True)
            chosen = order_T[: block.kept[step]]
            block.tokens_T[chosen] = ids_T[chosen]
            block.masked -= block.kept[step]
            if block.sample.seen_V is not None:
                block.sample.seen_V[ids_T[chosen]] = True

    def _logits(self, group: list[tuple[Block, list[torch.Tensor]]]) -> torch.Tensor:
        """Guided and penalised logits of all positions of the blocks, (N, V), float32; [MASK] is never predicted."""
        transformer, settings = self.transformer, self.settings
        hidden_NH = torch.cat([of_block[copy] for copy in range(self._copies) for _, of_block in group])
        logits_N1V = gather_from_tensor_model_parallel_region(
            transformer.head(hidden_NH[:, None]), group=transformer.groups.tensor_group
        )
        logits_NV = logits_N1V[:, 0, : self.config.vocab_size].float()
        if self._copies == 2:
            conditional_NV, unconditional_NV = logits_NV.chunk(2)
            logits_NV = unconditional_NV + (settings.guidance_scale + 1) * (conditional_NV - unconditional_NV)
        if self.config.mask_token_id is not None:
            logits_NV[:, self.config.mask_token_id] = -torch.inf
        if settings.repetition_penalty == 1.0:
            return logits_NV
        penalized, first = [], 0
        for block, _ in group:
            own_TV, first = logits_NV[first : first + len(block.tokens_T)], first + len(block.tokens_T)
            assert block.sample.seen_V is not None, "there is one where repetition is penalised"
            seen_1V = block.sample.seen_V[None]
            penalized.append(penalize_repetition(own_TV[None], seen_1V, settings.repetition_penalty)[0])
        return torch.cat(penalized)

    def _drawn(self, block: Block, logits_TV: torch.Tensor) -> torch.Tensor:
        settings = self.settings
        return choose_tokens(logits_TV[None], settings.temperature, [block.draws], settings.top_k, settings.top_p)[0]

    def _preview(self, block: Block, step: int) -> TokenPreview:
        sample = block.sample
        ids = sample.tokens_L[block.place.start : block.stop].tolist()
        return TokenPreview(
            sample.index,
            step,
            block.masked / len(block.tokens_T),
            [token for token in ids if token != self.config.mask_id],
            block.repeated,
        )
