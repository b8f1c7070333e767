"""safetensors files as other people can read them."""

from pathlib import Path

import torch
from safetensors.torch import save_file


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a safetensors file with the permissions of any other file (the library gives them to the owner alone)."""
    save_file(tensors, path, metadata={"format": "pt"})
    sibling = path.with_name(f".{path.name}.mode")
    sibling.touch()
    path.chmod(sibling.stat().st_mode)  # what the process's umask gives, without changing the umask to read it
    sibling.unlink()
