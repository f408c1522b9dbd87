"""The timed draft step drafts what the head would."""

import torch

from benchmarks.serve import draft_shapes
from drafthead.head.config import HeadConfig


def test_every_shape_is_a_head_that_drafts():
    for name, config in draft_shapes.shapes(draft_shapes.TINY, tiny=True).items():
        step = draft_shapes.draft_step(config, 16, torch.device("cpu"))
        assert 0 <= int(step()) < config.vocab_size, name
    names = draft_shapes.shapes(draft_shapes.MISSION, tiny=False)
    assert isinstance(names["mission"], HeadConfig)
    assert len(set(names.values())) == len(names), "each shape differs"
