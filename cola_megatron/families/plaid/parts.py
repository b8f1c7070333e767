"""What Plaid's steps cost, in the order of its chain; the transformer's by `families/transformer_costs.py`.

The pass that makes first estimates is one forward pass more of its share of the samples. Left out are tensors of a few
channels, and the lookup of embeddings.
"""

from dataclasses import replace

from cola_megatron.config.plaid import PlaidConfig
from cola_megatron.costs.part import FLOAT32, Activations, Part, RingUnits, compute_bytes
from cola_megatron.costs.traffic import Traffic
from cola_megatron.families.transformer_costs import TransformerCosts


def chain_parts(config: PlaidConfig) -> tuple[Part, ...]:
    """Embeddings, schedule, input, blocks and head."""
    length, share = config.data.sequence_length, config.objective.self_conditioning
    # A cut sample has a mask, and its micro-batch with it; but such are few.
    masks = config.training.micro_batch_size if config.data.document_attention else 0
    costs = TransformerCosts(config, config.model.transformer, length, pairs=length**2, masks=masks)
    twice = [_input(config, masks), *[costs.block()] * config.model.transformer.num_layers, _head(config, costs.head())]
    return (
        _embeddings(config),
        _schedule(config),
        *(
            replace(
                part,
                extra_forwards=share,
                ring_units=RingUnits(part.ring_units.forward * (1 + share), part.ring_units.backward),
            )
            for part in twice
        ),
    )


def _embeddings(config: PlaidConfig) -> Part:
    elements = config.model.vocab_size * config.model.diffusion.embedding_dim
    own = elements / config.parallel.tensor_parallel_size
    # The rows of length 1 and what their norm keeps, float32.
    activations = Activations(2 * FLOAT32 * own, FLOAT32 * own, FLOAT32 * own)
    return Part("plaid.embeddings", elements, 0, 0.0, largest_matrix=own, activations=activations)


def _schedule(config: PlaidConfig) -> Part:
    parameters = 3 * config.model.diffusion.schedule_hidden_size + 2
    return Part("plaid.schedule", parameters, parameters, 0.0)


def _input(config: PlaidConfig, masks: int) -> Part:
    diffusion, width, length = config.model.diffusion, config.model.transformer.hidden_size, config.data.sequence_length
    states = 2 if config.objective.self_conditioning else 1  # z_t, and the first estimate
    ranks, micro_batch = config.parallel.tensor_parallel_size, config.training.micro_batch_size
    hidden = compute_bytes(config) * length // config.parallel.context_parallel_size * micro_batch * width
    output = hidden / (ranks if config.parallel.sequence_parallel else 1) + masks * length**2  # one byte a pair
    return Part(
        "plaid.input",
        (states * diffusion.embedding_dim + diffusion.gamma_features) * width,
        0,
        (states * length * diffusion.embedding_dim + diffusion.gamma_features) * width,
        largest_matrix=diffusion.gamma_features * width / ranks,
        activations=Activations(output, output, states * hidden),
        # Each map's rows are gathered; under sequence parallelism so is the gradient of their sum.
        ring_units=RingUnits(
            Traffic(states * hidden, states + 1),
            Traffic(config.parallel.sequence_parallel * hidden, config.parallel.sequence_parallel),
        ),
    )


def _head(config: PlaidConfig, head: Part) -> Part:
    """With the output prior and the mean embedding: two products of the vocabulary with the embeddings."""
    vocabulary, channels = config.model.vocab_size, config.model.diffusion.embedding_dim
    length, width = config.data.sequence_length, config.model.transformer.hidden_size
    tokens = length // config.parallel.context_parallel_size * config.training.micro_batch_size
    e = compute_bytes(config)
    ranks, sequence = config.parallel.tensor_parallel_size, config.parallel.sequence_parallel
    chunk = config.training.loss_chunk_tokens
    at_once = min(chunk, tokens) if chunk else tokens
    hidden = e * tokens * width
    normed = hidden / ranks + hidden if sequence else hidden
    logits = at_once * vocabulary / ranks
    # Kept are the weights exp(l - max) in float32; the logits of a chunk are computed again. Beside them at the worst
    # moment: the network's logits, their float32 sum with the output prior, and its gradient.
    several = chunk and tokens > chunk
    kept, beside = (0.0, FLOAT32 * logits) if several else (FLOAT32 * logits, 0.0)
    return replace(
        head,
        matrix_macs=head.matrix_macs + 2 * length * vocabulary * channels,
        recomputes=bool(several),
        activations=Activations(normed + kept, 0.0, beside + (e + 2 * FLOAT32) * logits),
    )
