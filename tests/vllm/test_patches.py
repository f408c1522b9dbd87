"""The patches of scheduler, planner and batches, one by one."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Lfm2MoeConfig

from drafthead.vllm_plugin import (
    accepted_counts,
    batch_order,
    draft_kv_group,
    patch,
    placeholder_drafts,
    registry,
)
from tests.vllm.engines import answers, eagle3, engine, ngram
from tests.vllm.models import write_head, write_target


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
    model_runner = pytest.importorskip("vllm.v1.worker.gpu.model_runner")
    faulty = patch.original(model_runner, "sort_batch_req_ids")(rows, drafts, k + 1)
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


@pytest.mark.parametrize("compiled", [False, True])
def test_states_are_copies(compiled):
    """What is written into the stream after a state was taken of it does not reach the state."""
    from vllm.model_executor.models.interfaces import EagleModelMixin

    class Decoder(torch.nn.Module, EagleModelMixin):
        def forward(self, stream):
            states = []
            for layer in range(3):
                self._maybe_add_hidden_state(states, layer, stream, None)
                stream.add_(1.0)
            return self._maybe_add_hidden_state(states, 3, torch.zeros(2), stream)

    registry.apply([registry.named("aux_copies")])
    decoder = Decoder()
    decoder._set_aux_hidden_state_layers((0, 2, 3))
    forward = torch.compile(decoder, fullgraph=True, backend="eager") if compiled else decoder
    assert [state.tolist() for state in forward(torch.zeros(2))] == [[0, 0], [2, 2], [3, 3]]


@pytest.mark.parametrize("method", ["eagle3", "dflash", "dspark", "ngram"])
def test_the_group_of_any_head_is_looked_for(method):
    from vllm.config import SpeculativeConfig

    speculative = SimpleNamespace(method=method)
    speculative.use_eagle = lambda: SpeculativeConfig.use_eagle(speculative)
    config = SimpleNamespace(
        speculative_config=speculative, model_config=SimpleNamespace(is_hybrid=True)
    )
    looked_for = draft_kv_group._heads_too(lambda vllm_config: False)
    assert looked_for(config) == (method != "ngram")
    config.model_config.is_hybrid = False
    assert not looked_for(config)


def test_log_probabilities_of_given_tokens_leave_the_bonus_tokens_whole():
    """Stock vLLM raises, whoever else in the batch asked for log-probabilities."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import dispatcher
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    if not current_platform.is_cpu():
        pytest.skip("its kernels take tensors of the CPU there only")
    if not dispatcher._registry:
        current_platform.register_triton_kernel_overrides()
    registry.apply([registry.named("logprob_ids")])
    sampling = SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=2,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=torch.empty(0),
        presence_penalties=torch.empty(0),
        repetition_penalties=torch.empty(0),
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
        logprob_token_ids={0: [5, 6]},
    )
    logits = torch.eye(8)[[3, 4]]  # of one draft, 3, and of the token after it
    drafts = SpecDecodeMetadata.make_dummy([[3]], torch.device("cpu"))
    drafts.target_logits_indices, drafts.bonus_logits_indices = torch.tensor([[0], [1]])
    output = RejectionSampler(Sampler())(drafts, None, logits, sampling)
    assert output.sampled_token_ids.tolist() == [[3, 4]]
    assert output.logprobs_tensors.logprob_token_ids[:, 0].tolist() == [3, 4]
