"""One evaluation of the velocity, recorded once and replayed: CUDA graphs for the solver's steps.

At small batches a GPU computes a step faster than Python can launch its kernels. A graph launches all of them at once.
It holds for one number of rows and one width of the cache, so that it serves all steps of many blocks; what differs
between steps and blocks is copied into the tensors that it was recorded with.

**Not measured, and not run on a GPU so far**, hence off unless asked for. Its logic is tested on a CPU with a recorder
that traces the operations (`tests/test_inference_graphs.py`), its equality and its speed on a GPU by
`python -m tools.gpu_check --only generate`.

Shapes: S latents of one block, R rows of a pass, C latent channels.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from cola_megatron.inference.cached_attention import MaskedBlocks
from cola_megatron.inference.fast_forward import phases
from cola_megatron.layers.attention import AttentionContext

Recorder = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], object], torch.Tensor]]
"""Runs a function once -> (what repeats its operations on the same tensors, the tensor that the result appears in)."""


def record_on_cuda(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
    """A CUDA graph of `run`, after the warm-up on a side stream that torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph.replay, output


def compiled(record: "Recorder | None" = None) -> "Recorder":
    """A recorder of `torch.compile`d evaluations: the operations between two products become few kernels.

    Compiling takes half a minute to minutes, once for each number of rows and width of the cache. On a CPU it gains
    nothing, because compiled steps are without packed matrices (`fast_forward.py`).

    Args:
        record: records what was compiled, such as `record_on_cuda`; None: it is called anew every time.
    """

    def record_compiled(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        # Every recording has tensors of its own: none may be turned away for being one too many.
        with torch._dynamo.config.patch(recompile_limit=64):
            fast = torch.compile(run, dynamic=False)
            output = fast().clone()
        if record is not None:
            return record(fast)
        return lambda: output.copy_(fast()), output

    return record_compiled


class RecordedVelocity:
    """The velocity at the next block of every sample, for one number of rows and one width.

    Args:
        velocity: (z (S, R, C), rows of the time table (S, R), context) -> v (S, R, C).
        attention: the first blocks that it is for; its tensors become those of the recording.
        context: of `attention`, with phases as its rotary table.
    """

    def __init__(
        self,
        velocity: Callable[[torch.Tensor, torch.Tensor, AttentionContext], torch.Tensor],
        attention: MaskedBlocks,
        context: AttentionContext,
        channels: int,
        record: Recorder = record_on_cuda,
    ):
        self.phases = phases(context.rotary).clone()
        self.attention, self.context = attention, replace(context, rotary=self.phases)
        size, rows = self.phases.shape[:2]
        self.z_SRC = torch.zeros(size, rows, channels, device=self.phases.device)
        self.index_SR = torch.zeros(size, rows, dtype=torch.long, device=self.phases.device)
        self._placed = attention
        self._replay, self._v_SRC = record(lambda: velocity(self.z_SRC, self.index_SR, self.context))

    def move_to(self, attention: MaskedBlocks, context: AttentionContext) -> None:
        """Goes on to these blocks, where it is not there already."""
        if attention is self._placed:
            return
        self._placed = attention
        self.attention.positions_SB.copy_(attention.positions_SB)
        self.attention.visible_B1SK.copy_(attention.visible_B1SK)
        self.phases.copy_(phases(context.rotary))

    def __call__(self, z_SRC: torch.Tensor, index_SR: torch.Tensor | int) -> torch.Tensor:
        """v (S, R, C) at these rows of the time table."""
        self.z_SRC.copy_(z_SRC)
        if isinstance(index_SR, int):
            self.index_SR.fill_(index_SR)
        else:
            self.index_SR.copy_(index_SR)
        self._replay()
        return self._v_SRC.clone()
