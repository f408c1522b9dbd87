"""A DSpark head's drafts by one kernel each, against vLLM's own loop."""

from types import SimpleNamespace

import pytest
import torch
from vllm.triton_utils import HAS_TRITON

from drafthead.vllm_plugin import markov_chain
from drafthead.vllm_plugin.patch import original

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with_triton = pytest.mark.skipif(not HAS_TRITON, reason="see test_greedy_verify.py")
VOCAB, HIDDEN, RANK, K = 700, 24, 48, 3


def _drafter(requests: int, ids: int, dtype: torch.dtype):
    """What vLLM's speculator and model have to draft with; logits of few values, so that many are
    alike."""
    generator = torch.Generator().manual_seed(requests + ids)

    def numbers(*shape):
        return (torch.randint(-2, 3, shape, generator=generator) / 2).to(DEVICE, dtype)

    offsets = None
    if ids < VOCAB:
        chosen = torch.randperm(VOCAB, generator=generator)[:ids].sort().values
        offsets = (chosen - torch.arange(ids)).to(DEVICE)
    # vLLM pads the rows; what lies there must not be drafted.
    projection = torch.cat([numbers(ids, RANK), torch.full((64, RANK), 9.0).to(DEVICE, dtype)])
    head = SimpleNamespace(
        markov_w1=SimpleNamespace(weight=numbers(VOCAB, RANK)),
        markov_w2=SimpleNamespace(weight=projection),
    )
    lm_head = numbers(ids, HIDDEN)
    model = SimpleNamespace(
        model=SimpleNamespace(markov_head=head),
        config=SimpleNamespace(draft_vocab_size=ids),
        draft_id_to_target_id=offsets,
        compute_draft_logits=lambda hidden: hidden @ lm_head.T,
        markov_embed=lambda tokens: head.markov_w1.weight[tokens],
        markov_bias=lambda embedded: embedded @ projection[:ids].T,
        map_draft_to_target=lambda i: i if offsets is None else i + offsets[i],
    )
    rows = requests + 2
    speculator = SimpleNamespace(
        model=model,
        _draft_topk=None,
        draft_logits=None,
        use_confidence_head=False,
        num_speculative_steps=K,
        num_query_per_req=K,
        max_num_reqs=rows,
        sample_indices=torch.arange(rows * K, device=DEVICE),
        sample_idx_mapping=torch.zeros(rows * K, dtype=torch.int64, device=DEVICE),
        sample_pos=torch.zeros(rows * K, dtype=torch.int64, device=DEVICE),
        _anchor_idx=torch.arange(rows, device=DEVICE) * K,
        input_buffers=SimpleNamespace(
            input_ids=torch.randint(VOCAB, (rows * K,), generator=generator).int().to(DEVICE)
        ),
        draft_tokens=torch.full((rows, K), -1, device=DEVICE),
    )
    speculator._sample_logits = lambda logits, *_: model.map_draft_to_target(logits.argmax(-1))
    return speculator, numbers(requests * K, HIDDEN)


# Triton's interpreter multiplies bfloat16 as if it were whole numbers.
@with_triton
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]
)
@pytest.mark.parametrize(("requests", "ids"), [(1, 300), (17, 300), (3, VOCAB)])
def test_drafts_are_those_of_vllms_loop(requests, ids, dtype):
    from vllm.v1.worker.gpu.spec_decode.dspark.speculator import DSparkSpeculator

    stock = original(DSparkSpeculator, "_sample_sequential")
    speculator, hidden = _drafter(requests, ids, dtype)
    stock(speculator, requests, hidden)
    wanted = speculator.draft_tokens.clone()
    assert wanted[:requests].unique().numel() > requests  # it does not draft one token only
    speculator.draft_tokens.fill_(-1)
    speculator._drafthead_chain = markov_chain.Chain.of(speculator.model, speculator.max_num_reqs)
    patched = markov_chain._in_one_kernel_each(lambda *_: pytest.fail("left to vLLM"))
    patched(speculator, requests, hidden)
    assert speculator.draft_tokens.tolist() == wanted.tolist()


def test_what_it_does_not_draft_is_left_to_vllm():
    other = SimpleNamespace(draft_logits=None, enable_adaptive_verification=False)
    assert not markov_chain.fits(other, SimpleNamespace())
    left = []
    patched = markov_chain._in_one_kernel_each(lambda *call: left.append(call))
    patched(SimpleNamespace(_drafthead_chain=None), 1, None)
    assert len(left) == 1
