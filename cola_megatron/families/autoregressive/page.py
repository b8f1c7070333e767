"""What the page about a run says of an autoregressive model."""

from cola_megatron.families.page import Page, Words

PAGE = Page(
    networks=(
        Words("transformer.embed", "token embedding", "one row for each token"),
        Words("transformer.block", "transformer blocks", "causal attention and SwiGLU, one after the other"),
        Words("transformer.head", "output head", "from the last hidden state to the logits of the next token"),
    ),
    figures=(
        Words("nats_per_token", "held-out loss", "nats per token, exact; the first token of a sequence does not count"),
        Words("perplexity", "held-out perplexity", "exp of it: as if so many tokens were equally likely"),
        Words("next_token_accuracy", "held-out accuracy", "share of tokens that were the most likely ones"),
    ),
)
