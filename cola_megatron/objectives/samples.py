"""What training knows of one sample beside its random draws: its tokens, which of them count, where documents end.

Shapes: B batch, L tokens, S latents, P tokens per latent.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cola_megatron.config import ColaConfig


def positions(tokens_L: NDArray[Any], padding_id: int, end_of_text_id: int) -> dict[str, NDArray[Any]]:
    """`tokens`; `counted`: False for padding; `documents`: the number, from 0, of the document of each token.

    All are (L,). A document ends with its end-of-text token; padding belongs to none of them.
    """
    ends = tokens_L == end_of_text_id
    counted = tokens_L != padding_id
    documents = np.cumsum(ends) - ends
    return {"tokens": tokens_L, "counted": counted, "documents": np.where(counted, documents, -1)}


def latent_positions(batch: Mapping[str, torch.Tensor], config: ColaConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of the latents of a batch: whether they count, (S, B), and where attention asks for it their document, (B, S)."""
    patch_size, by_document = config.model.vae.patch_size, config.data.document_attention
    documents_BS = latents_to_documents(batch["documents"], patch_size) if by_document else None
    return latents_that_count(batch["counted"], patch_size).t(), documents_BS


def latents_that_count(counted_BL: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, L) -> (B, S): a latent counts if any of its tokens does."""
    patches_BSP: torch.Tensor = counted_BL.unflatten(1, (-1, patch_size))
    return patches_BSP.any(-1)


def latents_to_documents(documents_BL: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, L) -> (B, S): a latent over the end of a document belongs to that one."""
    return documents_BL[:, ::patch_size]
