"""The patches that make steps cheaper change nothing else; decode graphs are for decodes."""

import importlib
import random
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from drafthead.vllm_plugin import (
    conv_metadata,
    draft_argmax,
    greedy_verify,
    prefill_graphs,
    registry,
    resumed_prefills,
)
from tests.vllm.engines import answers, counter, eagle3, engine, ngram, stress
from tests.vllm.models import write_head, write_target

K, ROWS, BLOCK = 3, 8, 32


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("hybrid"))


def _builders(target, monkeypatch, mode: str, count: int, patched: bool) -> list:
    """Metadata builders of ``count`` groups of conv layers, with full graphs and k = 3."""
    from vllm.config import CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backends.short_conv_attn import ShortConvAttentionMetadataBuilder
    from vllm.v1.kv_cache_interface import MambaSpec

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")  # no configuration of it without Triton
    config = EngineArgs(
        model=str(target),
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=ROWS,
        speculative_config=ngram(K),
    ).create_engine_config()
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config.compilation_config.max_cudagraph_capture_size = None
    config.cache_config.mamba_cache_mode = mode
    spec = MambaSpec(
        block_size=BLOCK,
        shapes=((2 + K, 64),),
        dtypes=(torch.float32,),
        mamba_cache_mode=mode,
        num_speculative_blocks=K,
    )
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1" if patched else "0")
    device = torch.device("cpu")
    return [ShortConvAttentionMetadataBuilder(spec, [], config, device) for _ in range(count)]


def _batch(rng: random.Random, columns: int) -> tuple[list, dict]:
    """One step: what the runner tells the builder of each of three groups.

    Mostly decodes; now and then a prompt's chunk or its last token; padded up to the graph's rows.
    """
    from vllm.v1.attention.backend import CommonAttentionMetadata

    rows = rng.randrange(1, ROWS + 1)
    prompts = 0 if rng.random() < 0.6 else rng.randrange(1, rows + 1)
    lengths = [1 + K if rng.random() < 0.8 else rng.randrange(1, K + 2)] * (rows - prompts)
    lengths += [rng.choice((1, 2, 1 + K, 9)) for _ in range(prompts)]
    computed = [rng.randrange(BLOCK, 150) for _ in range(rows - prompts)]
    computed += [rng.choice((0, 40)) for _ in range(prompts)]
    padded = rows if prompts else rng.randrange(rows, ROWS + 1)
    seq = [c + n for c, n in zip(computed, lengths)] + [0] * (padded - rows)
    start = np.concatenate([[0], np.cumsum(lengths), [sum(lengths)] * (padded - rows)])
    start = torch.tensor(start[: padded + 1], dtype=torch.int32)
    prefilling = torch.zeros(padded, dtype=torch.bool)
    prefilling[rows - prompts : rows] = True
    groups = []
    for _ in range(3):
        table = torch.zeros(padded, columns, dtype=torch.int32)
        table[:rows] = torch.tensor(
            [[rng.randrange(1, 500) for _ in range(columns)] for _ in range(rows)]
        )
        groups.append(
            CommonAttentionMetadata(
                query_start_loc=start,
                query_start_loc_cpu=start,
                seq_lens=torch.tensor(seq, dtype=torch.int32),
                seq_lens_cpu_upper_bound=torch.tensor(seq, dtype=torch.int32),
                num_reqs=padded,
                num_actual_tokens=sum(lengths),
                max_query_len=max(lengths),
                max_seq_len=256,
                block_table_tensor=table,
                slot_mapping=torch.zeros(sum(lengths), dtype=torch.int64),
                is_prefilling=prefilling,
            )
        )
    accepted = torch.ones(padded, dtype=torch.int32)
    accepted[:rows] = torch.tensor([rng.randrange(1, n + 1) for n in lengths])
    drafts = torch.full((padded,), -1, dtype=torch.int32)
    drafts[: rows - prompts] = torch.tensor(lengths[: rows - prompts], dtype=torch.int32) - 1
    return groups, {"num_accepted_tokens": accepted, "num_decode_draft_tokens_cpu": drafts}


