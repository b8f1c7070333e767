"""What must be there after a power cut."""

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Returns when a file, or the list of names of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
