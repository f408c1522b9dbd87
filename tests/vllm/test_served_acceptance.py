"""What `evaluate` predicts is what the engine counts: same steps, same accepted drafts.

A head is trained for a moment on the very answers that are served, so that chains of every length
are accepted; some answers end by the end token, some are cut.
"""

import gc

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from drafthead.drafters.base import TargetSide
from drafthead.drafters.eagle3.drafter import Eagle3
from drafthead.head.checkpoint import load_head, save_head
from drafthead.head.config import HeadConfig
from drafthead.head.drafting import prefix_attention
from drafthead.head.formats import Provenance
from drafthead.head.init import init_from_target
from drafthead.targets import load_target
from drafthead.train.evaluate import evaluate
from drafthead.vocab import choose, count_tokens, offsets
from tests.heads import sample

K = 3
AUX = (1, 3, 5)


def engine(folder, **more):
    from vllm import LLM

    return LLM(
        model=str(folder),
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        max_num_seqs=4,
        enable_prefix_caching=False,
        disable_log_stats=False,
        **more,
    )


def counters(llm) -> dict:
    found = {metric.name: metric for metric in llm.get_metrics()}
    return {
        "steps": found["vllm:spec_decode_num_drafts"].value,
        "drafted": found["vllm:spec_decode_num_draft_tokens"].value,
        "accepted": found["vllm:spec_decode_num_accepted_tokens_per_pos"].values,
    }


@torch.no_grad()
def answers(folder, prompts, lengths):
    """Greedy answers by transformers and the states that go with them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    held = []
    for prompt, length in zip(prompts, lengths):
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=length, do_sample=False, pad_token_id=0
        )
        states = model(ids[:, :-1], output_hidden_states=True).hidden_states
        held.append(sample(ids[0], len(prompt), torch.stack([states[i][0] for i in AUX], dim=1)))
    return held


def overfit(head, embedding, held, steps):
    """Training-time test in its plainest form: K draft steps on what the target wrote."""
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    to_draft = torch.full((head.config.vocab_size,), -100)
    to_draft[head.target_ids()] = torch.arange(head.config.draft_vocab_size)
    for _ in range(steps):
        optimizer.zero_grad()
        for one in held:
            chain_loss(head, embedding, one, to_draft).backward()
        optimizer.step()


def chain_loss(head, embedding, one, to_draft):
    """Cross-entropy of K drafts from every position, each step fed the true token before it."""
    n, ids = len(one.ids) - 2, one.ids.long()
    rows = torch.arange(n)
    seen = [([], []) for _ in head.layers]

    def attention(layer, q, k, v):
        keys, values = seen[layer]
        keys.append(k)
        values.append(v)
        window = head.config.window(layer)
        return prefix_attention(q, rows, keys[0], values[0], keys[1:], values[1:], window)

    hidden, loss = head.fuse(one.aux[:n]), 0.0
    ends = torch.zeros(K, dtype=torch.int64)
    for step in range(K):
        embeds = embedding[torch.cat([ids, ends])[rows + 1 + step]]
        decoded = head.decode(embeds, hidden, rows + step, attention)
        truth = torch.cat([to_draft[ids], ends - 100])[rows + 2 + step]
        logits = head.logits(head.output(decoded))
        if (truth >= 0).any():
            loss = loss + torch.nn.functional.cross_entropy(logits, truth, ignore_index=-100)
        hidden = head.feedback(decoded)
    return loss


# Attention wider than the hidden state, over the last 32 positions.
WIDE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "layer_types": ("sliding_attention",) * 2,
    "sliding_window": 32,
}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("granite", {}), ("llama", WIDE)],
    ids=["granite", "two wide layers"],
)
def test_the_engine_counts_what_was_predicted(kind, changes, request, tmp_path):
    from vllm import SamplingParams

    folder = request.getfixturevalue(kind)
    target = load_target(folder)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(5, 500, n).tolist() for n in (9, 2, 14, 5, 7, 3, 20, 6)]
    lengths = [40, 33, 24, 40, 1, 2, 12, 30]
    held = answers(folder, prompts, lengths)
    written = count_tokens([one.ids[one.prompt_len :].numpy() for one in held], target.vocab_size)
    # A vocabulary that leaves out some of what is written: certain misses must be counted too.
    chosen = choose(written, int((written > 0).sum() * 0.9), [])
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": len(chosen),
        "target_hidden_size": 64,
        "aux_layer_ids": AUX,
        "max_position_embeddings": 512,
    }
    config = HeadConfig(**shape | changes)
    head = init_from_target(config, offsets(chosen), target.lm_head(), target.final_norm()[0])
    embedding = target.embedding()
    overfit(head, embedding, held, steps=90)
    made = Provenance(target=str(folder), target_fingerprint=target.fingerprint)
    save_head(head, tmp_path / "head", made)
    served = load_head(tmp_path / "head").head.float()
    predicted = evaluate(Eagle3(), served, TargetSide(embedding), held, [K])[0]

    speculative = {
        "method": "eagle3",
        "model": str(tmp_path / "head"),
        "num_speculative_tokens": K,
    }
    llm = engine(folder, speculative_config=speculative)
    try:
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        sampling = [SamplingParams(temperature=0.0, max_tokens=n) for n in lengths]
        outputs = llm.generate(requests, sampling, use_tqdm=False)
        counted = counters(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    for one, output in zip(held, outputs):
        assert one.ids[one.prompt_len :].tolist() == list(output.outputs[0].token_ids)

    assert min(predicted.accepted) > 5, "every position must have been accepted now and then"
    assert all(a < b for a, b in zip(predicted.accepted, predicted.known)), "and rejected"
    assert sum(predicted.outside) > 0
    assert counted["steps"] == predicted.drafts
    assert counted["drafted"] == predicted.draft_tokens
    assert counted["accepted"][0] == predicted.accepted[0]
    # Beyond an answer's end the engine goes on to count what nobody sees.
    extra = np.array(counted["accepted"]) - np.array(predicted.accepted)
    assert (extra >= 0).all()
    assert (extra <= np.array(predicted.past_end)).all()
    assert counted["accepted"][0] / counted["steps"] == pytest.approx(predicted.by_position[0])
