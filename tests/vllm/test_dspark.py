"""DSpark heads in a real engine on the CPU: vLLM's modules draft as ours do, and answers stay the
target's own."""

import pytest
import torch

from drafthead.drafters.dspark.checkpoint import load_head, save_head
from drafthead.drafters.dspark.config import DSparkConfig
from drafthead.drafters.dspark.drafting import draft_blocks
from drafthead.drafters.dspark.model import DSparkHead
from drafthead.targets import load_target
from tests.vllm.engines import engine

PROMPTS = ([5, 9, 77, 130, 8, 201, 44], [300], [17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27])


def crafted(target, folder, **changes):
    """A head of random weights for a target, saved in `folder`."""
    base = {
        "hidden_size": target.hidden_size,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": target.vocab_size,
        "draft_vocab_size": 200,
        "target_hidden_size": target.hidden_size,
        "aux_layer_ids": (1, 2, 4),
        "max_position_embeddings": target.max_position_embeddings,
        "block_size": 7,
        "mask_token_id": target.vocab_size - 1,
        "markov_rank": 16,
    }
    head = DSparkHead(DSparkConfig(**(base | changes)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in head.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
        if head.config.draft_vocab_size < head.config.vocab_size:
            head.d2t[50:] = head.config.vocab_size - head.config.draft_vocab_size
    save_head(head, folder, {}, dtype=torch.float32)
    return folder


def dspark(head, k):
    return {"method": "dspark", "model": str(head), "num_speculative_tokens": k}


def watch(drafter) -> list:
    """What each call of the proposer was handed, and drafted; one request runs at a time."""
    calls, propose = [], drafter.propose

    def proposing(*args, **named):
        at = named["token_indices_to_sample"]
        positions = named["target_positions"]
        last = len(positions) - 1 if at is None else int(at[0])
        states = named["target_hidden_states"][: last + 1].clone()
        drafts = propose(*args, **named)
        calls.append((positions[: last + 1].tolist(), states, drafts[0].tolist()))
        return drafts

    drafter.propose = proposing
    return calls


@pytest.mark.parametrize(
    ("k", "changes"),
    [
        (1, {}),
        (3, {"confidence_head": False}),
        (7, {"num_hidden_layers": 3, "is_neox_style": False}),
        (4, {"draft_vocab_size": 512, "own_lm_head": False, "causal": True}),
    ],
)
def test_engine_and_head_draft_the_same(llama, tmp_path, k, changes):
    from vllm import SamplingParams

    target = load_target(llama)
    folder = crafted(target, tmp_path / "head", **changes)
    head = load_head(folder).head
    lm_head = target.lm_head() if head.lm_head is None else None
    with engine(llama, dspark(folder, k), max_num_seqs=1) as llm:
        executor = llm.llm_engine.engine_core.engine_core.model_executor
        calls = watch(executor.driver_worker.worker.model_runner.drafter)
        sampling = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True, detokenize=False)
        chains = set()
        for prompt in PROMPTS:
            calls.clear()
            output = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
            ids = torch.tensor(prompt + list(output[0].outputs[0].token_ids))
            aux = {}
            for positions, states, _ in calls:
                aux |= dict(zip(positions, states))
            rows = [positions[-1] for positions, *_ in calls if positions[-1] < len(ids) - 1]
            assert rows[0] == len(prompt) - 1, "the first drafts follow the prefill"
            states = torch.stack([aux[p] for p in range(rows[-1] + 1)])
            states = states.unflatten(-1, (-1, target.hidden_size))
            drafts = draft_blocks(
                head, target.embedding(), states, ids, k, torch.tensor(rows), lm_head
            )
            assert drafts.tolist() == [chain for *_, chain in calls[: len(rows)]]
            chains |= {tuple(chain) for chain in drafts.tolist()}
        assert len(chains) > 8, "a head that always drafts the same would prove nothing"
