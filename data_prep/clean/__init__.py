"""Rules that repair, keep or remove documents."""

from data_prep.clean.cleaner import Cleaner
from data_prep.clean.rules import Removed

__all__ = ["Cleaner", "Removed"]
