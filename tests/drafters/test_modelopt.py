"""A head that NVIDIA's ModelOpt itself made and exported."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from drafthead.drafters.export import convert_head
from drafthead.head.checkpoint import load_head
from drafthead.targets import load_target
from tests import tiny


def test_a_head_of_modelopts_own_exporter_is_read_and_converted(tmp_path):
    speculative = pytest.importorskip("modelopt.torch.speculative")
    from modelopt.torch.export import export_speculative_decoding

    folder = tiny.tiny_llama(tmp_path / "target", layers=12)
    model = AutoModelForCausalLM.from_pretrained(folder)
    shape = {
        **{"num_hidden_layers": 1, "draft_vocab_size": tiny.VOCAB, "intermediate_size": 128},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
        **{"use_aux_hidden_state": True, "parallel_draft_step": 1, "rope_scaling": None},
    }
    config = {"eagle_architecture_config": shape, "eagle_export_rope_scaling": {}}
    speculative.convert(model, [("eagle", config)])
    # ModelOpt counts layers from 0 and reads what each gives out; vLLM what the next one gets.
    outputs = model.eagle_config.eagle_aux_hidden_state_layer_ids
    export_speculative_decoding(model, export_dir=tmp_path / "head")
    target = load_target(folder)
    convert_head(tmp_path / "head", tmp_path / "out", target=target)
    head = load_head(tmp_path / "out").head
    assert head.config.aux_layer_ids == tuple(i + 1 for i in outputs)
    made = model.eagle_module.state_dict()
    for name in ("fc.weight", "norm.weight"):
        assert torch.equal(head.state_dict()[name], made[name]), name
