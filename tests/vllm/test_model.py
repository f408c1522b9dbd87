"""LFM2-MoE as the plugin registers it: answers and states are those of transformers."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Lfm2MoeForCausalLM

from tests.vllm.engines import answers, eagle3, engine, stress
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
