"""cola_megatron: distributed pretraining of continuous latent diffusion language models."""

__version__ = "0.1.0"

__all__ = ["ColaDLM"]


def __getattr__(name: str):
    """`ColaDLM` is imported on first use: the command line must not wait for torch to answer --help."""
    if name == "ColaDLM":
        from cola_megatron.interface import ColaDLM

        return ColaDLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
