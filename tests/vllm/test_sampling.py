"""What people ask for besides greedy text: answers with a head are the target's own, and sampled
ones come from its distribution, whichever way drafts are drawn. (The whole matrix, of both drafters
and on hybrids, is benchmarks/lossless/matrix.py.)"""

import numpy as np
import pytest

from drafthead.prove.sampling_test import two_sample
from tests.prove import crafted
from tests.vllm.engines import counter, eagle3, engine
from tests.vllm.options import ASKED, answers, hard, same, speculative

CONTEXTS = ([20, 21], [105, 110], [205, 37])
SAMPLES, TOKENS = 400, 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A target that is not sure of itself, and a head as unsure."""
    folder = tmp_path_factory.mktemp("unsure")
    target = crafted.target(folder / "target", scale=0.03)
    return target, crafted.head(folder / "head", target, scale=0.03)


def draws(llm, seed):
    """Sampled answers at each temperature and context: token ids [samples, tokens]. seed: of the
    first answer; the next ones follow."""
    from vllm import SamplingParams

    found = []
    for heat in (0.7, 1.0):
        for context in CONTEXTS:
            outputs = llm.generate(
                [{"prompt_token_ids": context}] * SAMPLES,
                [
                    SamplingParams(
                        temperature=heat,
                        top_k=4,  # fewer kinds of answers: a smaller difference shows
                        max_tokens=TOKENS,
                        ignore_eos=True,
                        detokenize=False,
                        seed=seed + i,
                    )
                    for i in range(SAMPLES)
                ],
                use_tqdm=False,
            )
            found.append(np.array([list(o.outputs[0].token_ids) for o in outputs]))
    return found


def accepted(llm):
    names = ("num_accepted_tokens", "num_drafts")
    return np.array([counter(llm, f"spec_decode_{name}") for name in names])


@pytest.fixture(scope="module")
def alone(pair):
    arguments = {"max_num_seqs": 64, "max_num_batched_tokens": 512}
    with engine(pair[0], **ASKED, **arguments) as llm:
        return answers(llm, drafted=False), draws(llm, seed=0)


@pytest.fixture(scope="module")
def kept():
    """Drafts accepted a step of sampled requests, by how they were drawn."""
    return {}


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_answers_are_the_targets_own_whatever_is_asked_for(pair, alone, kept, method):
    target, head = pair
    # With greedy drafts on an engine under every strain, else on one as vLLM sets it.
    arguments = hard("dense") if method == "greedy" else {"max_num_seqs": 64}
    head = speculative("eagle3", head, 3, method)
    with engine(target, head, **ASKED, **arguments) as llm:
        for name, got in answers(llm, drafted=True).items():
            both = list(zip(alone[0][name]["answers"], got["answers"], strict=True))
            assert all(same(*one) for one in both), name
            assert got["num_accepted_tokens"] > 0, name
        before = accepted(llm)
        drawn = draws(llm, seed=SAMPLES)
        tokens, steps = accepted(llm) - before
        if method == "greedy":
            assert counter(llm, "prefix_cache_hits") > 0
    outcome = two_sample(alone[1], drawn)
    assert outcome.same
    assert outcome.detectable_shift is not None
    assert outcome.detectable_shift <= 0.2
    kept[method] = tokens / steps
    # top_k cuts the target's distribution, not the one that vLLM draws drafts from.
    if method == "probabilistic":
        assert 0 < kept["probabilistic"] < kept["greedy"]


def test_steps_without_drafts_are_sampled_too(tmp_path):
    """What stock vLLM's CPU engine ends at."""
    from vllm import SamplingParams

    target = crafted.target(tmp_path / "target")
    head = crafted.head(tmp_path / "head", target)
    with engine(target, eagle3(head, 3)) as llm:
        for setting in ({"temperature": 0.8, "top_k": 20, "seed": 1}, {"temperature": 0}):
            sampling = SamplingParams(**setting, max_tokens=6, ignore_eos=True, detokenize=False)
            (output,) = llm.generate([{"prompt_token_ids": [20, 21]}], sampling, use_tqdm=False)
            assert len(output.outputs[0].token_ids) == 6
