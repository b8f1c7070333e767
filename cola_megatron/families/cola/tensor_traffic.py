"""What each part of Cola DLM sends between tensor-parallel ranks."""

from cola_megatron.config import ColaConfig
from cola_megatron.costs.part import compute_bytes
from cola_megatron.costs.traffic import Traffic
from cola_megatron.families.cola.activations import text_views
from cola_megatron.families.cola.copies import distinct_times, two_copy_positions


def ring_units(config: ColaConfig, label: str) -> tuple[Traffic, Traffic]:
    """Forward and backward: bytes of whole tensors that are gathered or scattered, an all-reduce counted twice."""
    vae, dit, sequence = config.model.vae, config.model.dit, config.parallel.sequence_parallel
    e, samples, views = compute_bytes(config), config.training.micro_batch_size, text_views(config)
    context = config.parallel.context_parallel_size
    latents = e * samples * views * config.latent_length // context * vae.hidden_size
    tokens = latents * vae.patch_size
    flow = e * samples * two_copy_positions(config) // context * dit.hidden_size
    table = e * (1 + samples * distinct_times(config)) * dit.hidden_size  # one row for each distinct time
    # A block has two branches: in each the input is gathered and the output summed. Under sequence parallelism the
    # inputs are gathered once more for the gradients of the weights, and a sum is a gather and a scatter.
    block, transfers = ((4, 6), (4, 6)) if sequence else ((4, 4), (2, 2))
    norms = 4 if vae.query_key_norm else 0
    if label in ("vae.encoder.block", "vae.decoder.block"):
        return Traffic(block[0] * latents, transfers[0] + norms), Traffic(block[1] * latents, transfers[1] + norms)
    if label == "dit.block":
        forward = Traffic(block[0] * flow + 6 * table, transfers[0] + 4)
        backward = Traffic(block[1] * flow + (20 if sequence else 8) * table, transfers[1] + (8 if sequence else 4))
        return forward, backward
    if label == "reference":
        blocks = Traffic(block[0] * latents / views, transfers[0] + norms) * vae.encoder_layers
        return blocks + Traffic(3 * tokens / views, 3), Traffic()
    units = {
        "vae.encoder.embed": (Traffic(2 * tokens + latents, 2), Traffic(2 * tokens + sequence * latents, 2)),
        "vae.encoder.head": (Traffic(sequence * latents, 2), Traffic(latents, 1)),
        "dit.time": (Traffic(3 * table, 3), Traffic(4 * table, 2)),
        "dit.embed": (Traffic(flow, 1), Traffic(sequence * flow, 1)),
        "dit.head": (Traffic(sequence * flow + 2 * table, 3), Traffic(flow + 2 * table, 2)),
        "vae.decoder.embed": (Traffic(latents, 1), Traffic(sequence * latents, 1)),
        "vae.decoder.head": (Traffic(sequence * latents + tokens, 4), Traffic(2 * latents + 2 * tokens, 2)),
    }
    return units[label]