def _plain(value):
    """``value`` with its tensors as their type and numbers."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


@pytest.mark.parametrize("mode", ["none", "align"])
def test_conv_metadata_is_what_every_group_would_build(target, monkeypatch, mode):
    from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor

    for replacement in conv_metadata.REPLACEMENTS:
        replacement.apply("conv_metadata")
    stock = _builders(target, monkeypatch, mode, 3, patched=False)
    patched = _builders(target, monkeypatch, mode, 3, patched=True)
    assert not any(b.supports_update_block_table for b in stock)
    assert all(b.supports_update_block_table for b in patched)
    rng = random.Random(0)
    kinds = set()
    for step in range(150):
        groups, counts = _batch(rng, 1 + K if mode == "none" else 256 // BLOCK + K)
        want = [b.build(0, m, **counts) for b, m in zip(stock, groups)]
        if mode == "align" and step % 3:  # as the model state does for builders that ask for it
            for builder, m in zip(patched, groups):
                builder.mamba_aligned_state_indices = mamba_get_block_table_tensor(
                    m.block_table_tensor, m.seq_lens, builder.kv_cache_spec, mode
                )
        first = patched[0].build(0, groups[0], **counts)
        others = [
            builder.update_block_table(first, m.block_table_tensor, m.slot_mapping)
            for builder, m in zip(patched[1:], groups[1:])
        ]
        kinds.add((want[0].num_decodes > 0, want[0].num_prefills > 0))
        for one, other in zip(want, [first, *others]):
            for field in fields(one):
                a, b = getattr(one, field.name), getattr(other, field.name)
                assert _plain(a) == _plain(b), field.name
        # Graphs hold the buffers' addresses: they may not depend on the batch.
        if not want[0].num_prefills:
            for builder, metadata in zip(patched, [first, *others]):
                held = metadata.state_indices_tensor_d.data_ptr()
                assert held == builder.state_indices_tensor_d.data_ptr()
                accepted = metadata.num_accepted_tokens.data_ptr()
                assert accepted == patched[0].decode_num_accepted_tokens.data_ptr()
    assert kinds == {(True, False), (False, True), (True, True)}


def test_drafts_are_the_same_when_chosen_in_the_draft_vocabulary(tmp_path, target):
    """vLLM's method and the scatter that the patch does without, in an engine each."""
    head = write_head(tmp_path, target, aux_layers=(2, 3, 6), repeats=True)
    accepted = []
    for chosen in (False, True):
        speculative = eagle3(head, K) | {"use_local_argmax_reduction": chosen}
        with engine(target, speculative) as llm:
            got = answers(llm, stress()[:24])
            accepted.append((got, counter(llm, "spec_decode_num_accepted_tokens")))
    assert accepted[0] == accepted[1]
    assert accepted[0][1] > 10


def test_draft_argmax_comes_with_every_head(monkeypatch):
    from drafthead.vllm_plugin import eagle3 as head_class

    applied = []
    monkeypatch.setattr(registry, "apply", applied.extend)
    importlib.reload(head_class)
    assert registry.named("draft_argmax") in applied


def test_draft_argmax_is_asked_for_where_it_may():
    def asked(**other) -> bool:
        model = SimpleNamespace(
            logits_processor=SimpleNamespace(scale=1.0),
            draft_id_to_target_id=torch.zeros(4),
            get_top_tokens=None,
        )
        facts = {"method": "eagle3", "draft_logits": None, "enable_adaptive_verification": False}
        facts |= {"use_local_argmax_reduction": False, "model": model}
        speculator = SimpleNamespace(**(facts | other))
        draft_argmax._asked_for(lambda self: None)(speculator)
        return speculator.use_local_argmax_reduction

    assert asked()
    assert not asked(method="mtp")
    assert not asked(draft_logits=torch.zeros(1))
    assert not asked(enable_adaptive_verification=True)
    assert not asked(model=SimpleNamespace(draft_id_to_target_id=None, get_top_tokens=None))


