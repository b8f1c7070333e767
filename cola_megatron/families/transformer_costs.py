"""What the shared transformer costs, counted from the config alone; for every family that has one.

    TransformerCosts(config, config.model.transformer, positions=L, pairs=causal_pairs(L, 1)).parts()          causal
    TransformerCosts(config, config.model.transformer, positions=L, pairs=L * L, extra_rows=1).parts()  bidirectional
    TransformerCosts(config, config.model.transformer, positions=2 * L - b, pairs=two_copy_pairs(L, b), masks=1,
                     head_positions=L).parts()                                                       two copies

A tensor is counted in the part that makes it; the input of a part belongs to the part before. Left out are tensors
without a width, such as the statistics of norms.

Symbols: e bytes of the compute type; positions are those of a micro-batch in this rank's part of the sequence; a width
is divided by the tensor-parallel size where the layer cuts it, positions are divided by it where sequence parallelism
does.
"""

from dataclasses import dataclass

from cola_megatron.config import RunConfig
from cola_megatron.config.transformer import TransformerConfig
from cola_megatron.costs.part import (
    FLOAT32,
    Activations,
    Part,
    RingUnits,
    compute_bytes,
    exchanged_in_attention,
)
from cola_megatron.costs.traffic import Traffic


@dataclass(frozen=True)
class TransformerCosts:
    """One pass of the transformer in a training step; each method is the part of that name."""

    config: RunConfig
    transformer: TransformerConfig
    positions: int
    """That one sample has in the blocks, all its copies and views."""
    pairs: float
    """(query, key) that the mask keeps of one sample; `costs.part.causal_pairs` and `two_copy_pairs` count them."""
    extra_rows: int = 0
    """Rows of the embedding beyond the vocabulary."""
    head_positions: int | None = None
    """Of one sample, those whose logits are computed; None: all."""
    pairs_in_products: float | None = None
    """Pairs that the kernels compute of one sample; None: all of them where there is a mask tensor, else `pairs`."""
    masks: int = 0
    """Mask tensors of a micro-batch: 1 that all its samples share, or one for each; 0 where attention is plainly causal
    or sees everything."""

    def parts(self) -> tuple[Part, ...]:
        """In the order of the chain."""
        return (self.embedding(), *[self.block()] * self.transformer.num_layers, self.head())

    def embedding(self) -> Part:
        """Rows are looked up: no products."""
        hidden, sequence = self._hidden, self.config.parallel.sequence_parallel
        output = hidden / self._sequence
        mask = self.masks * self.positions**2  # one byte a pair, for the whole pass
        rows = self.config.model.vocab_size + self.extra_rows
        return Part(
            "transformer.embed",
            rows * self.transformer.hidden_size,
            0,
            0.0,
            largest_matrix=rows * self.transformer.hidden_size / self._ranks,
            activations=Activations(output + mask, output + mask, hidden),
            # The sum over the ranks of what each has looked up; under sequence parallelism each keeps its part of it.
            ring_units=RingUnits(Traffic(2 * hidden, 1), Traffic(sequence * hidden, sequence)),
        )

    def block(self) -> Part:
        """One layer."""
        transformer = self.transformer
        width, inner = transformer.hidden_size, transformer.ffn_hidden_size
        attention, shared = self._attention_width, self._shared_width
        matrices = width * (attention + 2 * shared) + attention * width
        feed_forward = 3 * width * inner
        return Part(
            "transformer.block",
            matrices + feed_forward + 2 * width,
            2 * width,
            self.positions * (matrices + feed_forward),
            2 * attention * self.pairs,
            self.positions * feed_forward,
            computed_pairs=self._computed_pairs,
            layer_matrices=(
                (attention, width),
                *[(shared, width)] * 2,
                (width, attention),
                *[(inner, width)] * 2,
                (width, inner),
            ),
            largest_matrix=2 * width * inner / self._ranks,
            gathered_input=self._hidden if self.config.parallel.sequence_parallel else 0.0,
            activations=self._block_activations(),
            ring_units=self._block_ring_units(),
            exchanged=exchanged_in_attention(
                self.config,
                self._all_positions,
                transformer.num_attention_heads,
                transformer.key_value_heads,
                transformer.head_dim,
            ),
        )

    def head(self) -> Part:
        """The last norm and the vocabulary, with the loss."""
        width, vocabulary = self.transformer.hidden_size, self.config.model.vocab_size
        positions = self.positions if self.head_positions is None else self.head_positions
        sequence = self.config.parallel.sequence_parallel
        return Part(
            "transformer.head",
            (vocabulary + 1) * width,
            width,
            positions * width * vocabulary,
            largest_matrix=vocabulary * width / self._ranks,
            activations=self._head_activations(positions),
            # Forward the cross-entropy's three sums, of a number for each token; backward the gradient of its input.
            ring_units=RingUnits(Traffic(sequence * self._hidden, 3 + sequence), Traffic(2 * self._hidden, 1)),
        )

    @property
    def _computed_pairs(self) -> float:
        if self.pairs_in_products is not None:
            return self.pairs_in_products / self.pairs
        return self.positions**2 / self.pairs if self.masks else 1.0

    @property
    def _e(self) -> int:
        return compute_bytes(self.config)

    @property
    def _ranks(self) -> int:
        return self.config.parallel.tensor_parallel_size

    @property
    def _sequence(self) -> int:
        """What divides positions between the layers."""
        return self._ranks if self.config.parallel.sequence_parallel else 1

    @property
    def _context(self) -> int:
        return self.config.parallel.context_parallel_size

    @property
    def _all_positions(self) -> int:
        return self.positions * self.config.training.micro_batch_size // self._context

    @property
    def _hidden(self) -> float:
        """Bytes of whole hidden states."""
        return self._e * self._all_positions * self.transformer.hidden_size

    @property
    def _attention_width(self) -> int:
        return self.transformer.num_attention_heads * self.transformer.head_dim

    @property
    def _shared_width(self) -> int:
        return self.transformer.key_value_heads * self.transformer.head_dim

    def _block_activations(self) -> Activations:
        transformer, positions = self.transformer, self._all_positions
        attention, shared, inner = self._attention_width, self._shared_width, transformer.ffn_hidden_size
        output = self._hidden / self._sequence
        # Both norms' outputs, the sum between the branches, the output.
        residual = 4 * output
        # Projected queries, keys and values (one tensor), rotated queries and keys, the product, and its copy in the
        # order of the sequence; over a context also the values, which are exchanged with the others.
        own = attention + 2 * shared + attention + shared + 2 * attention + (shared if self._context > 1 else 0)
        products = self._e * positions * own / self._ranks
        statistics = FLOAT32 * positions * transformer.num_attention_heads / self._ranks  # log-sum-exp of each query
        # In the compute type, made by every call of the product; grouped queries have it once for each of a group.
        group = transformer.num_attention_heads // transformer.key_value_heads
        mask = self._e * self.masks * group * self.positions**2
        feed_forward = self._e * positions * 4 * inner / self._ranks  # value and gate, silu(gate), their product
        return Activations(
            residual + products + statistics + mask + feed_forward,
            output,
            4 * self._e * positions * inner / self._ranks,
            recomputable=True,
        )

    def _block_ring_units(self) -> RingUnits:
        """Two branches: in each the input is gathered and the output summed.

        Under sequence parallelism inputs are gathered once more for the gradients of the weights, and a sum is a gather
        and a scatter.
        """
        if self.config.parallel.sequence_parallel:
            return RingUnits(Traffic(4 * self._hidden, 4), Traffic(6 * self._hidden, 6))
        return RingUnits(Traffic(4 * self._hidden, 2), Traffic(4 * self._hidden, 2))

    def _head_activations(self, positions: int) -> Activations:
        width, rows = self.transformer.hidden_size, self.config.model.vocab_size / self._ranks
        tokens = positions * self.config.training.micro_batch_size // self._context
        chunk = self.config.training.loss_chunk_tokens
        # The norm's output; under sequence parallelism also gathered.
        normed = self._hidden / self._sequence
        gathered = self._hidden if self._sequence > 1 else 0.0
        if not chunk:
            logits = tokens * rows
            # The cross-entropy keeps the softmax; beside it live the logits in the compute type, then their gradient.
            return Activations(normed + gathered + FLOAT32 * logits, 0.0, self._e * logits)
        # Kept are the gradients of hidden states and head. Beside them: a copy of the head with aligned rows, the sum
        # over chunks in float32, and of one chunk the logits and their gradient.
        head, hidden = rows * width, tokens * width
        several = tokens > chunk
        sums = FLOAT32 * head * (2 if several and self._e != FLOAT32 else 1) if several else 0.0
        temporary = self._e * (head + hidden) + sums + 2 * self._e * min(chunk, tokens) * rows
        return Activations(normed + gathered + self._e * (hidden + head), 0.0, temporary)
