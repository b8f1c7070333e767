"""Guided sampling of one latent block after another from the DiT (paper section 2.3).

Shapes: S latents of one block, B batch, R rows of a pass (the B samples, then the unconditional copies of some), N
latents of all prompts laid end to end, C latent channels, T times.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from cola_megatron.inference.cached_attention import MaskedBlocks, NewBlocks, PackedPrompts, blocks_for, packs
from cola_megatron.inference.fast_forward import phases
from cola_megatron.inference.first_block import FirstBlock
from cola_megatron.inference.graphs import RecordedVelocity, Recorder
from cola_megatron.inference.kv_cache import KeyValueCache
from cola_megatron.inference.settings import FlowSettings
from cola_megatron.inference.solvers import RULES, Evaluation, integrate, uniform_grid
from cola_megatron.layers.attention import AttentionContext
from cola_megatron.layers.masks import AttentionMask
from cola_megatron.layers.time_embedding import TimeRows
from cola_megatron.models.dit import DiT, Modulations, TimeTable


class TimeGrid:
    """The solver's times and all that the DiT computes from them alone: made once, used by every step of every block.

    Row i belongs to the i-th time; the last row is t = 0, that of clean latents.
    """

    def __init__(self, dit: DiT, steps: int):
        device = next(dit.parameters()).device
        self.times_T = uniform_grid(steps, device)
        self.times = self.times_T.tolist()
        self.modulations = dit.modulations(self.times_T)
        # Views of single rows, which every position of a pass shares.
        self.rows = [_row(self.modulations, row) for row in range(steps + 1)]
        self.clean_row = steps


class _Blocks(NamedTuple):
    """The next block of every sample: where it stands and what it sees."""

    attention: NewBlocks | MaskedBlocks
    context: AttentionContext
    guided: AttentionContext
    """The same with the unconditional copies as further rows."""
    with_context: torch.Tensor | None
    """Rows of the samples that have a context to leave out, (G,); None: all of them."""
    unconditional: int
    """How many of them."""


class BlockPrior:
    """Draws blocks z^(b) ~ p(z^(b) | z^(<b)) and remembers them.

    The conditional and the unconditional pass of a step are rows of one batch: every matrix is read once. The
    unconditional rows see their own block, so they need neither the cache nor a mask.

    It begins without samples.

    Args:
        grid: for `settings.steps`.
        recorder: records the solver's evaluations and replays them (`graphs.py`); None: runs each.
    """

    def __init__(
        self,
        dit: DiT,
        grid: TimeGrid,
        settings: FlowSettings,
        recorder: Recorder | None = None,
    ):
        self.dit, self.grid, self.settings = dit, grid, settings
        self.device = next(dit.parameters()).device
        self.block_size = dit.config.block_size
        self.cache = KeyValueCache()
        self.recorder = recorder
        self._recorded: dict[tuple[int, int, int, int], RecordedVelocity] = {}
        self._next: _Blocks | None = None
        self._left: tuple[torch.Tensor, _Blocks] | None = None

    def admit(self, prompts: Sequence[torch.Tensor], capacity: int) -> None:
        """Further samples: their clean prompt latents (n, C), at t = 0 from position 0 on.

        Args:
            capacity: latents of the longest of them, prompt and generation together.
        """
        before, self._next = len(self.cache.lengths), None
        self.cache.add(len(prompts), capacity)
        for pack in packs([len(z_NC) for z_NC in prompts]):
            lengths, rows = [len(prompts[sample]) for sample in pack], [before + sample for sample in pack]
            z_NC = torch.cat([prompts[sample] for sample in pack])
            attention = PackedPrompts(lengths, self.block_size, self.device, self.cache, rows)
            self._velocity(z_NC[:, None], self.grid.clean_row, self._context(attention.positions, attention))
        self.cache.advance([0] * before + [len(z_NC) for z_NC in prompts])

    def remember(self, z_SBC: torch.Tensor) -> None:
        """Commits one clean block (t = 0) of every sample."""
        self._velocity(z_SBC, self.grid.clean_row, self._next_blocks().context)
        self.cache.advance([self.block_size] * z_SBC.shape[1])
        self._next = None

    def keep(self, rows: Sequence[int]) -> None:
        """Drops every sample but these."""
        self.cache.keep(rows)
        self._next = None

    def arrange(self, rows: Sequence[int]) -> None:
        """Puts the samples into this order."""
        self.cache.arrange(rows)
        self._next = None

    def draw(
        self, noise_SBC: torch.Tensor, first: FirstBlock | None = None
    ) -> Generator[Evaluation, None, torch.Tensor]:
        """Integrates one block from noise: yields the evaluations of the solver, returns the block.

        Args:
            first: where prompts end inside this block: the latents that belong to them.
        """
        grid = self.grid
        self._left = None

        def velocity(z_SBC: torch.Tensor, step: int) -> torch.Tensor:
            index_SB = None
            if first is not None:
                z_SBC = first.hold(z_SBC, grid.times[step])  # also inside a step, where a solver evaluates there
                index_SB = first.time_rows(step, grid.clean_row)
            if self._left is None:
                return self._guided(z_SBC, step, self._next_blocks(), index_SB)
            rows_N, blocks = self._left
            index_SN = None if index_SB is None else index_SB[:, rows_N]
            of_left_SNC = self._guided(z_SBC[:, rows_N], step, blocks, index_SN)
            return torch.zeros_like(z_SBC, dtype=of_left_SNC.dtype).index_copy(1, rows_N, of_left_SNC)

        holding: dict[str, Callable[..., Any]] = {}
        if first is not None:
            holding = {
                "hold": lambda z_SBC, step: first.hold(z_SBC, grid.times[step]),
                "rounds": lambda step: first.rounds(grid.times[step]),
                "noise_back": lambda later_SBC, before_SBC, step: first.noise_back(
                    later_SBC, before_SBC, grid.times[step + 1], grid.times[step]
                ),
            }
        return (yield from integrate(RULES[self.settings.solver], velocity, noise_SBC, grid.times, **holding))

    def go_on_with(self, samples: Sequence[int]) -> None:
        """Only these rows of the block that is drawn are still asked for; a GPU goes on with all of them."""
        if blocks_for(self.device) is NewBlocks and self.recorder is None:
            self._left = torch.tensor(samples, dtype=torch.long, device=self.device), self._blocks(samples)

    def _guided(self, z_SBC: torch.Tensor, step: int, blocks: _Blocks, index_SB: torch.Tensor | None) -> torch.Tensor:
        settings, batch = self.settings, z_SBC.shape[1]
        if not (blocks.unconditional and settings.guided(self.grid.times[step])):
            return self._evaluate(z_SBC, step, blocks.attention, blocks.context, index_SB)
        v_SRC = self._evaluate(
            _with_copies(z_SBC, blocks.with_context),
            step,
            blocks.attention,
            blocks.guided,
            None if index_SB is None else _with_copies(index_SB, blocks.with_context),
        )
        in_context, alone = v_SRC[:, :batch], v_SRC[:, batch:]
        if blocks.with_context is None:
            return alone + settings.guidance_scale * (in_context - alone)
        apart = in_context[:, blocks.with_context] - alone
        return in_context.index_copy(1, blocks.with_context, alone + settings.guidance_scale * apart)

    def _next_blocks(self) -> _Blocks:
        if self._next is None:
            self._next = self._blocks()
        return self._next

    def _blocks(self, samples: Sequence[int] | None = None) -> _Blocks:
        """Of some rows of the batch; None: of all."""
        size, lengths = self.block_size, self.cache.lengths
        attention: NewBlocks | MaskedBlocks
        if samples is not None:
            attention = NewBlocks(self.cache, size, size, self.device, samples)
            lengths = [lengths[sample] for sample in samples]
        else:
            form = blocks_for(self.device) if self.recorder is None else MaskedBlocks
            attention = form(self.cache, size, size, self.device)
        rows = [row for row, length in enumerate(lengths) if length]
        positions_SB, every = attention.positions_SB, len(rows) == len(lengths)
        with_context = None if every else torch.tensor(rows, dtype=torch.long, device=self.device)
        return _Blocks(
            attention,
            self._context(positions_SB, attention),
            self._context(_with_copies(positions_SB, with_context), attention),
            with_context,
            len(rows),
        )

    def _context(
        self, positions: torch.Tensor, attention: PackedPrompts | NewBlocks | MaskedBlocks
    ) -> AttentionContext:
        context = self.dit.context_at(positions, AttentionMask(), attention)
        return replace(context, rotary=phases(context.rotary))

    def _evaluate(
        self,
        z_SRC: torch.Tensor,
        step: int,
        attention: NewBlocks | MaskedBlocks,
        context: AttentionContext,
        index_SR: torch.Tensor | None,
    ) -> torch.Tensor:
        """`_velocity` of a step of the solver, from a recording where there is a recorder."""
        if self.recorder is None:
            return self._velocity(z_SRC, step, context, index_SR)
        assert isinstance(attention, MaskedBlocks), "`_blocks` makes these where there is a recorder"
        cache = self.cache
        # A recording is of tensors: it ends with the stores that it was made over.
        key = (len(cache.lengths), z_SRC.shape[1], attention.width, cache.allocations)
        if key not in self._recorded:
            self._recorded[key] = RecordedVelocity(
                lambda z_SRC, index_SR, context: self._velocity(z_SRC, 0, context, index_SR),
                attention,
                context,
                z_SRC.shape[-1],
                self.recorder,
            )
        self._recorded[key].move_to(attention, context)
        return self._recorded[key](z_SRC, step if index_SR is None else index_SR)

    def _velocity(
        self, z_SRC: torch.Tensor, row: int, context: AttentionContext, index_SR: torch.Tensor | None = None
    ) -> torch.Tensor:
        """All positions at the time of one row of the grid, or each at that of its own."""
        modulations = self.grid.rows[row] if index_SR is None else self.grid.modulations
        index = None if index_SR is None else TimeRows(index_SR)
        return self.dit(z_SRC, TimeTable(self.grid.times_T, index), context, modulations)


def _with_copies(x_SB: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """The samples, then the copies of some (`rows`) or all of them, along dimension 1."""
    return torch.cat((x_SB, x_SB if rows is None else x_SB[:, rows]), dim=1)


def _row(modulations: Modulations, row: int) -> Modulations:
    return Modulations(
        modulations.silu_time_T1H[row : row + 1],
        tuple(tuple(table[row : row + 1] for table in tables) for tables in modulations.blocks),
        modulations.output[row : row + 1],
    )
