"""Random samples of a state store."""

import torch

from drafthead.states import Sample


def sample(length, prompt_len, name="a", seed=0, states=None, mask=None):
    g = torch.Generator().manual_seed(seed)
    loss_mask = torch.arange(length) >= prompt_len if mask is None else torch.tensor(mask)
    return Sample(
        ids=torch.randint(0, 50, (length,), generator=g, dtype=torch.int32),
        loss_mask=loss_mask,
        states=torch.randn(states or length - 1, 3, 4, generator=g),
        num_aux=2,
        prompt_len=prompt_len,
        conversation=name,
        split="train",
    )
