"""States out of the real engine, held against plain transformers."""

import random
from dataclasses import replace

import pytest
import torch

from drafthead.capture.checks import teacher_argmax
from drafthead.capture.engine import CaptureEngine, SequenceToKeep
from drafthead.recipe import parse_recipe
from drafthead.states import StateReader, StoreMeta
from drafthead.states.writer import open_store
from drafthead.targets import load_target
from tests import tiny
from tests.reference.transformers_twin import TransformersTwin

AUX = (1, 3)


def make_engine(folder, store, units=1, generate=None, **engine):
    recipe = parse_recipe(
        {
            "name": "t",
            "target": {"path": str(folder)},
            "prompts": {"sources": [{"path": "unused.jsonl"}]},
            "generate": {"max_new_tokens": 24} | (generate or {}),
            "engine": {
                "dtype": "float32",
                "max_model_len": 256,
                "max_num_seqs": 4,
                "kv_cache_memory_bytes": 64 << 20,
            }
            | engine,
        },
        "test",
    )
    target = load_target(folder)
    meta = StoreMeta(AUX, target.num_layers, target.hidden_size, "fp32", units, {})
    open_store(store, meta)
    return CaptureEngine(recipe, target, meta, store), target


def random_prompts(lengths, seed=0, prefix=()):
    rng = random.Random(seed)
    return [[*prefix, *(rng.randrange(5, 500) for _ in range(n))] for n in lengths]


def wanted(prompts, written):
    return [
        SequenceToKeep(answer.key, len(prompt), [False] * len(prompt), f"c{i}", "train")
        for i, (prompt, answer) in enumerate(zip(prompts, written))
    ]


def metric(engine, name):
    return next(m.value for m in engine.llm.get_metrics() if m.name == name)


def check_all(reader, twin, target):
    weight, eps = target.final_norm()
    for index in range(len(reader)):
        sample = reader[index]
        expected = twin.states(sample.ids[:-1].tolist(), reader.meta.layers)
        scale = expected.abs().amax(dim=(0, 2))[None, :, None]
        assert ((sample.states - expected).abs() / scale).max() < 1e-5
        assert (expected[:, 0] - expected[:, 1]).abs().max() > 1e-2
        answer = slice(sample.prompt_len - 1, None)
        predicted = teacher_argmax(
            sample.last[answer], weight, eps, target.lm_head(), target.logits
        )
        assert predicted.tolist() == sample.ids[sample.prompt_len :].tolist()
        assert sample.loss_mask.tolist() == [i >= sample.prompt_len for i in range(len(sample.ids))]


@pytest.fixture
def gemma(tmp_path):
    """Its logits are capped, and the plugin hands out its states."""
    return tiny.tiny_other(tmp_path / "gemma", "gemma3_text")


@pytest.mark.parametrize("kind", ["lfm2_moe", "granite", "gemma"])
def test_one_pass_gives_answers_and_the_states_that_wrote_them(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    store = tmp_path / "states"
    # A small batch budget cuts prompts into chunks that share steps with decoding; blocks of 32
    # let the second round find the shared beginning in the prefix cache.
    extra = {"max_num_batched_tokens": 48, "block_size": 32, "enable_prefix_caching": True}
    extra["disable_log_stats"] = False
    engine, target = make_engine(folder, store, units=2, extra=extra)
    try:
        shared = random_prompts([70], seed=9)[0]
        first = random_prompts([1, 5, 17, 100, 2, 33, 64, 3])
        first.append(shared)
        one = engine.generate(first, [0] * len(first))
        second = random_prompts([1, 4, 30], seed=2, prefix=shared)
        two = engine.generate(second, [0] * len(second))
        cached = metric(engine, "vllm:prefix_cache_hits")
        assert cached >= 64 * len(second)
        engine.save(0, wanted(first + second, one + two)[1:])  # not all that ran is wanted
        again = engine.generate(second, [0] * len(second))  # without what the first unit cached
        engine.save(1, wanted(second, again))
        engine.flush()
        twin = TransformersTwin(folder, torch.float32)
        for prompt, answer in zip(first + second, one + two):
            assert answer.ids == twin.greedy(prompt, 24, target.eos_token_ids)
        assert [a.ids for a in again] == [a.ids for a in two]
        # the first of the second unit found nothing: a unit stands for itself
        assert metric(engine, "vllm:prefix_cache_hits") < 2 * cached
    finally:
        engine.close()
    reader = StateReader(store)
    assert [len(unit.shards[0].tokens) for unit in reader.units] == [11, 3]
    check_all(reader, twin, target)
    for unit in reader.units:
        assert unit.checks["greedy_agree"] == unit.checks["greedy_checked"] > 0


def test_prefill_and_preemption(llama, tmp_path):
    """A cache too small for four sequences: some are thrown out and computed again."""
    store = tmp_path / "states"
    target = load_target(llama)
    token = 2 * target.num_layers * target.num_key_value_heads * target.head_dim * 4
    engine, target = make_engine(
        llama,
        store,
        units=2,
        generate={"max_new_tokens": 90},
        kv_cache_memory_bytes=token * 32 * 9,
        extra={"block_size": 32, "enable_prefix_caching": False, "disable_log_stats": False},
    )
    try:
        prompts = random_prompts([60, 50, 40, 60, 10])
        written = engine.generate(prompts, [0] * 5)
        assert metric(engine, "vllm:num_preemptions") > 0
        engine.save(0, wanted(prompts, written))
        sequences = [prompt + answer.ids for prompt, answer in zip(prompts, written)]
        keys = engine.prefill(sequences)
        engine.save(1, [replace(w, key=key) for w, key in zip(wanted(prompts, written), keys)])
        engine.flush()
        assert sum(len(a.ids) for a in written) > 200
    finally:
        engine.close()
    check_all(StateReader(store), TransformersTwin(llama, torch.float32), target)
