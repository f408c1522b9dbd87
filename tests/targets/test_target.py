"""A target as it lies on disk: what is read from it, and what is refused."""

import json
import shutil

import docs_pages
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from drafthead.errors import DraftheadError
from drafthead.recipe import load_recipe
from drafthead.targets import load_target
from tests import tiny, wrappers
from tests.prove import crafted
from tests.refused import refused


@pytest.mark.parametrize("kind", ["llama", "lfm2", "lfm2_moe"])
def test_teacher_from_disk_is_transformers_logits(kind, request):
    """Norm and LM head read from the files give the model's own logits."""
    folder = request.getfixturevalue(kind)
    target = load_target(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(5, 25)[None]
    last = {}
    norm = model.model.embedding_norm if kind != "llama" else model.model.norm
    norm.register_forward_hook(lambda _m, args, _out: last.update(x=args[0]))
    logits = model(ids).logits
    weight, eps = target.final_norm()
    x = last["x"]
    normed = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))
    torch.testing.assert_close(normed @ target.lm_head().T, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(target.embedding(), model.get_input_embeddings().weight)


def test_reads_the_shape(llama, lfm2_moe):
    target = load_target(llama)
    assert (target.num_layers, target.hidden_size, target.vocab_size) == (6, 64, tiny.VOCAB)
    assert (target.num_attention_heads, target.num_key_value_heads, target.head_dim) == (2, 1, 32)
    assert target.default_aux_layers() == (2, 3)
    assert target.eos_token_ids == (4,)
    assert not target.tied_embeddings
    hybrid = load_target(lfm2_moe)
    assert hybrid.layer_types == ("conv", "conv", "full_attention") * 2
    assert hybrid.tied_embeddings
    assert hybrid.rms_norm_eps == 1e-5
    assert hybrid.rope_theta == 1_000_000.0


def test_fingerprint_changes_with_one_weight(tmp_path, llama):
    copy = tmp_path / "copy"
    shutil.copytree(llama, copy)
    assert load_target(copy).fingerprint == load_target(llama).fingerprint
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert load_target(copy).fingerprint != load_target(llama).fingerprint


@pytest.mark.parametrize(("layers", "named"), [([7], [7]), ([-1], [-1]), ([], 6), ([2, 2], [2, 2])])
def test_wrong_aux_layers(llama, layers, named):
    with refused("capture.aux_layers", named):
        load_target(llama).check_aux_layers(layers)


def test_aux_layers_are_sorted_as_vllm_sorts_them(llama):
    assert load_target(llama).check_aux_layers([5, 1]) == (1, 5)


@pytest.fixture
def copy(tmp_path, llama):
    folder = tmp_path / "target"
    shutil.copytree(llama, folder)
    return folder


def test_missing_folder_and_files(tmp_path, copy):
    with refused("nowhere"):
        load_target(tmp_path / "nowhere")
    with refused("target/config.json"):
        load_target(copy / "config.json")
    (copy / "model.safetensors").unlink()
    with refused("*.safetensors"):
        load_target(copy)
    (copy / "config.json").unlink()
    with refused("config.json"):
        load_target(copy)


def test_a_draft_head_is_no_target(copy, tmp_path):
    with pytest.raises(DraftheadError) as refused:
        load_target(crafted.head(tmp_path / "head", copy))
    assert refused.value.field == "draft_vocab_size"


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000])
def test_truncated_weights(copy, keep):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with refused("model.safetensors"):
        load_target(copy)


def test_broken_config_and_missing_shard(copy):
    (copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    )
    with refused("model-00001-of-00002.safetensors"):
        load_target(copy)
    (copy / "config.json").write_text("{")
    with refused("config.json"):
        load_target(copy)


@pytest.mark.parametrize(
    "field", ["logits_scaling", "lm_head_multiplier", "dim_model_base", "output_multiplier"]
)
def test_logits_of_an_unknown_kind_are_refused(copy, field):
    config = json.loads((copy / "config.json").read_text())
    config[field] = 8.0
    (copy / "config.json").write_text(json.dumps(config))
    with refused("config.json", field, "llama"):
        load_target(copy)


@pytest.mark.parametrize(
    ("name", "read"), [("model.norm.bias", "final_norm"), ("lm_head.bias", "lm_head")]
)
def test_a_bias_on_the_way_to_logits_is_refused(copy, name, read):
    tensors = load_file(copy / "model.safetensors")
    tensors[name] = torch.zeros(64)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with refused(name):
        getattr(load_target(copy), read)()


