"""Greedy verification in one kernel, against vLLM's own sampler on batches of any make."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.triton_utils import HAS_TRITON

from drafthead.vllm_plugin import greedy_verify, patch
from tests.vllm.newer_runner import run_interpreted

K, STATES, VOCAB = 3, 12, 1000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with_triton = pytest.mark.skipif(not HAS_TRITON, reason="see the last test")


def _sampler(rng: np.random.Generator, prompt: np.ndarray, rates: list[float] | None):
    """vLLM's, for greedy requests with ``prompt`` tokens each."""
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    gpu = lambda values, dtype: SimpleNamespace(
        np=values, gpu=torch.tensor(values, dtype=dtype, device=DEVICE)
    )
    sampler = SimpleNamespace(
        compute_nans=False,
        return_sampling_mask=False,
        logprobs_mode="raw_logprobs",
        use_fp64_gumbel=False,
        needs_logits_processing=np.zeros(STATES, bool),
        apply_sampling_params=lambda logits, *_: logits,
        req_states=SimpleNamespace(prefill_len=gpu(prompt, torch.int32)),
        sampling_states=SimpleNamespace(
            temperature=gpu(np.zeros(STATES), torch.float32),
            seeds=gpu(rng.integers(1 << 60, size=STATES), torch.int64),
            max_num_logprobs=lambda rows: -1,
        ),
    )
    settings = SimpleNamespace(
        num_speculative_tokens=K,
        enable_adaptive_verification=False,
        rejection_sample_method="synthetic" if rates else "standard",
        synthetic_acceptance_rates=rates,
    )
    return RejectionSampler(sampler, settings, torch.device(DEVICE))


def _batch(rng: np.random.Generator, prompt: np.ndarray):
    """Requests in the middle of their prompts, at their ends and past them, with 0 to K drafts;
    logits of few values, so that many are alike."""
    states = rng.permutation(STATES)[: rng.integers(1, STATES)]
    drafts = rng.integers(0, K + 1, len(states))
    # The first drafted position: in the prompt (drafts are placeholders), right after it, later.
    first = np.array([prompt[s] + rng.integers(-1, 3) for s in states])
    unfinished = rng.random(len(states)) < 0.2
    drafts[unfinished], first[unfinished] = 0, prompt[states[unfinished]] - 2
    query = drafts + 1 + rng.integers(0, 3, len(states))
    ends, counts = np.cumsum(query), drafts + 1
    indices = np.concatenate([np.arange(e - c, e) for e, c in zip(ends, counts)])
    positions = np.concatenate(
        [np.arange(f - q + d, f + d) for f, q, d in zip(first, query, drafts)]
    )
    logits = torch.tensor(rng.integers(-12, 13, (len(indices), VOCAB)) / 4, device=DEVICE)
    ids = rng.integers(-1, VOCAB, ends[-1])
    good = rng.random(len(indices)) < 0.7
    ids[indices[1:][good[1:]]] = logits.argmax(-1).cpu().numpy()[:-1][good[1:]]
    tensor = lambda values, dtype=torch.int32: torch.tensor(values, dtype=dtype, device=DEVICE)
    starts = np.concatenate([[0], np.cumsum(counts)])
    batch = SimpleNamespace(
        num_reqs=len(states),
        idx_mapping=tensor(states),
        idx_mapping_np=states,
        expanded_idx_mapping=tensor(np.repeat(states, counts)),
        expanded_local_pos=tensor(np.concatenate([np.arange(c) for c in counts])),
        input_ids=tensor(ids),
        positions=tensor(positions, torch.int64),
        logits_indices=tensor(indices, torch.int64),
        cu_num_logits=tensor(starts),
        cu_num_logits_np=starts,
        seq_lens=tensor(first + drafts),
        seq_lens_cpu_upper_bound=torch.tensor(first + drafts, dtype=torch.int32),
    )
    return logits, batch


@with_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rates", [None, [0.7, 0.5, 0.2]], ids=["served", "synthetic"])
def test_is_what_vllm_finds(rates, dtype):
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    stock = patch.original(RejectionSampler, "__call__")
    patched = greedy_verify._greedy_at_once(lambda *_: pytest.fail("left to vLLM"))
    accepted = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        prompt = rng.integers(5, 30, STATES)
        sampler = _sampler(rng, prompt, rates)
        logits, batch = _batch(rng, prompt)
        got, want = (judge(sampler, logits.to(dtype), batch) for judge in (patched, stock))
        for name in ("num_sampled", "num_rejected", "sampled_token_ids"):
            assert getattr(got, name).dtype == getattr(want, name).dtype
        assert got.num_rejected.tolist() == want.num_rejected.tolist()
        assert got.num_sampled.tolist() == want.num_sampled.tolist()
        for one, other, count in zip(
            got.sampled_token_ids, want.sampled_token_ids, got.num_sampled
        ):
            assert one[:count].tolist() == other[:count].tolist()
        accepted += got.num_sampled.tolist()
    assert set(accepted) == set(range(K + 2))  # 0: a prompt that goes on


@pytest.mark.skipif(HAS_TRITON, reason="they ran above")
def test_under_the_interpreter(tmp_path):
    """Those of other kernels too, in the same process: importing vLLM takes most of the time."""
    names = ("greedy_verify", "aux_norm", "markov_chain")
    run_interpreted(tmp_path, *(f"tests/vllm/test_{name}.py" for name in names))
