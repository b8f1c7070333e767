"""Exact and near duplicates: signatures of documents, pairs with the same key, and the first of each group."""

from data_prep.deduplicate.groups import clusters, find_pairs
from data_prep.deduplicate.signatures import Signatures

__all__ = ["Signatures", "clusters", "find_pairs"]
