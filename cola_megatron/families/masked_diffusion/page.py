"""What the page about a run says of masked diffusion."""

from cola_megatron.families.page import Page, Words

TIME_BINS = 10
"""Equal bins of the share of masked tokens over (0, 1]: their numbers are in the names of metrics."""
_BIN = "mean cross-entropy in nats of the masked tokens where so many of a block's are"

PAGE = Page(
    networks=(Words("transformer", "transformer", "predicts the masked tokens from the others"),),
    figures=(
        Words("nats_per_token", "held-out bound", "nats per token: -log p of the held-out texts is at most that"),
        Words("perplexity", "  as a perplexity", "its exponential: an upper bound as well"),
        *(
            Words(f"masked_nll_bin_{index}", f"  {10 * index} to {10 * index + 10}% masked", _BIN)
            for index in range(TIME_BINS)
        ),
    ),
)
