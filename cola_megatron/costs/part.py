"""One step that holds parameters, and everything that it costs, counted from the config alone."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from cola_megatron.config import RunConfig
from cola_megatron.costs.traffic import Traffic

FLOAT32 = 4
MATRIX_PASSES, ATTENTION_PASSES = 3.0, 3.5
"""Products forward and backward against forward alone; fused attention computes its scores once more."""


def compute_bytes(config: RunConfig) -> int:
    """Bytes of a number of the compute type."""
    return 2 if config.training.precision == "bf16" else FLOAT32


@dataclass(frozen=True)
class Activations:
    """Bytes of one part for one micro-batch on one rank."""

    kept: float = 0.0
    """From its forward to its backward pass, without recomputation."""
    output: float = 0.0
    """Of `kept`, what remains when the part is recomputed: what the next part reads."""
    temporary: float = 0.0
    """On top of `kept` at the worst moment of its own forward or backward pass."""
    recomputable: bool = False
    """Whether `training.activation_checkpointing` applies to the part."""
    elementwise: float | None = None
    """What its elementwise work is a multiple of; None: what it keeps."""


@dataclass(frozen=True)
class RingUnits:
    """Bytes of whole tensors that a part gathers or scatters over tensor-parallel ranks, an all-reduce counted twice.

    Of one micro-batch; with n ranks each sends (n - 1) / n of them.
    """

    forward: Traffic = field(default_factory=Traffic)
    backward: Traffic = field(default_factory=Traffic)


@dataclass(frozen=True)
class Part:
    """One step that holds parameters, in the order in which training runs them.

    Parameters and multiply-adds are of the whole model and depend on no layout; bytes are of one rank under the
    config's layout.
    """

    label: str
    """Part of the model, as in `dit.block`; repeated blocks share it. It is the label of the model's own step."""
    parameters: int
    """Of the whole model."""
    uncut: int
    """Those of them that tensor parallelism leaves whole on every rank."""
    matrix_macs: float
    """Multiply-adds of the matrix products in one forward pass of one sample, all its views."""
    attention_macs: float = 0.0
    """Multiply-adds of the attention pairs that the mask keeps, likewise."""
    feed_forward_macs: float = 0.0
    """Those of `matrix_macs` that a block spends in its feed-forward."""
    modulation_macs: float = 0.0
    """Those of `matrix_macs` that a block spends in AdaLN."""
    forward: bool = True
    """False: the part does not run in this kind of step."""
    backward: bool = True
    """False: forward only, without gradients."""
    extra_forwards: float = 0.0
    """Forward passes without gradients beside that one, for the average sample."""
    recomputes: bool = False
    """Its backward pass runs the forward pass again, whatever `training.activation_checkpointing` says."""
    computed_pairs: float = 1.0
    """Attention pairs that the kernel computes over those that the mask keeps: with a mask tensor it skips none."""
    layer_matrices: tuple[tuple[int, int], ...] = ()
    """Shapes of the matrices that Muon updates where it is chosen, fused projections apart; tensor parallelism cuts all
    of them."""
    largest_matrix: float = 0.0
    """Elements of its largest matrix on one rank."""
    gathered_input: float = 0.0
    """Bytes of the largest input that a linear layer gathers under sequence parallelism."""
    activations: Activations = field(default_factory=Activations)
    ring_units: RingUnits = field(default_factory=RingUnits)
    exchanged: Traffic = field(default_factory=Traffic)
    """Queries, keys, values and outputs of this rank's positions, which context-parallel ranks exchange in one forward
    pass of a micro-batch."""

    @property
    def network(self) -> str:
        """The network that it belongs to, whose optimiser groups are its own: the first word of its label."""
        return self.label.split(".")[0]

    @property
    def layer_parameters(self) -> int:
        """Parameters in `layer_matrices`."""
        return sum(rows * columns for rows, columns in self.layer_matrices)

    @property
    def newton_schulz_flops(self) -> float:
        """FLOPs of Muon's iteration over `layer_matrices`: x x^T, its square, and a product with x, five times."""
        sides = [sorted(shape) for shape in self.layer_matrices]
        return sum(5 * (4.0 * short**2 * long + 2.0 * short**3) for short, long in sides)

    @property
    def is_block(self) -> bool:
        """Whether it is one of the layers that are recomputed and compiled."""
        return self.label.endswith("block")

    def parameters_on_rank(self, tensor_parallel_size: int) -> float:
        """Parameters of this part on one tensor-parallel rank (padding of the vocabulary left out)."""
        return self.uncut + (self.parameters - self.uncut) / tensor_parallel_size

    @property
    def macs(self) -> float:
        """Multiply-adds of one forward pass of one sample."""
        return (self.matrix_macs + self.attention_macs) if self.forward else 0.0

    @property
    def flops(self) -> float:
        """Training FLOPs of one sample: two per multiply-add, backward twice the forward."""
        return 2.0 * self.macs * ((MATRIX_PASSES if self.backward else 1.0) + self.extra_forwards)

    def runs_again(self, config: RunConfig) -> bool:
        """Whether the backward pass runs the forward pass once more."""
        checkpointed = config.training.activation_checkpointing and self.activations.recomputable
        return self.backward and (self.recomputes or checkpointed)

    def hardware_flops(self, config: RunConfig) -> float:
        """FLOPs of one sample in training with what is computed again, and all pairs that the kernels compute."""
        if not self.forward:
            return 0.0
        forwards = 1.0 + self.extra_forwards + self.runs_again(config)
        matrix, attention = (self.backward * (passes - 1.0) + forwards for passes in (MATRIX_PASSES, ATTENTION_PASSES))
        return 2.0 * (self.matrix_macs * matrix + self.attention_macs * self.computed_pairs * attention)


