"""Exact and near duplicates: signatures of documents, pairs with the same key, and the copies among them."""

from data_prep.deduplicate.groups import clusters, find_pairs
from data_prep.deduplicate.near import near_copies
from data_prep.deduplicate.signatures import Signatures
from data_prep.deduplicate.sketches import Sketches, similarity

__all__ = ["Signatures", "Sketches", "clusters", "find_pairs", "near_copies", "similarity"]
