"""What the page about a run says of Plaid."""

from cola_megatron.families.page import Page, Words

PAGE = Page(
    networks=(
        Words("plaid", "embeddings and schedule", "what the tokens are as points, how noise is spread, and the way in"),
        Words("transformer", "transformer", "predicts the tokens from their noisy embeddings"),
    ),
    figures=(
        Words("nats_per_token", "held-out bound", "nats per token: -log p of the held-out texts is at most that"),
        Words("perplexity", "  as a perplexity", "its exponential: an upper bound as well"),
        Words("reconstruction_nats_per_token", "  reconstruction", "of it: reading the tokens at the least noise"),
        Words("diffusion_nats_per_token", "  diffusion", "of it: removing the noise, over all its levels"),
        Words("prior_nats_per_token", "  prior", "of it: what the most noise still tells of the text"),
    ),
)