def causal_pairs(length: int, block_size: int) -> float:
    """Pairs (query, key) that block-causal attention keeps; a block of the whole length: all of them."""
    blocks = length / block_size
    return block_size * block_size * blocks * (blocks + 1) / 2


def two_copy_pairs(length: int, block_size: int) -> float:
    """Pairs kept over `[clean copy | noisy copy]`: clean to clean, noisy to earlier clean, noisy to its own block."""
    blocks = length // block_size
    noisy_blocks = blocks * (blocks - 1) / 2 + blocks
    return causal_pairs(length - block_size, block_size) + block_size * block_size * noisy_blocks


def pairs_in_products(length: int, block_size: int, chunk: int) -> float:
    """Pairs in the products over `[clean copy | noisy copy]`: of all positions, or of `two_copies_in_chunks`."""
    clean_length = length - block_size
    if not chunk:
        return float((clean_length + length) ** 2)
    size = -(-chunk // block_size) * block_size
    of_clean = [(min(start + size, clean_length), start) for start in range(0, clean_length, size)]
    of_noisy = [(min(start + size, length), start) for start in range(0, length, size)]
    return float(
        sum((end - start) * end for end, start in of_clean)
        + sum((end - start) * (min(end, clean_length) + end - start) for end, start in of_noisy)
    )


def exchanged_in_attention(config: RunConfig, positions: int, heads: int, shared: int, head_dim: int) -> Traffic:
    """`Part.exchanged` of one attention.

    Args:
        positions: of a micro-batch on this rank.
        heads: of queries.
        shared: of keys and values; where they are fewer than ranks they are repeated.
    """
    tensor, context = config.parallel.tensor_parallel_size, config.parallel.context_parallel_size
    if context == 1:
        return Traffic()
    width = 2 * heads / tensor + 2 * max(shared / tensor, context)
    return Traffic(compute_bytes(config) * positions * width * head_dim, 2)


def largest_gathered_input(parts: Iterable[Part]) -> float:
    """Bytes of megatron-core's one buffer into which a linear layer gathers its input under sequence parallelism."""
    return max((part.gathered_input for part in parts), default=0.0)
