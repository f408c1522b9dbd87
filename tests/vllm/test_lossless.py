"""Greedy answers with speculation equal those without, token for token, on hybrid targets.

The head drafts repetitions, and the target repeats itself in runs: some drafts are accepted, some
are not. fp32, so that nothing may differ at all.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.engines import (
    answers,
    counter,
    eagle3,
    engine,
    ngram,
    prompt,
    sharing,
    staggered,
    stress,
)
from tests.vllm.models import write_head, write_target
from tests.vllm.oracle import proposing

STRESS, SHARING = stress(), sharing()
STAGGERED = stress(seed=2)[:32]
_RNG = random.Random(3)
ALONE = [(prompt(_RNG, length), 24) for length in (1, 2, 7, 40)]
# Chunks of 8 prompt tokens leave decode rows cut short, without drafts, or sitting out a step.
SLIVERS = {"max_num_batched_tokens": 20, "long_prefill_token_threshold": 8}
CROWDED = [(prompt(random.Random(i), 6 + i % 5), 40) for i in range(24)]
LONG = [(prompt(_RNG, _RNG.randrange(30, 90)), 60) for _ in range(12)]
TO_THE_END = [(prompt(_RNG, 512 - tokens), tokens) for tokens in (1, 2, 5, 9, 60)]


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return write_target(tmp_path_factory.mktemp("hybrid"))


@pytest.fixture(scope="module")
def head(tmp_path_factory, target) -> Path:
    return write_head(
        tmp_path_factory.mktemp("repeats"), target, aux_layers=(2, 3, 6), repeats=True
    )


@pytest.fixture(scope="module")
def plain(target) -> dict[str, list[list[int]]]:
    with engine(target, max_num_seqs=8, max_num_batched_tokens=256) as llm:
        sets = {"stress": STRESS, "staggered": STAGGERED, "alone": ALONE}
        sets |= {"sharing": SHARING, "long": LONG, "crowded": CROWDED, "to the end": TO_THE_END}
        return {name: answers(llm, requests) for name, requests in sets.items()}


@pytest.mark.parametrize("k", [1, 3, 7])
def test_eagle3(target, head, plain, k):
    with engine(target, eagle3(head, k)) as llm:
        assert [answers(llm, [request])[0] for request in ALONE] == plain["alone"]
        assert staggered(llm, STAGGERED) == plain["staggered"]
        assert answers(llm, STRESS) == plain["stress"]
        accepted = counter(llm, "spec_decode_num_accepted_tokens")
        drafted = counter(llm, "spec_decode_num_draft_tokens")
        assert 100 < accepted < drafted
        assert answers(llm, TO_THE_END) == plain["to the end"]  # up to max_model_len
        assert counter(llm, "spec_decode_num_accepted_tokens") > accepted


def test_eagle3_that_is_never_right(tmp_path, target, plain):
    head = write_head(tmp_path, target, aux_layers=(1, 3, 5), repeats=False)
    with engine(target, eagle3(head, 3)) as llm:
        assert answers(llm, STRESS) == plain["stress"]
        assert counter(llm, "spec_decode_num_accepted_tokens") < 50


def test_ngram(target, plain):
    """At other numbers of drafts below."""
    with engine(target, ngram(3)) as llm:
        assert [answers(llm, [request])[0] for request in ALONE] == plain["alone"]
        assert staggered(llm, STAGGERED) == plain["staggered"]
        assert answers(llm, STRESS) == plain["stress"]
        assert counter(llm, "spec_decode_num_accepted_tokens") > 100


@pytest.mark.parametrize("k", [2, 5])
def test_other_ks(target, head, plain, k):
    import numba  # noqa: F401  (what n-gram speculation loads: it must not stop the next engine)

    with engine(target, eagle3(head, k)) as llm:
        assert answers(llm, STRESS) == plain["stress"]
        assert counter(llm, "spec_decode_num_accepted_tokens") > 100


def test_text_that_does_not_repeat(tmp_path):
    """Drafts come from an oracle: where a token repeats, a state that is off by one shows less."""
    target = write_target(tmp_path, embedding_scale=1.0)
    with engine(target) as llm:
        expected = answers(llm, STRESS)
    known = [ids + answer for (ids, _), answer in zip(STRESS, expected)]
    with proposing(known), engine(target, ngram(7), **SLIVERS) as llm:
        assert answers(llm, STRESS) == expected
        assert counter(llm, "spec_decode_num_accepted_tokens") > 400


@pytest.mark.parametrize(("method", "k"), [("eagle3", 7), ("ngram", 2)])
def test_prefix_caching(target, head, plain, method, k):
    speculative = eagle3(head, k) if method == "eagle3" else ngram(k)
    with engine(target, speculative, enable_prefix_caching=True, block_size=32) as llm:
        assert answers(llm, SHARING) == plain["sharing"]
        assert answers(llm, STRESS) == plain["stress"]
        # A second time everything that can be cached is.
        assert answers(llm, SHARING) == plain["sharing"]
        assert counter(llm, "prefix_cache_hits") > 2000
        assert counter(llm, "spec_decode_num_accepted_tokens") > 100


@pytest.mark.parametrize(("method", "caching"), [("eagle3", True), ("ngram", False)])
def test_prompts_in_slivers(target, head, plain, method, caching):
    speculative = eagle3(head, 7) if method == "eagle3" else ngram(7)
    with engine(target, speculative, enable_prefix_caching=caching, **SLIVERS) as llm:
        assert answers(llm, STRESS) == plain["stress"]
        assert counter(llm, "spec_decode_num_accepted_tokens") > 100


@pytest.mark.parametrize("caching", [False, True])
def test_requests_that_sit_out_a_step(target, plain, caching):
    """Verify steps of some use the whole budget; the next ones wait, with accepted drafts."""
    limits = {"max_num_batched_tokens": 10, "max_num_seqs": 8}
    with engine(target, ngram(5), enable_prefix_caching=caching, **limits) as llm:
        assert answers(llm, CROWDED) == plain["crowded"]
        assert counter(llm, "spec_decode_num_accepted_tokens") > 100


@pytest.mark.parametrize("caching", [False, True])
def test_preemption(target, head, plain, caching):
    with engine(
        target,
        eagle3(head, 3),
        enable_prefix_caching=caching,
        block_size=32,
        num_gpu_blocks_override=44 if not caching else 48,
        max_num_seqs=8,
    ) as llm:
        assert answers(llm, LONG) == plain["long"]
        assert counter(llm, "num_preemptions") > 0


def test_preempted_answers_are_computed_again_in_slivers(target, head, plain):
    """Chunks of what a request had written are as narrow as a verify step."""
    with engine(
        target,
        eagle3(head, 3),
        block_size=32,
        num_gpu_blocks_override=44,
        max_num_seqs=8,
        max_num_batched_tokens=36,
        long_prefill_token_threshold=4,
    ) as llm:
        assert answers(llm, LONG) == plain["long"]
        assert counter(llm, "num_preemptions") > 2


def test_dense_lfm2(tmp_path):
    target = write_target(tmp_path / "target", moe=False)
    head = write_head(tmp_path / "head", target, aux_layers=(2, 3, 6), repeats=True)
    with engine(target) as llm:
        expected = answers(llm, STRESS)
    with engine(target, eagle3(head, 3)) as llm:
        assert answers(llm, STRESS) == expected
        assert counter(llm, "spec_decode_num_accepted_tokens") > 100


def test_trained_hybrid_from_its_nvfp4_checkpoint(tmp_path):
    """The tiny hybrid of the second demo, its weights expanded as they are loaded."""
    target = Path(__file__).parents[1] / "assets" / "tiny-hybrid"
    head = write_head(tmp_path, target, aux_layers=(2, 5, 11), repeats=True)
    requests = [(ids, tokens) for ids, tokens in stress(seed=4) if tokens > 2][:32]
    with engine(target) as llm:
        expected = answers(llm, requests)
    with engine(target, eagle3(head, 3)) as llm:
        assert answers(llm, requests) == expected
        assert counter(llm, "spec_decode_num_accepted_tokens") > 20


def test_compiled(target, head, plain):
    with engine(target, eagle3(head, 3), enforce_eager=False) as llm:
        assert answers(llm, STRESS) == plain["stress"]
        assert counter(llm, "spec_decode_num_accepted_tokens") > 100


def test_tensor_parallel(tmp_path, target, head, plain):
    """Two workers and an engine in processes of their own: the plugin loads in each."""
    script = tmp_path / "two.py"
    script.write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "from tests.vllm.engines import answers, eagle3, engine, stress\n"
        "if __name__ == '__main__':\n"
        "    target, head, out = map(Path, sys.argv[1:])\n"
        "    with engine(target, eagle3(head, 7), tensor_parallel_size=2) as llm:\n"
        "        out.write_text(json.dumps(answers(llm, stress())))\n"
    )
    repo = Path(__file__).parents[2]
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "PYTHONPATH": f"{repo / 'src'}:{repo}",
    }
    written = tmp_path / "answers.json"
    command = [sys.executable, str(script), str(target), str(head), str(written)]
    done = subprocess.run(command, env=environment, cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads(written.read_text()) == plain["stress"]
