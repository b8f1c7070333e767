"""Bytes that autograd keeps of one micro-batch on one rank, part by part, from the forward to its backward pass.

A tensor is counted in the part that makes it; the input of a part belongs to the part before. Left out are tensors
without a width: the statistics of norms, latents of few channels, tables of times, index tensors.

Symbols: e bytes of the compute type; "positions" are sequence times batch times views, over the context-parallel ranks;
a width is divided by the tensor-parallel size where the layer cuts it, positions are divided by it where sequence
parallelism does.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cola_megatron.config import ColaConfig
from cola_megatron.costs.part import FLOAT32, Activations, compute_bytes, exchanged_in_attention
from cola_megatron.costs.traffic import Traffic
from cola_megatron.families.cola.copies import two_copy_positions


@dataclass(frozen=True)
class _MicroBatch:
    """The config in the numbers that the formulas use."""

    config: ColaConfig
    views: int

    @property
    def e(self) -> int:
        return compute_bytes(self.config)

    @property
    def tensor(self) -> int:
        return self.config.parallel.tensor_parallel_size

    @property
    def sequence(self) -> int:
        return self.tensor if self.config.parallel.sequence_parallel else 1

    @property
    def context(self) -> int:
        return self.config.parallel.context_parallel_size

    @property
    def samples(self) -> int:
        return self.config.training.micro_batch_size

    @property
    def text_positions(self) -> int:
        """Latents of all views."""
        return self.config.latent_length // self.context * self.samples * self.views

    @property
    def tokens(self) -> int:
        """Tokens of all views."""
        return self.config.data.sequence_length // self.context * self.samples * self.views

    @property
    def flow_positions(self) -> int:
        """Latents of both copies."""
        return two_copy_positions(self.config) // self.context * self.samples


def part_activations(config: ColaConfig, label: str) -> Activations:
    """Activations of a trained part, by its label; the reference encoder keeps nothing. KeyError: no such part."""
    return _FORMULAS[label](_MicroBatch(config, text_views(config)))


def text_views(config: ColaConfig) -> int:
    """How often the VAE sees each text: as it is, and where there is a mask loss once more with masks."""
    return 2 if config.objective.vae.mask_weight > 0 else 1


def reference_work(config: ColaConfig) -> float:
    """What the reference encoder would keep of the text if it were trained: a measure of its elementwise work."""
    blocks = config.model.vae.encoder_layers * part_activations(config, "vae.encoder.block").kept
    return (blocks + part_activations(config, "vae.encoder.embed").kept) / text_views(config)


def exchanged(config: ColaConfig, label: str) -> Traffic:
    """What the part's attention exchanges over a context; see `Part.exchanged`."""
    micro_batch, vae, dit = _MicroBatch(config, text_views(config)), config.model.vae, config.model.dit
    if label == "dit.block":
        heads, head_dim, positions = dit.num_attention_heads, dit.head_dim, micro_batch.flow_positions
    elif label in ("vae.encoder.block", "vae.decoder.block", "reference"):
        heads, head_dim, positions = vae.num_attention_heads, vae.head_dim, micro_batch.text_positions
    else:
        return Traffic()
    found = exchanged_in_attention(config, positions, heads, heads, head_dim)
    return found * (vae.encoder_layers / micro_batch.views) if label == "reference" else found


def gathered_input(config: ColaConfig, label: str) -> float:
    """Bytes of the input that the part's linear layers gather under sequence parallelism."""
    if not config.parallel.sequence_parallel:
        return 0.0
    micro_batch = _MicroBatch(config, text_views(config))
    if label.startswith("dit."):
        return micro_batch.e * micro_batch.flow_positions * config.model.dit.hidden_size
    return micro_batch.e * micro_batch.text_positions * config.model.vae.hidden_size


def _encoder_embed(m: _MicroBatch) -> Activations:
    width = m.config.model.vae.hidden_size
    output = m.e * m.text_positions * width / m.sequence
    embedded = m.e * m.tokens * width  # what the convolution reads
    return Activations(embedded + output, output, output)


