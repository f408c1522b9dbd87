"""The plugin's mends one by one, each against its plain twin or the fault it removes."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM

from drafthead import vllm_plugin
from drafthead.vllm_plugin import (
    accepted_counts,
    batch_order,
    cpu_expand,
    cpu_kernel_registry,
    cpu_rope,
    cpu_short_conv,
    draft_kv_group,
    patch,
    placeholder_drafts,
)
from tests.vllm.engines import answers, eagle3, engine, ngram, stress
from tests.vllm.models import write_head, write_target


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("hybrid"))


@pytest.fixture(scope="module")
def head(tmp_path_factory, target):
    folder = tmp_path_factory.mktemp("head")
    # Id 0 is the embedding's output, id 6 the last stream.
    return write_head(folder, target, aux_layers=(0, 1, 3, 6), repeats=True)


@pytest.fixture(scope="module")
def reference(target):
    model = Lfm2MoeForCausalLM.from_pretrained(target, dtype=torch.float32)
    return model.eval()


def _worker(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def test_plain_answers_are_those_of_transformers(target, reference):
    """Rotary embedding, convolution and experts on the CPU."""
    requests = [(ids, 12) for ids, _ in stress()[:24]]
    with engine(target) as llm:
        written = answers(llm, requests)
    for (ids, tokens), got in zip(requests, written):
        with torch.no_grad():
            logits = reference(torch.tensor([ids + got])).logits[0, len(ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == got, (len(ids), tokens)


def test_aux_states_are_those_of_transformers(target, head, reference):
    requests = [(ids, 6) for ids, _ in stress()[10:18]]
    seen: dict[int, list[torch.Tensor]] = {}
    with engine(target, eagle3(head, 2), max_num_seqs=1) as llm:
        decoder = _worker(llm).model_runner.model.model
        forward = decoder.forward

        def recording(input_ids, positions, *rest, **named):
            hidden, aux = forward(input_ids, positions, *rest, **named)
            for row, position in enumerate(positions.tolist()):
                # A later step overwrites the states of rejected drafts.
                seen[position] = [state[row].clone() for state in aux]
            return hidden, aux

        decoder.forward = recording
        for ids, tokens in requests:
            seen.clear()
            got = answers(llm, [(ids, tokens)])[0]
            sequence = (ids + got)[:-1]
            with torch.no_grad():
                states = reference.model(
                    torch.tensor([sequence]), output_hidden_states=True
                ).hidden_states
            for position in range(len(sequence)):
                for aux_id, state in zip((0, 1, 3), seen[position]):
                    torch.testing.assert_close(
                        state, states[aux_id][0, position], rtol=1e-4, atol=1e-4
                    )
                # transformers' last hidden state is normed; ours is what enters the norm.
                normed = reference.model.embedding_norm(seen[position][3])
                torch.testing.assert_close(normed, states[-1][0, position], rtol=1e-3, atol=1e-3)


def test_aux_states_cross_pipeline_stages(monkeypatch):
    """Two stages, one after the other, give what one stage gives."""
    from vllm.distributed import parallel_state

    from drafthead.vllm_plugin import lfm2

    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, 4, generator=generator) for _ in range(6)]

    def layer(weight):
        # As vLLM's layers: the sum so far is the residual, which the norm writes in place.
        def forward(positions, hidden_states, residual):
            residual = hidden_states if residual is None else residual.add_(hidden_states)
            return torch.tanh(residual) @ weight, residual

        return forward

    def norm(hidden, residual):
        residual += hidden
        return torch.tanh(residual), residual

    class Stage(lfm2._AuxStates):
        layers = [layer(w) for w in weights]  # noqa: RUF012
        embedding_norm = staticmethod(norm)

        def embed_input_ids(self, ids):
            return torch.sin(ids[:, None] * torch.arange(1.0, 5.0))

    def run(stages, ids):
        received = None
        for number, (first, last) in enumerate(stages):
            group = SimpleNamespace(
                world_size=len(stages),
                is_first_rank=number == 0,
                is_last_rank=number == len(stages) - 1,
            )
            monkeypatch.setattr(parallel_state, "get_pp_group", lambda group=group: group)
            monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: True)
            monkeypatch.setattr(lfm2, "get_pp_group", lambda group=group: group)
            stage = Stage()
            stage.start_layer, stage.end_layer = first, last
            stage._set_aux_hidden_state_layers((0, 2, 3, 5, 6))
            before = received
            received = stage.forward(ids, torch.arange(len(ids)), received)
            if before is not None and not group.is_last_rank:
                # What a stage in the middle passes on is the runner's part.
                received.tensors |= {
                    name: t for name, t in before.tensors.items() if name.startswith("aux")
                }
        return received

    ids = torch.tensor([3.0, 1.0, 4.0])
    hidden, aux = run([(0, 6)], ids)
    assert len(aux) == 5
    torch.testing.assert_close(aux[0], Stage().embed_input_ids(ids))
    for stages in ([(0, 3), (3, 6)], [(0, 2), (2, 5), (5, 6)]):
        other, others = run(stages, ids)
        torch.testing.assert_close(other, hidden)
        torch.testing.assert_close(others, aux)


def test_pipeline_with_the_older_runner_is_refused():
    from drafthead.vllm_plugin import lfm2

    config = SimpleNamespace(
        speculative_config=SimpleNamespace(method="eagle3"),
        parallel_config=SimpleNamespace(pipeline_parallel_size=2),
        use_v2_model_runner=False,
    )
    with pytest.raises(ValueError, match="pipeline_parallel_size=2"):
        lfm2.Lfm2MoeForCausalLM(vllm_config=config)


def test_draft_group_is_found_and_states_fit_their_pages(tmp_path):
    """Stock vLLM ends with an assertion on these sizes at k = 3."""
    target = write_target(tmp_path / "target", hidden=512, head_dim=64, kv_heads=1, layers=3)
    head = write_head(tmp_path / "head", target, aux_layers=(1, 2, 3), repeats=True)
    with engine(target, eagle3(head, 7), block_size=32, enable_prefix_caching=True) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        coordinator = scheduler.kv_cache_manager.coordinator
        groups = scheduler.kv_cache_config.kv_cache_groups
        drafts = [
            i for i, g in enumerate(groups) if "model.layers.3.self_attn.attn" in g.layer_names
        ]
        assert coordinator.eagle_group_ids == set(drafts)
        assert len(answers(llm, [([5, 6, 7], 8)])[0]) == 8


@pytest.mark.parametrize("cache_dtype", ["auto", "fp8"])
def test_pages_hold_the_states_at_every_k(tmp_path, cache_dtype):
    """At the shapes of LFM2.5-8B-A1B; stock pages are too small from k = 7 (fp8: k = 3) on."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms.interface import Platform
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    layers = ["full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)]
    Lfm2MoeConfig(
        architectures=["Lfm2MoeForCausalLM"],
        num_hidden_layers=24,
        layer_types=layers,
        vocab_size=128000,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    for k in range(1, 8):
        config = EngineArgs(
            model=str(tmp_path),
            skip_tokenizer_init=True,
            max_model_len=4096,
            speculative_config=ngram(k),
        ).create_engine_config()
        config.cache_config.cache_dtype = cache_dtype
        config.cache_config.block_size = 16
        Platform._align_hybrid_block_size(config, TritonAttentionBackend)
        state = (2 + k) * 2048 * 2  # columns, width, bytes in bf16
        element = 2 if cache_dtype == "auto" else 1
        page = config.cache_config.block_size * 2 * 8 * 64 * element
        assert page >= state, k
        assert config.cache_config.mamba_page_size_padded in (page, None)


def test_verify_rows_of_the_convolution():
    """Against one token at a time with nothing but the true inputs, whatever was rejected."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    taps, dim, k, requests, steps = 3, 8, 4, 5, 12
    weight, bias = random(dim, taps), random(dim)
    state = torch.full((requests + 1, dim, taps - 1 + k), float("nan"))
    slots = torch.randperm(requests, generator=generator) + 1
    state[:, :, : taps - 1] = 0
    history = [torch.zeros(taps - 1, dim) for _ in range(requests)]
    accepted = torch.ones(requests, dtype=torch.int32)
    for _ in range(steps):
        lengths = torch.randint(1, k + 2, (requests,), generator=generator)
        start = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
        x = random(int(start[-1]), dim)
        got = cpu_short_conv.causal_conv1d_verify(x, state, weight, bias, slots, accepted, start)
        for request in range(requests):
            rows = x[start[request] : start[request + 1]]
            inputs = torch.cat([history[request], rows])
            want = [(inputs[i : i + taps] * weight.T).sum(0) + bias for i in range(rows.shape[0])]
            torch.testing.assert_close(got[start[request] : start[request + 1]], torch.stack(want))
            accepted[request] = torch.randint(1, rows.shape[0] + 1, (1,), generator=generator)
            history[request] = inputs[accepted[request] : accepted[request] + taps - 1]


def test_rope_on_the_cpu_rotates_every_head():
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    cpu_rope.apply()
    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(
            32,
            max_position=64,
            rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
            is_neox_style=True,
            dtype=torch.float32,
        )
    positions = torch.tensor([3, 9, 31])
    query, key = torch.randn(3, 4, 32), torch.randn(3, 2, 32)
    want = rope.forward_native(positions, query.clone(), key.clone())
    got = rope.forward_cpu(positions, query.clone(), key.clone())
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other)


def test_temperatures_of_drafts_on_the_cpu():
    from vllm.utils import cpu_triton_utils

    cpu_expand.apply()
    cu = torch.tensor([3, 3, 5], dtype=torch.int32)  # three drafts, none, two
    for values, want in (
        (torch.tensor([0.7, 2.0, 0.0]), torch.tensor([0.7, 0.7, 0.7, 1.0, 1.0])),
        (torch.tensor([40, 7, 0]), torch.tensor([40, 40, 40, 1, 1])),
    ):
        output = torch.full((5,), 9, dtype=values.dtype)
        cpu_triton_utils._expand_kernel_impl(output, values, cu, 0, 1, MAX_NUM_TOKENS=16)
        torch.testing.assert_close(output, want)


def _split_by_first_prefill(order, rows, prefilling, k):
    """Requests that vLLM's metadata of short-conv layers treats as prefills, for a batch order."""
    first = next((i for i, r in enumerate(order) if prefilling[r] or rows[r] > k + 1), len(order))
    return set(order[first:])


def test_batch_order_keeps_decodes_before_prefills():
    k = 3
    # "b" verifies two drafts, "c" got no draft, "d" is a prompt as wide as a verify step.
    rows = {"a": 4, "b": 3, "c": 1, "d": 4, "e": 9, "f": 2}
    drafts = {"a": [1, 1, 1], "b": [1, 1]}
    prefilling = {r: r in "def" for r in rows}
    order = batch_order.sort_batch_req_ids(rows, drafts, k + 1)
    assert order == ["a", "b", "c", "f", "d", "e"]
    assert _split_by_first_prefill(order, rows, prefilling, k) == {"d", "e", "f"}
    stock = pytest.importorskip("vllm.v1.worker.gpu.model_runner").sort_batch_req_ids
    stock = getattr(stock, "_drafthead_mend", stock)
    faulty = stock(rows, drafts, k + 1)
    assert "c" in _split_by_first_prefill(faulty, rows, prefilling, k)


@pytest.mark.parametrize("newer_runner", [False, True])
@pytest.mark.parametrize("hybrid", [False, True])
def test_placeholder_drafts(hybrid, newer_runner):
    scheduler = SimpleNamespace(
        has_mamba_layers=hybrid,
        use_v2_model_runner=newer_runner,
        requests={
            "fresh": SimpleNamespace(num_computed_tokens=0),
            "cached": SimpleNamespace(num_computed_tokens=64),
            "running": SimpleNamespace(num_computed_tokens=9),
        },
    )
    output = SimpleNamespace(
        scheduled_spec_decode_tokens={"fresh": [-1] * 3, "cached": [-1] * 3, "running": [4, 5, 6]},
        scheduled_new_reqs=[SimpleNamespace(req_id="fresh"), SimpleNamespace(req_id="cached")],
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
        num_scheduled_tokens={"fresh": 4, "cached": 4, "running": 4},
        total_num_scheduled_tokens=12,
    )
    placeholder_drafts._without_placeholders(lambda self, out: None)(scheduler, output)
    kept = {"running", "cached", "fresh"}
    if hybrid:
        kept = {"running", "cached"} if newer_runner else {"running"}
    assert output.scheduled_spec_decode_tokens.keys() == kept
    assert output.num_scheduled_tokens == {
        name: 4 if name in kept else 1 for name in ("fresh", "cached", "running")
    }
    assert output.total_num_scheduled_tokens == sum(output.num_scheduled_tokens.values())


def test_counts_of_requests_that_sit_out():
    """Kept while a request is out of the batch, forgotten when it is preempted or ends."""
    counts = torch.tensor([3, 2, 4], dtype=torch.int32)
    runner = SimpleNamespace(
        num_accepted_tokens_event=SimpleNamespace(synchronize=lambda: None),
        use_async_scheduling=False,
        cache_config=SimpleNamespace(mamba_cache_mode="none"),
        input_batch=SimpleNamespace(
            req_id_to_index={"a": 0, "b": 1, "c": 2}, num_accepted_tokens_cpu=counts.numpy()
        ),
        num_accepted_tokens=SimpleNamespace(np=counts.clone().numpy(), gpu=counts.clone()),
    )
    step = SimpleNamespace(
        finished_req_ids={"c"},
        preempted_req_ids=None,
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
        num_scheduled_tokens={"a": 4},
    )
    accepted_counts._keep_counts(lambda self, out: None)(runner, step)
    # "b" comes back in another row, where the stock runner writes 1.
    runner.input_batch.req_id_to_index = {"a": 0, "b": 2}

    def stock(self, out):
        self.input_batch.num_accepted_tokens_cpu[2] = 1
        self.num_accepted_tokens.gpu[2] = 1

    accepted_counts._restore_counts(stock)(runner, step)
    assert runner.input_batch.num_accepted_tokens_cpu.tolist() == [3, 2, 2]
    assert runner.num_accepted_tokens.gpu.tolist() == [3, 2, 2]
    assert runner._drafthead_accepted == {}


def test_vars_of_anything():
    class Odd:
        def __getattr__(self, name):
            return lambda: None

        @property
        def __dict__(self):
            return lambda: None

    assert cpu_kernel_registry.attributes(Odd()) == {}
    assert cpu_kernel_registry.attributes(SimpleNamespace(kernel=1)) == {"kernel": 1}


def test_registering_twice_changes_nothing():
    from vllm.v1.core.sched.scheduler import Scheduler

    vllm_plugin.register()
    once = Scheduler._update_after_schedule
    vllm_plugin.register()
    assert Scheduler._update_after_schedule is once


@pytest.mark.parametrize(
    "mend", [placeholder_drafts, batch_order, accepted_counts, draft_kv_group, cpu_kernel_registry]
)
def test_mend_steps_aside(mend, monkeypatch, caplog):
    """When the fault's text is gone from vLLM, nothing is replaced."""
    replaced = []
    monkeypatch.setattr(mend, "FAULT", "text that no vLLM has", raising=True)
    monkeypatch.setattr(mend, "wrap", lambda *_: replaced.append(1), raising=False)
    monkeypatch.setattr(mend, "_shadow_vars", lambda *_: replaced.append(1), raising=False)
    said = []
    monkeypatch.setattr(patch.log, "info_once", lambda text, *values: said.append(text % values))
    mend.apply()
    assert not replaced
    assert len(said) == 1
    assert "steps aside" in said[0]


def test_unknown_vllm_warns(monkeypatch):
    import vllm

    warned = []
    monkeypatch.setattr(vllm, "__version__", "0.40.1")
    monkeypatch.setattr(
        patch.log, "warning_once", lambda text, *values: warned.append(text % values)
    )
    vllm_plugin.register()
    assert "0.40.1" in warned[0]
    monkeypatch.setattr(vllm, "__version__", "0.32.3")
    vllm_plugin.register()
    assert len(warned) == 1


def test_mends_can_be_left_out(monkeypatch):
    monkeypatch.setenv("DRAFTHEAD_SKIP_MENDS", "cpu_rope,batch_order")
    assert vllm_plugin.skipped("cpu_rope")
    assert not vllm_plugin.skipped("cpu_short_conv")
    monkeypatch.setenv("DRAFTHEAD_SKIP_MENDS", "all")
    assert vllm_plugin.skipped("cpu_short_conv")


def test_other_models_are_left_alone():
    from vllm import ModelRegistry

    vllm_plugin.register()
    assert ModelRegistry.models["LlamaForCausalLM"].module_name.startswith("vllm.")
    assert ModelRegistry.models["Lfm2MoeForCausalLM"].module_name == "drafthead.vllm_plugin.lfm2"
