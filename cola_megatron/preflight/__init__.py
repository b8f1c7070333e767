"""Whether these machines can train: what is looked at before a job spends hours on them."""

from cola_megatron.preflight.check import Check, Status

__all__ = ["Check", "Status"]
