"""A head with fewer tokens to draft: fewer rows to read at every draft step, no training."""

from dataclasses import replace

import torch
from torch import Tensor

from drafthead.errors import DraftheadError
from drafthead.head.model import Eagle3Head


def keep_tokens(head: Eagle3Head, kept: Tensor) -> Eagle3Head:
    """The same head, drafting only some of its tokens.

    Args:
        head: the head; it stays as it is, its other tensors are shared.
        kept: target ids int64 [n], in any order.

    Raises:
        DraftheadError: an id that the head cannot draft.
    """
    kept = kept.sort().values.to(head.d2t.device)
    row = torch.full((head.config.vocab_size,), -1, device=kept.device)
    row[head.target_ids()] = torch.arange(len(head.d2t), device=kept.device)
    rows = row[kept]
    if (rows < 0).any():
        raise DraftheadError(f"token {int(kept[rows < 0][0])} is outside the draft vocabulary")
    with torch.device("meta"):
        small = Eagle3Head(replace(head.config, draft_vocab_size=len(kept)))
    state = head.state_dict()
    t2d = torch.zeros_like(state["t2d"])
    t2d[kept] = True
    state |= {
        "lm_head.weight": state["lm_head.weight"][rows],
        "d2t": kept - torch.arange(len(kept), device=kept.device),
        "t2d": t2d,
    }
    small.load_state_dict(state, assign=True)
    small.inv_freq_bits = head.inv_freq_bits
    return small
