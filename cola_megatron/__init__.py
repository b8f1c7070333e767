"""cola_megatron: distributed pretraining of continuous latent diffusion language models."""

__version__ = "0.1.0"

__all__ = ["ColaDLM", "load_model"]


def __getattr__(name: str):
    """They are imported on first use: the command line must not wait for torch to answer --help."""
    if name in __all__:
        from cola_megatron import interface

        return getattr(interface, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