def test_greedy_verification_is_for_plain_greedy_requests():
    """The kernel itself is held against vLLM's sampler in test_newer_runner.py."""
    # Of three states the first two want their argmax, the third a temperature or something else.
    rows = np.array([0, 1])

    def plain(rows, temperature=0.0, processing=False, logprobs=-1, nans=False, key=None, fly=None):
        states = SimpleNamespace(
            temperature=SimpleNamespace(np=np.array([0.0, 0.0, temperature])),
            max_num_logprobs=lambda rows: max(np.array([-1, -1, logprobs])[rows]),
        )
        sampler = SimpleNamespace(
            sampling_states=states,
            needs_logits_processing=np.array([False, False, processing]),
            compute_nans=nans,
            return_sampling_mask=False,
        )
        rejection = {"sampler": sampler, "enable_adaptive_verification": False}
        if fly is not None:
            rejection["fly_window_size"] = fly
        return greedy_verify.is_plain_greedy(SimpleNamespace(watermark_key=key, **rejection), rows)

    assert plain(rows)
    for other in ({"temperature": 0.7}, {"processing": True}, {"logprobs": 3}):
        assert plain(rows, **other)  # of a request that is not in the batch
        assert not plain(np.array([0, 2]), **other)
    assert not plain(rows, nans=True)
    assert not plain(rows, key=1)
    assert plain(rows, fly=0)
    assert not plain(rows, fly=4)


@pytest.mark.parametrize(("computed", "uniform"), [([9, 12], None), ([9, 4], False)])
def test_decode_graphs_are_for_decodes(computed, uniform):
    """Two requests with prompts of 8 tokens, the second perhaps still in its prompt."""
    seen = []
    dispatch = prefill_graphs._by_prefill(
        lambda self, *, num_reqs, force_uniform_decode: seen.append(force_uniform_decode)
    )
    batch = SimpleNamespace(
        num_computed_tokens_cpu=np.array([*computed, 0]), num_prompt_tokens=np.array([8, 8, 8])
    )
    runner = SimpleNamespace(speculative_config=object(), input_batch=batch)
    dispatch(runner, num_reqs=2)
    dispatch(runner, num_reqs=2, force_uniform_decode=True)  # captures say what they capture
    runner.speculative_config = None
    dispatch(runner, num_reqs=2)
    assert seen == [uniform, True, None]


def test_resumed_requests_count_their_answer_as_prompt():
    """Until all of it is computed, wherever the row goes, and only while someone looks."""
    batch = SimpleNamespace(
        req_id_to_index={"a": 0, "b": 1, "c": 2},
        num_prompt_tokens=np.array([8, 8, 8]),
        num_computed_tokens_cpu=np.array([9, 10, 12]),
    )
    runner = SimpleNamespace(
        input_batch=batch, requests={r: SimpleNamespace(num_tokens=12) for r in "bc"}
    )
    step = SimpleNamespace(
        finished_req_ids=set(),
        preempted_req_ids=None,
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids={"b", "c"}),
    )
    seen = []

    def reorder(self, scheduler_output):
        seen.append(batch.num_prompt_tokens.tolist())
        batch.num_prompt_tokens[[0, 1]] = batch.num_prompt_tokens[[1, 0]]
        batch.num_computed_tokens_cpu[[0, 1]] = batch.num_computed_tokens_cpu[[1, 0]]
        batch.req_id_to_index |= {"a": 1, "b": 0}

    resumed_prefills._remember(reorder)(runner, step)
    assert seen == [[8, 12, 8]]  # "c" has everything
    assert batch.num_prompt_tokens.tolist() == [8, 8, 8]
    look = resumed_prefills._told(lambda self: seen.append(batch.num_prompt_tokens.tolist()))
    look(runner)
    assert seen[-1] == [12, 8, 8]
    step.scheduled_cached_reqs.resumed_req_ids, step.preempted_req_ids = set(), {"b"}
    resumed_prefills._remember(lambda self, out: None)(runner, step)
    look(runner)
    assert seen[-1] == [8, 8, 8]
