"""NVFP4 checkpoints in real vLLM on the CPU, and what its GPU configuration takes as quantized."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from drafthead.vllm_plugin import registry
from tests.nvfp4 import dense_folder, pack_folder

PROMPTS = [[5 + i, 9, 30, 7 * i + 9, 77][: 1 + i % 5] for i in range(8)]


def greedy(folder):
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        max_model_len=128,
        skip_tokenizer_init=True,
    )
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs]


@pytest.mark.parametrize("kind", ["llama", "lfm2_moe"])
def test_cpu_serves_the_values_of_the_definition(kind, request, tmp_path):
    source = request.getfixturevalue(kind)
    packed = pack_folder(source, tmp_path / "nvfp4", ["lm_head"])
    expected = greedy(dense_folder(packed, tmp_path / "dense"))
    assert greedy(packed) == expected
    assert greedy(source) != expected  # or the test would not see the quantization at all


def test_expanding_waits_for_all_parts_of_a_weight(lfm2_moe, tmp_path):
    from drafthead.vllm_plugin.nvfp4_cpu import expand

    packed = pack_folder(lfm2_moe, tmp_path / "nvfp4", [])
    stored = load_file(packed / "model.safetensors")
    dense = load_file(dense_folder(packed, tmp_path / "dense") / "model.safetensors")
    order = torch.randperm(len(stored), generator=torch.Generator().manual_seed(0))
    names = list(stored)
    found = dict(expand((names[i], stored[names[i]]) for i in order))
    assert found.keys() == dense.keys()
    assert all(torch.equal(found[name], dense[name]) for name in dense)
    del stored["model.layers.2.self_attn.q_proj.weight_scale_2"]
    with pytest.raises(ValueError, match=r"q_proj: .*weight_scale_2 missing"):
        list(expand(stored.items()))


NVFP4 = SimpleNamespace(quantization="modelopt_fp4", model="m", dtype="float32", revision=None)


@pytest.fixture
def stepped_aside(monkeypatch):
    """Names of the patches that have, in this test."""
    statuses = {}
    monkeypatch.setattr(registry, "_statuses", statuses)
    return statuses.keys()


def test_the_gpus_patch_steps_aside_for_a_vllm_that_reads_the_tensors(monkeypatch, stepped_aside):
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    from drafthead.vllm_plugin import nvfp4_config
    from drafthead.vllm_plugin.nvfp4 import _told_by_tensors

    told = classmethod(lambda cls, config, model_config: "told by tensors")
    monkeypatch.setattr(nvfp4_config.CheckpointNvFp4Config, "from_stock", told)
    configure = _told_by_tensors(lambda model_config, load_config: "vLLM's own")
    assert configure(NVFP4, None) == "told by tensors"
    assert not stepped_aside
    monkeypatch.setattr(ModelOptNvFp4Config, "maybe_update_config", lambda *_, **__: None)
    assert configure(NVFP4, None) == "vLLM's own"
    assert stepped_aside == {"nvfp4"}
    assert registry.status("nvfp4").state == "stepped aside"


@pytest.mark.parametrize("kinds", ["linear", "experts", "both"])
def test_the_cpus_patch_steps_aside_for_a_vllm_with_both_kinds_of_kernels(
    monkeypatch, stepped_aside, kinds
):
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.fused_moe.oracle import nvfp4 as experts
    from vllm.platforms import PlatformEnum

    from drafthead.vllm_plugin import nvfp4_cpu

    if kinds != "experts":
        monkeypatch.setitem(linear._POSSIBLE_NVFP4_KERNELS, PlatformEnum.CPU, [object])
    if kinds != "linear":
        kernel = SimpleNamespace(_supports_current_device=lambda: True)
        monkeypatch.setattr(experts, "backend_to_kernel_cls", lambda backend: [kernel])
    monkeypatch.setattr(nvfp4_cpu, "is_needed", nvfp4_cpu.is_needed.__wrapped__)
    configure = nvfp4_cpu._none_for_nvfp4(lambda model_config, load_config: "vLLM's own")
    loaded = nvfp4_cpu._expanded(lambda self, model_config, model: [])(None, NVFP4, None)
    assert configure(NVFP4, None) == ("vLLM's own" if kinds == "both" else None)
    assert (loaded == []) == (kinds == "both")
    assert stepped_aside == ({"nvfp4_cpu"} if kinds == "both" else set())


@pytest.mark.parametrize(
    "ignore",
    [
        ["lm_head", "model.layers.0.conv*", "model.layers.1.conv*", "model.layers.3.conv*",
         "model.layers.4.conv*", "*.feed_forward.gate"],
        ["lm_head", *(f"model.layers.{i}.conv" for i in (0, 1, 3, 4))],  # routers forgotten
        ["*.conv"],
        [],
    ],
    ids=["modelopt", "bare", "wildcard", "nothing"],
)  # fmt: skip
def test_the_gpu_configuration_goes_by_the_tensors(lfm2_moe, tmp_path, ignore):
    """vLLM's own names for all its modules, asked as `SupportsQuant` sets them up."""
    import pickle

    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
    from vllm.model_executor.models.lfm2_moe import Lfm2MoeForCausalLM

    from drafthead.vllm_plugin.nvfp4_config import CheckpointNvFp4Config

    packed = pack_folder(lfm2_moe, tmp_path / "nvfp4", ignore)
    stated = json.loads((packed / "config.json").read_text())["quantization_config"]
    stock = ModelOptNvFp4Config.from_config(stated)
    patched = CheckpointNvFp4Config.from_stock(
        ModelOptNvFp4Config.from_config(stated), SimpleNamespace(model=str(packed), revision=None)
    )
    patched = pickle.loads(pickle.dumps(patched))  # as it reaches a worker process
    for config in (stock, patched):
        config.apply_vllm_mapper(Lfm2MoeForCausalLM.hf_to_vllm_mapper.get_rename_mapper())
        config.packed_modules_mapping.update(Lfm2MoeForCausalLM.packed_modules_mapping)
    excluded = {"lm_head"}
    quantized = set()
    for i in range(6):
        layer = f"model.layers.{i}"
        if i % 3 == 2:
            quantized |= {f"{layer}.self_attn.qkv_proj", f"{layer}.self_attn.out_proj"}
        else:
            excluded |= {f"{layer}.short_conv.in_proj", f"{layer}.short_conv.out_proj"}
        if i < 2:
            quantized |= {f"{layer}.feed_forward.w13", f"{layer}.feed_forward.w2"}
        else:
            quantized.add(f"{layer}.feed_forward.experts")
            excluded.add(f"{layer}.feed_forward.gate")
    assert {p for p in excluded | quantized if patched.is_layer_excluded(p)} == excluded
    as_stock = {p for p in excluded | quantized if stock.is_layer_excluded(p)} == excluded
    assert as_stock == (ignore[:1] == ["lm_head"] and "model.layers.0.conv*" in ignore)


def test_a_fused_module_quantized_in_part_is_refused(lfm2_moe, tmp_path):
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    from drafthead.vllm_plugin.nvfp4_config import CheckpointNvFp4Config

    packed = pack_folder(lfm2_moe, tmp_path / "nvfp4", [], ("conv", "embed", "gate", "k_proj"))
    config = CheckpointNvFp4Config.from_stock(
        ModelOptNvFp4Config("NVFP4", True, None, []),
        SimpleNamespace(model=str(packed), revision=None),
    )
    config.packed_modules_mapping["qkv_proj"] = ["q_proj", "k_proj", "v_proj"]
    with pytest.raises(ValueError, match="quantize all of them or none"):
        config.is_layer_excluded("model.layers.2.self_attn.qkv_proj")


def test_other_configurations_are_left_alone(llama):
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    from drafthead.vllm_plugin.nvfp4_config import CheckpointNvFp4Config

    config = ModelOptNvFp4Config("NVFP4", True, None, [])
    nothing = SimpleNamespace(model=str(llama.parent / "absent-of-tensors"), revision=None)
    (llama.parent / "absent-of-tensors").mkdir(exist_ok=True)
    assert type(CheckpointNvFp4Config.from_stock(config, nothing)) is ModelOptNvFp4Config
