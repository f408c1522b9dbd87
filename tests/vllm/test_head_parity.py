"""vLLM's own Eagle3 model and ours, given the same states by a real engine, draft the same.

The engine's proposer is watched: what the target handed it (token ids, positions, aux states) and
what it drafted, step by step, with the logits. Our head, loaded from the same folder, gets those
states and must draft the same tokens with the same logits, at every position that was drafted from.
"""

import gc
import json
import shutil
from dataclasses import dataclass, field

import pytest
import torch

from drafthead.head.checkpoint import load_head, save_head
from drafthead.head.drafting import draft_chain
from drafthead.head.formats import Provenance
from drafthead.targets import load_target
from tests.heads import small_head
from tests.reference.plain_drafting import draft_at

K = 3
PROMPTS = ([5, 9, 77, 130, 8, 201, 44], [300], list(range(17, 67)))
WINDOW = {"layer_types": ("sliding_attention",), "sliding_window": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "norm_before_residual": ({"norm_before_residual": True, "attention_bias": True}, "vllm"),
    "norm_before_fc": ({"norm_before_fc": True, "rope_scaling": LLAMA3}, "vllm"),
    "fc_norm, whole vocabulary": ({"fc_norm": True, "draft_vocab_size": 512}, "vllm"),
    "norm_output, two layers, own narrow embedding": (
        {"norm_output": True, "num_hidden_layers": 2, "hidden_size": 32},
        "vllm",
    ),
    "speculators, a window": ({**WINDOW, "norm_before_residual": True}, "speculators"),
    "the window of the target, argmax without scattering": ({}, "vllm"),
    "speculators, two aux layers": (
        {"norm_before_residual": True, "aux_layer_ids": (1, 4), "rope_theta": 5e5},
        "speculators",
    ),
}


@dataclass
class Watched:
    """What one request's proposer saw (by position) and drafted (by the position it was at)."""

    aux: dict[int, torch.Tensor] = field(default_factory=dict)
    drafts: dict[int, list[int]] = field(default_factory=dict)
    logits: dict[int, torch.Tensor] = field(default_factory=dict)


def watch(drafter) -> Watched:
    """Record every call of the proposer; one request runs at a time."""
    seen = Watched()
    propose, compute_logits = drafter.propose, drafter.model.compute_logits
    steps: list[torch.Tensor] = []

    def logits(hidden):
        steps.append(compute_logits(hidden))
        return steps[-1]

    def proposing(*args, **named):
        steps.clear()
        states, positions = named["target_hidden_states"].clone(), named["target_positions"]
        at = named["token_indices_to_sample"]
        last = len(positions) - 1 if at is None else int(at[0])
        for row in range(last + 1):
            seen.aux[int(positions[row])] = states[row]
        position = int(positions[last])
        drafts = propose(*args, **named)
        seen.drafts[position] = drafts[0].tolist()
        if steps:  # none if the engine takes the argmax without making full logits
            seen.logits[position] = torch.stack([step[0].float() for step in steps])
        return drafts

    drafter.propose, drafter.model.compute_logits = proposing, logits
    return seen


@pytest.mark.parametrize("case", CASES)
def test_engine_and_head_draft_the_same(llama, tmp_path, case):
    from vllm import LLM, SamplingParams

    changes, format = CASES[case]
    if "of the target" in case:
        llama = with_window(llama, tmp_path / "target")
    target = load_target(llama)
    head = small_head(
        target_hidden_size=64,
        intermediate_size=96,
        head_dim=32,
        vocab_size=target.vocab_size,
        max_position_embeddings=target.max_position_embeddings,
        **{"hidden_size": 64, "draft_vocab_size": 200, **changes},
    )
    made = Provenance(target=str(llama), target_architectures=target.architectures)
    own = torch.randn(target.vocab_size, 32) if head.config.hidden_size == 32 else None
    folder = tmp_path / "head"
    save_head(head, folder, made, format=format, speculative_tokens=K, embedding=own)
    llm = LLM(
        model=str(llama),
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        max_num_seqs=1,
        enable_prefix_caching=False,
        speculative_config={
            "method": "eagle3",
            "model": str(folder),
            "num_speculative_tokens": K,
            "use_local_argmax_reduction": "argmax" in case,
        },
    )
    try:
        executor = llm.llm_engine.engine_core.engine_core.model_executor
        drafter = executor.driver_worker.worker.model_runner.drafter
        seen = watch(drafter)
        loaded = load_head(folder, target)
        windows = [loaded.head.config.window(i) for i in range(len(loaded.head.layers))]
        assert windows == ([32] if "window" in case else [None] * len(windows))
        ours = loaded.head.float()
        embedding = target.embedding() if own is None else loaded.embedding.float()
        sampling = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
        different = set()
        for prompt in PROMPTS:
            for record in (seen.aux, seen.drafts, seen.logits):
                record.clear()
            output = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
            ids = torch.tensor(prompt + list(output[0].outputs[0].token_ids))
            # The last drafts are made after the last token, from a position past these.
            rows = [p for p in sorted(seen.drafts) if p < len(ids) - 1]
            assert rows[0] == len(prompt) - 1, "the first drafts follow the prefill"
            assert len(rows) > 3
            aux = torch.stack([seen.aux[p] for p in range(rows[-1] + 1)]).unflatten(-1, (-1, 64))
            drafted = draft_chain(ours, embedding, aux, ids, K, torch.tensor(rows))
            assert drafted.tolist() == [seen.drafts[p] for p in rows]
            different |= {tuple(chain) for chain in drafted.tolist()}
            assert bool(seen.logits) == ("argmax" not in case)
            for position in rows[::4] if seen.logits else ():
                compare_logits(ours, embedding, aux, ids, position, seen.logits[position])
        assert len(different) > 8, "a head that always drafts the same would prove nothing"
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def with_window(llama, folder):
    """The same model as a Mistral, all of whose layers see the last 32 positions."""
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 32,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def compare_logits(head, embedding, aux, ids, position, theirs) -> None:
    """Ours, collected from the plain twin, against the engine's [K, V] with -inf outside."""
    ours = []
    logits = head.logits
    head.logits = lambda normed: ours.append(logits(normed)[-1]) or logits(normed)
    try:
        draft_at(head, embedding, aux, ids, position, K)
    finally:
        del head.logits
    inside = head.target_ids()
    torch.testing.assert_close(torch.stack(ours), theirs[:, inside], atol=2e-4, rtol=1e-4)
    outside = torch.ones(theirs.shape[1], dtype=torch.bool)
    outside[inside] = False
    assert torch.isinf(theirs[:, outside]).all()
