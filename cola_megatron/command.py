"""The `cola` command, and what makes `launchers`, `data_prep` and `slurm` importable wherever this is installed.

In a checkout they lie beside this package. In a wheel they lie inside it, in `programs`: names as general as these do
not belong among the packages of others. Importing this module puts that folder first on the path of this process.
"""

import sys
from pathlib import Path

__all__ = ["main"]

PROGRAMS = Path(__file__).parent / "programs"

if PROGRAMS.is_dir() and str(PROGRAMS) not in sys.path:
    sys.path.insert(0, str(PROGRAMS))


def main() -> None:
    """Entry point of the console script."""
    from launchers.cli import main as run

    run()
