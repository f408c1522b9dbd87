"""DSpark heads in a real engine on the CPU: vLLM's modules draft as ours do, and answers stay the
target's own."""

import random

import numpy as np
import pytest
import torch

from drafthead.drafters.base import TargetSide
from drafthead.drafters.dspark.checkpoint import load_head, save_head
from drafthead.drafters.dspark.config import DSparkConfig
from drafthead.drafters.dspark.drafter import DSpark
from drafthead.drafters.dspark.drafting import draft_blocks
from drafthead.drafters.dspark.model import DSparkHead
from drafthead.drafters.dspark.packing import pack_blocks
from drafthead.drafters.dspark.training import BlockObjective, BlockStep
from drafthead.ops.losses import Teacher
from drafthead.ops.vocabulary import draft_ids
from drafthead.targets import load_target
from drafthead.train.evaluate import evaluate
from tests.vllm.engines import answers, counter, eagle3, engine, prompt, staggered, stress
from tests.vllm.models import write_head, write_target
from tests.vllm.test_served_acceptance import answers as own_answers
from tests.vllm.test_served_acceptance import counters

PROMPTS = ([5, 9, 77, 130, 8, 201, 44], [300], [17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27])


def shaped(target, **changes):
    """A head of random weights for a target."""
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
    return head


def saved(head, folder):
    save_head(head, folder, {}, dtype=torch.float32)
    return folder


@torch.no_grad()
def repeating(target, aux_layers=(2, 3, 6)):
    """A head that drafts the last token again and again: right where the target repeats itself."""
    head = shaped(target, draft_vocab_size=target.vocab_size - 100, num_hidden_layers=1,
                  markov_rank=128, aux_layer_ids=aux_layers)  # fmt: skip
    layer, embedding = head.layers[0], target.embedding().float()
    for p in (layer.self_attn.o_proj, layer.mlp.down_proj):
        p.weight.zero_()
    head.norm.weight.fill_(1.0)
    head.lm_head.weight.copy_(embedding[head.target_ids()])
    # Nearly orthogonal codes: a token's own is the likeliest after it.
    head.markov_head.markov_w1.weight.normal_(generator=torch.Generator().manual_seed(1))
    head.markov_head.markov_w2.weight.copy_(head.markov_head.markov_w1.weight[head.target_ids()])
    return head


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
    folder = saved(shaped(target, **changes), tmp_path / "head")
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


STRESS, STAGGERED = stress(), stress(seed=2)[:32]
_RNG = random.Random(3)
ALONE = [(prompt(_RNG, length), 24) for length in (1, 2, 7, 40)]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("hybrid"))


@pytest.fixture(scope="module")
def alone(hybrid):
    """Answers of the target alone."""
    with engine(hybrid, max_num_seqs=8, max_num_batched_tokens=256) as llm:
        sets = {"stress": STRESS, "staggered": STAGGERED, "alone": ALONE}
        return {name: answers(llm, requests) for name, requests in sets.items()}


@pytest.mark.parametrize("k", [1, 7])
def test_answers_of_a_hybrid_stay_its_own(hybrid, alone, tmp_path, k):
    head = saved(repeating(load_target(hybrid)), tmp_path / "head")
    with engine(hybrid, dspark(head, k)) as llm:
        assert [answers(llm, [request])[0] for request in ALONE] == alone["alone"]
        assert staggered(llm, STAGGERED) == alone["staggered"]
        assert answers(llm, STRESS) == alone["stress"]
        accepted = counter(llm, "spec_decode_num_accepted_tokens")
        drafted = counter(llm, "spec_decode_num_draft_tokens")
    assert 100 < accepted < drafted


@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_fewer_drafts_the_more_requests_leave_the_answers(hybrid, alone, tmp_path, kind):
    """The number of drafts changes from step to step, down to none and up again."""
    if kind == "dspark":
        speculative = dspark(saved(repeating(load_target(hybrid)), tmp_path / "head"), 3)
    else:
        speculative = eagle3(write_head(tmp_path, hybrid, aux_layers=(2, 3, 6), repeats=True), 3)
    by_load = {
        "num_speculative_tokens_per_batch_size": [(1, 1, 3), (2, 2, 1), (3, 3, 0), (4, 4, 2)]
    }
    with engine(hybrid, speculative | by_load) as llm:
        assert [answers(llm, [request])[0] for request in ALONE] == alone["alone"]
        assert staggered(llm, STAGGERED) == alone["staggered"]
        assert answers(llm, STRESS) == alone["stress"]
        assert counter(llm, "spec_decode_num_accepted_tokens") > 100


def test_the_engine_counts_what_was_predicted(llama, tmp_path):
    """A head trained for a moment on the very answers that are served."""
    from vllm import SamplingParams

    target = load_target(llama)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(5, 500, n).tolist() for n in (9, 2, 14, 5, 7, 3, 20, 6)]
    lengths = [40, 30, 24, 36, 28, 40, 20, 33]
    held = own_answers(llama, prompts, lengths)
    head = shaped(target, draft_vocab_size=target.vocab_size, aux_layer_ids=(1, 3, 5))
    weight, eps = target.final_norm()
    teacher = Teacher(weight, eps, target.lm_head()[head.target_ids()], target.logits)
    embedding = target.embedding()
    mask = embedding[head.config.mask_token_id]
    step = BlockStep(head, teacher, BlockObjective("ce"), mask)
    to_draft = draft_ids(head.target_ids(), target.vocab_size)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    for number in range(60):
        row = pack_blocks(held, 5, 1.0, to_draft, 1000, embedding, (number,))
        optimizer.zero_grad()
        step.backward(row.batch("cpu"))
        optimizer.step()
    folder = saved(head, tmp_path / "head")
    served, _ = DSpark().load(folder)
    predicted = evaluate(DSpark(), served, TargetSide(embedding), held, [5])[0]
    with engine(llama, dspark(folder, 5)) as llm:
        sampling = [
            SamplingParams(temperature=0.0, max_tokens=n, detokenize=False) for n in lengths
        ]
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        counted = counters(llm)
    for one, output in zip(held, outputs):
        assert one.ids[one.prompt_len :].tolist() == list(output.outputs[0].token_ids)
    assert min(predicted.accepted) > 2
    assert counted["steps"] == predicted.drafts
    assert counted["accepted"][0] == predicted.accepted[0]
    extra = np.array(counted["accepted"]) - np.array(predicted.accepted)
    assert (extra >= 0).all()
    assert (extra <= np.array(predicted.past_end)).all()
