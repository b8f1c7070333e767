"""Command-line tools around the library; nothing in `cola_megatron` imports them."""
