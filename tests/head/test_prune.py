"""A head with fewer tokens drafts what the whole one would, were the others forbidden."""

import pytest
import torch

from drafthead.errors import DraftheadError
from drafthead.head.config import HeadConfig
from drafthead.head.model import Eagle3Head
from drafthead.head.prune import keep_tokens

CONFIG = HeadConfig(
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    vocab_size=90,
    draft_vocab_size=40,
    target_hidden_size=32,
    aux_layer_ids=(1, 2, 3),
    max_position_embeddings=64,
    rope_theta=1e4,
)


def test_the_rows_of_the_kept_tokens_stay():
    torch.manual_seed(0)
    head = Eagle3Head(CONFIG)
    ids = torch.randperm(90)[:40].sort().values
    head.set_vocab(ids - torch.arange(40))
    kept = ids[torch.randperm(40)[:15]]
    small = keep_tokens(head, kept)
    assert small.target_ids().tolist() == sorted(kept.tolist())
    assert small.t2d.nonzero().flatten().tolist() == sorted(kept.tolist())
    assert small.config.draft_vocab_size == 15
    normed = torch.randn(7, 32)
    allowed = torch.isin(ids, kept)
    whole = head.logits(normed)[:, allowed]
    assert torch.equal(small.logits(normed), whole)
    for one, other in zip(
        small.rotary(torch.arange(4), torch.float32),
        head.rotary(torch.arange(4), torch.float32),
        strict=True,
    ):
        assert torch.equal(one, other)
    outside = next(i for i in range(90) if i not in set(ids.tolist()))
    with pytest.raises(DraftheadError, match=f"token {outside} is outside"):
        keep_tokens(head, torch.tensor([int(ids[0]), outside]))