@pytest.mark.parametrize("trusted", [False, True])
def test_code_comes_from_the_hub_only_if_it_may_run(copy, monkeypatch, trusted):
    wanted = []

    def download(repo, *, allow_patterns, **_):
        wanted.extend(allow_patterns)
        return str(copy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    load_target("owner/name", trust_remote_code=trusted)
    assert ("*.py" in wanted) == trusted


@pytest.mark.parametrize("text", ["{", "[]"])
@pytest.mark.parametrize("name", ["generation_config.json", "hf_quant_config.json"])
def test_what_was_fetched_in_part_is_named(copy, name, text):
    (copy / name).write_text(text)
    with refused(name):
        assert load_target(copy).eos_token_ids


def test_unknown_architecture_is_refused(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.other_norm.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with refused("norm.weight"):
        load_target(copy).final_norm()


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_tokenizer_missing(copy, model_type):
    """Of Qwen2 transformers makes one without tokens then."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    with refused("tokenizer"):
        load_target(copy).tokenizer()


CODE = """\
from transformers import LlamaConfig


class MyConfig(LlamaConfig):
    model_type = "my_llama"
"""


@pytest.fixture
def with_code(copy):
    """A target whose configuration is a class that comes with it."""
    config = json.loads((copy / "config.json").read_text())
    code = {"model_type": "my_llama", "auto_map": {"AutoConfig": "configuration_my.MyConfig"}}
    (copy / "config.json").write_text(json.dumps(config | code))
    (copy / "configuration_my.py").write_text(CODE)
    return copy


def test_code_of_a_targets_own_runs_only_if_it_may(with_code, drafthead, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DraftheadError) as refused:
        load_target(with_code)
    for name in ("configuration_my.py", "--trust-remote-code", "target.trust_remote_code"):
        assert name in str(refused.value)
    assert load_target(with_code, trust_remote_code=True).num_layers == 6
    init = ("init", str(with_code), "--prompts", "none.jsonl")
    assert drafthead(*init)[0] == 2
    assert drafthead(*init, "--trust-remote-code")[0] == 0
    assert load_recipe("recipe.yaml").target.trust_remote_code


@pytest.mark.parametrize("command", ["init", "inspect", "quantize"])
def test_what_takes_a_target_can_be_told_to_trust_it(command):
    params = docs_pages.commands()[f"drafthead {command}"].params
    assert "--trust-remote-code" in {option for param in params for option in param.opts}


@pytest.mark.parametrize(
    ("files", "fix"),
    [
        (["model-Q4_K_M.gguf"], "gguf_file='model-Q4_K_M.gguf'"),
        (["adapter_config.json", "adapter_model.safetensors"], "merge_and_unload"),
        (["config.json", "pytorch_model-00001-of-00002.bin"], "save_pretrained"),
    ],
)
def test_other_formats_are_refused_with_the_way_to_this_one(tmp_path, files, fix):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DraftheadError) as refused:
        load_target(tmp_path)
    assert fix in str(refused.value)
    if files[0].endswith(".gguf"):
        with pytest.raises(DraftheadError) as refused:
            load_target(tmp_path / files[0])
        assert fix in str(refused.value)


def reconfigure(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def change(folder, change):
    """Have ``change`` at the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_size", 500), ("hidden_size", 32), ("num_hidden_layers", 4), ("num_hidden_layers", 8)],
)
def test_a_configuration_of_another_size_than_the_weights_is_refused(copy, field, value):
    reconfigure(copy, **{field: value})
    with refused(field, value):
        load_target(copy)


def test_layers_of_multi_token_prediction_are_no_other_size(copy):
    change(copy, lambda t: t.update({"model.layers.6.eh_proj.weight": torch.zeros(2, 2)}))
    with refused("num_hidden_layers", 6, 7):
        load_target(copy)
    reconfigure(copy, num_nextn_predict_layers=1)
    assert load_target(copy).num_layers == 6


def test_an_lm_head_of_another_vocabulary_is_refused(copy):
    change(copy, lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:500].clone()}))
    with refused("vocab_size", 512, "lm_head.weight", 500):
        load_target(copy)


def test_weights_and_configuration_must_agree_whether_they_are_tied(copy):
    reconfigure(copy, tie_word_embeddings=True)
    with refused("tie_word_embeddings", "true", "lm_head.weight"):
        load_target(copy)
    change(copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load_target(copy)  # saved twice
    change(copy, lambda t: t.pop("lm_head.weight"))
    assert load_target(copy).tied_embeddings
    reconfigure(copy, tie_word_embeddings=False)
    with refused("tie_word_embeddings", "false", "lm_head.weight"):
        load_target(copy)


def test_two_targets_in_one_folder_are_refused(copy):
    shutil.copy(copy / "model.safetensors", copy / "other.safetensors")
    with refused("model.safetensors", "other.safetensors"):
        load_target(copy)


def test_weights_in_pickles_beside_safetensors_are_not_read(copy):
    (copy / "pytorch_model.bin").write_bytes(b"another copy of the weights")
    assert [file.name for file in load_target(copy).tensors.files] == ["model.safetensors"]


def test_overrides_replace_fields_as_in_vllm(copy, tmp_path):
    overrides = {"max_position_embeddings": 2048, "rope_parameters": {"rope_theta": 5.0}}
    target = load_target(copy, overrides=overrides)
    assert target.max_position_embeddings == 2048
    assert target.rope_theta == 5.0
    folder = wrappers.write("mistral3", tmp_path / "wrapper")
    nested = load_target(folder, overrides={"text_config": {"max_position_embeddings": 2048}})
    assert nested.max_position_embeddings == 2048
    assert nested.hidden_size == 64


@pytest.mark.parametrize("value", ["<|im_end|>", [[4]], -1, [4, 1.5], True])
def test_an_end_token_that_is_no_id_is_refused(copy, value):
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with refused("generation_config.json", "eos_token_id"):
        assert load_target(copy).eos_token_ids


def test_an_embedding_that_is_no_matrix_or_not_there_is_refused_at_once(copy):
    name = "model.embed_tokens.weight"
    change(copy, lambda t: t.update({name: t[name].flatten()}))
    with refused("embed_tokens.weight", [32768]):
        load_target(copy)
    change(copy, lambda t: t.pop(name))
    with refused("embed_tokens.weight"):
        load_target(copy)
