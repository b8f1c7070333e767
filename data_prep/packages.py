"""Packages of the `prep` extra, asked for where they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from data_prep.errors import DataPrepError

__all__ = ["require"]


def require(package: str, why: str) -> ModuleType:
    """Imports a package that not every installation has.

    Raises:
        DataPrepError: it is not installed; says how to get it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise DataPrepError(f"{package} is not installed, and {why}: make setup EXTRAS=prep") from error
