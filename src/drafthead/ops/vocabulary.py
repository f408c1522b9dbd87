"""Token ids of the target and of the draft vocabulary."""

import torch
from torch import Tensor


def draft_ids(target_ids: Tensor, vocab_size: int) -> Tensor:
    """Target ids of the draft vocabulary int [Vd] -> draft id of each target id, or -1: int [V]."""
    ids = torch.full((vocab_size,), -1, dtype=torch.int64)
    ids[target_ids.cpu()] = torch.arange(len(target_ids))
    return ids
