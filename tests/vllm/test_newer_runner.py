"""The newer model runner on hybrid targets: what it answers with the patches, and without each."""

import random

import pytest

from drafthead.targets import load_target
from tests.prove import crafted
from tests.vllm import newer_runner
from tests.vllm.engines import answers, eagle3, engine, ngram, prompt
from tests.vllm.models import write_head, write_target
from tests.vllm.test_dspark import dspark, repeating, saved

K = 3
_RNG = random.Random(5)
# The first in chunks as wide as a verify step, the next three with one token left in the end: in
# that step the last request verifies drafts, in the step after it the budget leaves it one token.
ORDER = [(prompt(_RNG, 60), 2), *((prompt(_RNG, n), 4) for n in (9, 17, 25)), (prompt(_RNG, 1), 40)]
ORDERED = {
    "max_num_seqs": 5,
    "max_num_batched_tokens": 17,
    "long_prefill_token_threshold": 1 + K,
}
# One-token prompts that come in while others run.
ONE_TOKEN = [(prompt(_RNG, n), 8) for n in (6, 4, 1, 1, 3, 1)]
_TRUNK = prompt(_RNG, 96)
MIXED = [(_TRUNK[: 32 * (i % 4)] + prompt(_RNG, i % 3 + 1), 7) for i in range(8)]

SORT = "vllm.v1.worker.gpu.model_runner:sort_batch_req_ids"
SCHEDULED = "vllm.v1.core.sched.scheduler:Scheduler._update_after_schedule"
_BUILDER = "vllm.v1.attention.backends.short_conv_attn:ShortConvAttentionMetadataBuilder"
METADATA = [f"{_BUILDER}.{name}" for name in ("__init__", "build", "update_block_table")]
COMBINE = "vllm.model_executor.models.llama_eagle3:Eagle3LlamaForCausalLM.combine_hidden_states"
ARGMAX = (
    "vllm.v1.worker.gpu.spec_decode.speculator:"
    "DraftModelSpeculator._validate_local_argmax_reduction"
)
AS_DFLASH = "vllm.config.speculative:SpeculativeConfig.__post_init__"
_SPECULATORS = "vllm.v1.worker.gpu.spec_decode."
DRAFTING = [
    f"{_SPECULATORS}dspark.speculator:DSparkSpeculator.load_draft_model",
    f"{_SPECULATORS}dspark.speculator:DSparkSpeculator._sample_sequential",
    f"{_SPECULATORS}dspark.speculator:DSparkSpeculator._generate_draft",
    f"{_SPECULATORS}dflash.speculator:DFlashSpeculator.propose",
]


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """One that does not repeat itself, and one that does."""
    folder = tmp_path_factory.mktemp("hybrids")
    return [write_target(folder / str(scale), embedding_scale=scale) for scale in (1.0, 4.0)]


@pytest.fixture(scope="module")
def plain(targets):
    """What the older runner answers without speculation."""
    with engine(targets[0]) as llm:
        found = {"order": answers(llm, ORDER), "one_token": answers(llm, ONE_TOKEN)}
    with engine(targets[1]) as llm:
        return found | {"mixed": answers(llm, MIXED)}


@pytest.fixture(scope="module")
def found(tmp_path_factory, targets, plain):
    folder = tmp_path_factory.mktemp("newer")

    def oracle(name, requests):
        known = [ids + answer for (ids, _), answer in zip(requests, plain[name])]
        common = {"target": str(targets[0]), "speculative": ngram(K)}
        return common | {"requests": requests, "known": known}

    order = oracle("order", ORDER) | {"arguments": ORDERED}
    one_token = oracle("one_token", ONE_TOKEN)
    head = write_head(
        folder / "head", targets[1], aux_layers=(2, 3, 6), repeats=True, norms=("fc_norm",)
    )
    mixed = {
        "target": str(targets[1]),
        "speculative": eagle3(head, K),
        "requests": MIXED,
        "arguments": {"enable_prefix_caching": True, "block_size": 32},
    }
    llama = crafted.target(folder / "llama")
    llama_head = {
        "target": str(llama),
        "speculative": eagle3(crafted.head(folder / "llama-head", llama), K),
        "requests": [([4 + i, 20 + i, crafted.ALTERNATES[2 * i]], 12) for i in range(6)],
    }
    block = saved(repeating(load_target(targets[1])), folder / "block")
    ranges = [(1, 1, K), (2, 2, 1), (3, 3, 0), (4, 4, 2)]
    by_load = {
        "target": str(targets[1]),
        "speculative": dspark(block, K) | {"num_speculative_tokens_per_batch_size": ranges},
        "requests": MIXED,
        # As on a GPU: on a CPU it would be served by the older runner's DFlash.
        "without": [AS_DFLASH],
    }
    accepting = {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.2}
    synthetic = {
        "target": str(targets[1]),
        "speculative": ngram(K) | accepting,
        "requests": ONE_TOKEN,
    }
    jobs = {
        "order": order,
        "order, stock": order | {"without": [SORT]},
        "one token": one_token,
        "one token, stock": one_token | {"without": [SCHEDULED]},
        "mixed": mixed,
        "mixed, stock": mixed | {"without": [*METADATA, ARGMAX, COMBINE]},
        "llama": llama_head,
        "llama, stock": llama_head | {"without": [ARGMAX]},
        "synthetic": synthetic,
        "by load": by_load,
        "by load, stock": by_load | {"without": [AS_DFLASH, *DRAFTING]},
    }
    return newer_runner.run(folder, jobs)


def test_decodes_without_drafts_come_before_prompt_chunks(found, plain):
    assert found["order"]["answers"] == plain["order"]
    assert found["order"]["accepted"] > 20
    # Only the request whose rows landed behind chunks of prompts.
    wrong = [a != b for a, b in zip(found["order, stock"]["answers"], plain["order"])]
    assert wrong == [False, False, False, False, True]


def test_one_token_prompts(found, plain):
    assert found["one token"]["answers"] == plain["one_token"]
    assert found["one token"]["accepted"] > 10
    stock = found["one token, stock"]["answers"]
    wrong = [ids for (ids, _), a, b in zip(ONE_TOKEN, stock, plain["one_token"]) if a != b]
    assert wrong
    assert all(len(ids) == 1 for ids in wrong)


def test_cost_patches_change_neither_answers_nor_drafts(found, plain):
    assert found["mixed"]["answers"] == plain["mixed"]
    for name in ("mixed", "llama"):
        patched, stock = found[name], found[f"{name}, stock"]
        assert (patched.pop("draft_vocab"), stock.pop("draft_vocab")) == (True, False)
        assert patched == stock
        assert 0 < patched["accepted"] < patched["drafted"]


def test_acceptance_is_as_synthetic_as_asked_for(found):
    """And, like every batch of these engines, judged alike by vLLM's sampler and by the patch."""
    steps = found["synthetic"]["drafted"] / K
    assert 0.5 < found["synthetic"]["accepted"] / steps < 2


def test_blocks_are_drafted_as_vllm_does_whatever_the_load(found, plain):
    patched, stock = found["by load"], found["by load, stock"]
    assert patched["answers"] == plain["mixed"]
    assert (patched.pop("chain"), stock.pop("chain")) == (True, False)
    assert patched == stock
    assert 5 < patched["accepted"] < patched["drafted"]
