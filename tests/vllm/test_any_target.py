"""EAGLE-3 on targets for which vLLM has no hook: states and answers are those of transformers."""

import re
from itertools import islice

import pytest
import torch
from vllm import ModelRegistry
from vllm.model_executor.models.registry import _RegisteredModel
from vllm.plugins import load_general_plugins

from drafthead.doctor import engine as doctor_engine
from drafthead.vllm_plugin import any_target, models_without_hook
from tests.reference.transformers_twin import TransformersTwin
from tests.vllm import unhooked
from tests.vllm.engines import answers, counter, eagle3, engine, norms_write_in_place, stress
from tests.vllm.models import write_head

AUX = (0, 2, 4)  # what the first layer gets, the middle, and what the last layer gives
ONE_BY_ONE = [(ids, 6) for ids, _ in stress()[10:12]]
TOGETHER = [(ids, tokens) for ids, tokens in stress(seed=3) if tokens > 2][:8]


def check_states(llm, twin):
    """Of each position of each answer, those of the last step that computed it."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    model = worker.model_runner.model
    forward, seen = model.forward, {}

    def recording(input_ids, positions, *others, **named):
        hidden, aux = forward(input_ids, positions, *others, **named)
        # M-RoPE has three rows of them, which are the same for text.
        rows = positions.view(-1, positions.shape[-1])[0].tolist()
        for row, position in enumerate(rows):
            if position != rows[0] + row:  # on a GPU a batch is padded
                break
            seen[position] = torch.stack([state[row] for state in aux]).cpu()
        return hidden, aux

    model.forward = recording
    for ids, tokens in ONE_BY_ONE:
        seen.clear()
        sequence = (ids + answers(llm, [(ids, tokens)])[0])[:-1]
        got = torch.stack([seen[position] for position in range(len(sequence))])
        expected = twin.states(sequence, AUX)
        scale = expected.abs().amax(dim=(0, 2))[None, :, None]
        apart = ((got - expected).abs() / scale).amax(dim=(0, 2))
        # A GPU's products are in TF32, which alone moves these random targets by up to 6e-3; what
        # enters the first layer is of none.
        after_products = 1e-2 if torch.cuda.is_available() else 1e-5
        assert (apart < torch.tensor([1e-5, after_products, after_products])).all()
    model.forward = forward


def check_answers(llm, twin):
    for (ids, tokens), got in zip(TOGETHER, answers(llm, TOGETHER)):
        assert len(got) == tokens
        with torch.no_grad():
            logits = twin.model(torch.tensor([ids + got])).logits[0, len(ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == got


def inspected(architecture, monkeypatch):
    """The class that vLLM would serve, looked at in this process."""
    load_general_plugins()
    # At a class that is registered by name, as it is now, vLLM looks in a process of its own.
    made = _RegisteredModel.from_model_cls(ModelRegistry.models[architecture].load_model_cls())
    monkeypatch.setitem(ModelRegistry.models, architecture, made)
    return made.model_cls


@pytest.mark.parametrize(
    ("architecture", "k"),
    [(name, 1 + 2 * (i % 2)) for i, name in enumerate(unhooked.SETTINGS)],
)
def test_states_and_answers(architecture, k, tmp_path, monkeypatch):
    assert inspected(architecture, monkeypatch) is getattr(any_target, architecture)
    norms_write_in_place(monkeypatch)
    target = unhooked.write(architecture, tmp_path / "target")
    head = write_head(tmp_path / "head", target, aux_layers=AUX, repeats=True)
    twin = TransformersTwin(target, torch.float32)
    with engine(target, eagle3(head, k)) as llm:
        check_states(llm, twin)
        check_answers(llm, twin)
        accepted = counter(llm, "spec_decode_num_accepted_tokens")
        assert 10 < accepted < counter(llm, "spec_decode_num_draft_tokens")


class _Layer(torch.nn.Module):
    """As vLLM's: writes into what it is given, adds the sum so far itself or leaves that to the
    next."""

    def __init__(self, whole):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.whole = whole

    def forward(self, positions, hidden, residual):
        if residual is None:
            residual = hidden
        elif not self.whole:
            residual.add_(hidden)
        else:
            residual = hidden
        out = self.linear(torch.tanh(residual) + positions[:, None])
        return (residual.add_(out) if self.whole else out), residual


class _Decoder(torch.nn.Module):
    def __init__(self, whole):
        super().__init__()
        self.layers = torch.nn.ModuleList(_Layer(whole) for _ in range(4))
        self.end_layer, self.whole = 4, whole

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        hidden, residual = torch.sin(input_ids[:, None] * torch.arange(1.0, 9.0)), None
        for layer in islice(self.layers, 0, self.end_layer):
            hidden, residual = layer(positions, hidden, residual)
        return torch.tanh(hidden if self.whole else residual.add_(hidden))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_states_are_outputs_of_the_graph(whole, compiled):
    torch.manual_seed(0)
    decoder = any_target.noting(_Decoder, whole)(whole).requires_grad_(False)
    stock = decoder.forward
    forward = torch.compile(stock, fullgraph=True, backend="eager") if compiled else stock
    ids, positions = torch.tensor([3.0, 1.0, 4.0]), torch.arange(3)
    expected = decoder(ids, positions)
    assert isinstance(expected, torch.Tensor)
    decoder._set_aux_hidden_state_layers((4, 0, 2))
    hidden, states = forward(ids, positions)
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(states[0], torch.sin(ids[:, None] * torch.arange(1.0, 9.0)))
    torch.testing.assert_close(torch.tanh(states[2]), expected)
    streams = [states[0]]
    for layer in decoder.layers:
        streams.append(streams[-1] + layer.linear(torch.tanh(streams[-1]) + positions[:, None]))
    torch.testing.assert_close(states, [streams[i] for i in (0, 2, 4)])


@pytest.mark.parametrize(
    ("architecture", "printed"),
    [
        ("MixtralForCausalLM", "drafthead"),
        ("LlamaForCausalLM", "vllm"),
        ("OPTForCausalLM", "nobody"),
    ],
)
def test_doctor_knows_who_brings_it(architecture, printed, capsys):
    """Its process, in this one."""
    extra = ["enforce_eager", "enforce_eagr"]
    exec(doctor_engine._HOOK, {"architecture": architecture, "extra": extra})
    out = capsys.readouterr().out
    assert f"hook {printed}\n" in out
    assert re.findall("^unknown .*", out, re.M) == ['unknown ["enforce_eagr", "enforce_eager"]']


def test_every_class_is_tested():
    multimodal = {"Gemma3ForConditionalGeneration"}  # test_multimodal.py
    assert unhooked.SETTINGS.keys() | multimodal == any_target.MODULES.keys()


def test_a_card_knows_every_architecture_that_gets_the_hook():
    any_target.apply()
    models = ModelRegistry.models.items()
    ours = {name for name, model in models if model.module_name == any_target.__name__}
    assert ours == models_without_hook.ARCHITECTURES


def test_pipeline_is_refused(monkeypatch):
    target = object.__new__(any_target.MixtralForCausalLM)
    monkeypatch.setattr(any_target, "get_pp_group", lambda: type("Group", (), {"world_size": 2}))
    with pytest.raises(ValueError, match="pipeline_parallel_size=2"):
        target.set_aux_hidden_state_layers((1,))


def test_steps_aside_where_vllm_has_the_hook(monkeypatch):
    from vllm.model_executor.models import llama

    monkeypatch.setattr(any_target, "MODULES", {"LlamaForCausalLM": "llama"})
    decoder = llama.LlamaModel
    assert any_target.with_hook("LlamaForCausalLM") is llama.LlamaForCausalLM
    assert llama.LlamaModel is decoder
