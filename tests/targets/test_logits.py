"""Targets with a way of their own from the last hidden state to logits: the teacher has it too."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from drafthead.capture.checks import teacher_argmax
from drafthead.head.init import new_head, target_layer
from drafthead.ops.losses import Teacher, fused_loss
from drafthead.recipe import HeadSection
from drafthead.targets import load_target
from drafthead.targets.logits import PLAIN, logit_rule
from tests.reference.plain_loss import plain_loss
from tests.refused import refused
from tests.tiny import OTHER_LOGITS, VOCAB, tiny_other


@pytest.fixture(scope="module", params=list(OTHER_LOGITS))
def folder(request, tmp_path_factory):
    return tiny_other(tmp_path_factory.mktemp(request.param), request.param)


def made(folder):
    """The target, its teacher, last hidden states [20, 64] and transformers' logits of them."""
    target, model = load_target(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    last = {}
    model.model.norm.register_forward_hook(lambda _m, args, _out: last.update(x=args[0][0]))
    with torch.no_grad():
        logits = model(torch.arange(5, 25)[None]).logits[0]
    # What vLLM's head reads: rows as stored, whatever the target multiplies them by.
    assert torch.equal(target.embedding(), model.model.embed_tokens.weight)
    teacher = Teacher(*target.final_norm(), target.lm_head(), target.logits)
    return target, teacher, last["x"], logits


def test_teacher_is_transformers_logits(folder):
    target, teacher, last, logits = made(folder)
    torch.testing.assert_close(teacher.logits(last), logits, rtol=1e-5, atol=1e-5)
    found = teacher_argmax(last, *target.final_norm(), target.lm_head(), target.logits)
    assert torch.equal(found, logits.argmax(-1))
    plain = replace(teacher, norm_weight=target.tensors.tensor("model.norm.weight"), rule=PLAIN)
    assert (plain.logits(last) - logits).abs().max() > 0.1, "nothing here that could be left out"


def test_the_chunked_loss_has_the_same_teacher(folder):
    _, teacher, last, logits = made(folder)
    g = torch.Generator().manual_seed(0)
    normed = torch.randn(2, len(last), 8, generator=g).requires_grad_()
    lm_head = torch.randn(VOCAB, 8, generator=g).requires_grad_()
    arguments = normed, lm_head, last, teacher, logits.argmax(-1), torch.ones(2, len(last))
    fused, _ = fused_loss(*arguments, "kl", chunk_rows=6)
    torch.testing.assert_close(fused, plain_loss(*arguments, "kl")[0])
    p, q = logits.log_softmax(-1), (normed @ lm_head.T).log_softmax(-1)
    loss = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
    torch.testing.assert_close(fused, loss, rtol=1e-4, atol=1e-4)


def test_a_new_head_starts_at_the_targets_temperature(folder):
    target = load_target(folder)
    d2t = torch.zeros(100, dtype=torch.int64)
    head = new_head(HeadSection(), target, (1, 2), d2t, seed=0)
    rows = target.lm_head()[:100] * target.logits.scale
    torch.testing.assert_close(head.lm_head.weight.data, rows)
    torch.testing.assert_close(head.norm.weight.data, target.final_norm()[0])


def test_layers_with_factors_of_their_own_are_no_start(folder):
    with refused("head.layer_from_target"):
        target_layer(load_target(folder))


@pytest.mark.parametrize("value", [0, -1.0, "8", True, None])
def test_a_scale_that_is_none_is_named(value):
    config = SimpleNamespace(model_type="granite", logits_scaling=value)
    with refused("here", "logits_scaling"):
        logit_rule(config, "here")