def _text_block(m: _MicroBatch) -> Activations:
    vae = m.config.model.vae
    width, inner, positions = vae.hidden_size, vae.ffn_hidden_size, m.text_positions
    output = m.e * positions * width / m.sequence
    # Post-norm: the sum that the feed-forward reads, what the second norm reads, the output. Pre-norm: what the
    # attention reads, the sum, what the feed-forward reads, the output.
    residual = (3 if vae.post_norm else 4) * output
    feed_forward = m.e * positions * (inner + 2 * (inner // 2)) / m.tensor  # value and gate; silu(gate); their product
    attention = _attention(m, width, positions) + _head_statistics(m, vae.num_attention_heads, positions)
    if vae.query_key_norm:
        attention += 2 * positions * width / m.tensor * _bytes_kept_by_wide_norm(m)
    if 1 < vae.block_size < m.config.latent_length:
        attention += _mask(m, m.config.latent_length)
    temporary = 2 * m.e * positions * inner / m.tensor
    return Activations(residual + attention + feed_forward, output, temporary, recomputable=True)


def _encoder_head(m: _MicroBatch) -> Activations:
    width = m.config.model.vae.hidden_size
    whole = m.e * m.text_positions * width
    # Under tensor parallelism the head reads this rank's channels of the whole sequence, cut out anew.
    return Activations(whole / m.tensor if m.tensor > 1 else 0.0, 0.0, whole)


def _decoder_embed(m: _MicroBatch) -> Activations:
    output = m.e * m.text_positions * m.config.model.vae.hidden_size / m.sequence
    return Activations(output, output, output)


def _decoder_head(m: _MicroBatch) -> Activations:
    width, vocabulary = m.config.model.vae.hidden_size, m.config.model.vocab_size
    gathered = m.e * m.text_positions * width if m.sequence > 1 else 0.0
    unpatched_and_normed = 2 * m.e * m.tokens * width
    rows, chunk = vocabulary / m.tensor, m.config.training.loss_chunk_tokens
    if chunk:
        return _chunked_head(m, gathered + unpatched_and_normed, rows, chunk)
    logits = m.tokens * rows
    # The cross-entropy keeps the softmax; beside it live the logits in the compute type, then their gradient.
    return Activations(gathered + unpatched_and_normed + FLOAT32 * logits, 0.0, m.e * logits)


def _chunked_head(m: _MicroBatch, hidden: float, rows: float, chunk: int) -> Activations:
    """Kept are the gradients of the hidden states and of the head, for each view; the logits of a chunk come and go.

    Beside them: a copy of the head with aligned rows, a view's hidden states in one piece, the sum over chunks in
    float32, and of one chunk the logits and their gradient.
    """
    width = m.config.model.vae.hidden_size
    head, view = rows * width, m.tokens / m.views
    kept = m.views * (m.e * view * width + m.e * head)
    several = view > chunk
    sums = FLOAT32 * head * (2 if several and m.e != FLOAT32 else 1) if several else 0.0
    return Activations(hidden + kept, 0.0, m.e * (head + view * width) + sums + 2 * m.e * min(chunk, view) * rows)


def _time(m: _MicroBatch) -> Activations:
    return Activations(0.0, 0.0, 0.0)


def _flow_embed(m: _MicroBatch) -> Activations:
    output = m.e * m.flow_positions * m.config.model.dit.hidden_size / m.sequence
    mask = _mask(m, two_copy_positions(m.config)) / m.e  # of the whole pass: one byte a pair
    return Activations(output + mask, output + mask, output)


def _flow_block(m: _MicroBatch) -> Activations:
    dit, positions = m.config.model.dit, m.flow_positions
    output = m.e * positions * dit.hidden_size / m.sequence
    # Each branch: the norm, 1 + scale, their modulated product, the gate, the branch, the sum.
    residual = 2 * 6 * output
    attention = _attention(m, dit.num_attention_heads * dit.head_dim, positions)
    attention += _head_statistics(m, dit.num_attention_heads, positions) + _mask(m, two_copy_positions(m.config))
    feed_forward = 2 * m.e * positions * dit.ffn_hidden_size / m.tensor  # before and after the GELU
    temporary = m.e * positions * dit.ffn_hidden_size / m.tensor + 2 * output
    return Activations(residual + attention + feed_forward, output, temporary, recomputable=True)


def _flow_head(m: _MicroBatch) -> Activations:
    width = m.config.model.dit.hidden_size
    local = m.e * m.flow_positions * width / m.sequence
    read = m.e * m.flow_positions * width / m.tensor if m.tensor > 1 else 0.0
    return Activations(3 * local + read, 0.0, local)  # the norm, 1 + scale, their modulated product


def _attention(m: _MicroBatch, inner: int, positions: int) -> float:
    """Projected q, k and v (one tensor), rotated q and k, the product, and its copy in the order of the sequence.

    Over a context v is exchanged with q and k, and so a tensor of its own.
    """
    return m.e * positions * (3 + 2 + 1 + 1 + (m.context > 1)) * inner / m.tensor


def _head_statistics(m: _MicroBatch, heads: int, positions: int) -> float:
    """The log-sum-exp of every query, float32."""
    return FLOAT32 * positions * heads / m.tensor


def _bytes_kept_by_wide_norm(m: _MicroBatch) -> int:
    """Per element of a query/key norm over the whole width: its input; where the width is cut, two float32 steps."""
    if m.tensor == 1:
        return m.e
    return FLOAT32 * (2 if m.config.model.vae.query_key_norm_affine else 1)


def _mask(m: _MicroBatch, length: int) -> float:
    """The mask in the compute type, which every call of the attention product makes for itself."""
    flow = m.config.objective.flow
    masks = m.samples if m.config.stage == 2 and flow.context_dropout > 0 else 1
    return m.e * masks * length * length


_FORMULAS: dict[str, Callable[[_MicroBatch], Activations]] = {
    "vae.encoder.embed": _encoder_embed,
    "vae.encoder.block": _text_block,
    "vae.encoder.head": _encoder_head,
    "reference": _time,
    "dit.time": _time,
    "dit.embed": _flow_embed,
    "dit.block": _flow_block,
    "dit.head": _flow_head,
    "vae.decoder.embed": _decoder_embed,
    "vae.decoder.block": _text_block,
    "vae.decoder.head": _decoder_head,
}
