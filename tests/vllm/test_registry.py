"""The table of patches: each finds its place, sees its fault by trying, and stands as it says."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from drafthead import vllm_plugin
from drafthead.doctor import engine
from drafthead.vllm_plugin import patch, registry
from drafthead.vllm_plugin.patch import Replacement
from drafthead.vllm_plugin.registry import Patch, State
from tests.vllm.models import write_head, write_target

PLACES = json.loads(Path(__file__).with_name("places-0.33.json").read_text())
NAMES = [row.name for row in registry.TABLE]
TRIED = [
    "aux_copies",
    "draft_kv_group",
    "cpu_expand",
    "cpu_top_k",
    "cpu_rms_norm",
    "state_shape",
    "batch_order",
    "cpu_rope",
    "cpu_short_conv",
]
"""Whose fault is provoked by calling what they replace."""


@pytest.fixture
def fresh(monkeypatch):
    """A process that has applied nothing yet, and what it logs."""
    lines = []
    monkeypatch.setattr(registry, "_statuses", {})
    monkeypatch.setattr(registry.log, "warning", lambda text, *values: lines.append(text % values))
    return lines


@pytest.mark.parametrize("name", NAMES)
def test_each_fits_the_installed_vllm(name):
    status = registry.look(registry.named(name))
    assert status.state in (State.needed, State.elsewhere, State.stepped_aside), status.why
    if status.state == State.stepped_aside:
        assert status.patch.purpose == "cost" or status.patch.device == "cpu"


@pytest.mark.parametrize("name", NAMES)
def test_each_finds_its_place_in_033(name):
    """By reading: places.py says how the file was made."""
    row = registry.named(name)
    for replacement in row.replacements:
        found = PLACES[replacement.place]
        if found is None:
            assert (0, 33) not in row.versions
            continue
        parameters, text = found
        assert replacement.fits(parameters)
        assert replacement.text in ("", text)


@pytest.mark.parametrize("name", TRIED)
def test_a_fault_is_seen_by_trying(name, monkeypatch):
    """It is there in vLLM's own function, and gone where vLLM does what the patch does."""
    row = registry.named(name)
    if registry.look(row).state == State.elsewhere:
        pytest.skip(f"for {row.device} only")
    assert row.module.needed()
    for replacement in row.replacements:
        owner, attribute = replacement.owner()
        held = inspect.getattr_static(owner, attribute)
        fixed = replacement.make(patch.original(owner, attribute))
        monkeypatch.setattr(
            owner, attribute, classmethod(fixed) if isinstance(held, classmethod) else fixed
        )
    assert row.module.needed() is False
    assert registry.look(row).state == State.stepped_aside


def test_faults_that_other_things_than_functions_show(monkeypatch):
    from vllm.triton_utils import dispatcher
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.worker import mamba_utils
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def needed(name):
        return registry.named(name).module.needed()

    # vLLM 0.33 marks a draft model's layers; a vLLM that does neither is not known.
    draft_kv_group = registry.named("draft_kv_group").module
    monkeypatch.delattr(kv_cache_utils, "_uses_trailing_mtp_layers")
    assert needed("draft_kv_group") is None
    assert registry.look(registry.named("draft_kv_group")).state == State.off
    monkeypatch.setattr(draft_kv_group, "fields", lambda _: [SimpleNamespace(name="is_draft")])
    assert registry.look(registry.named("draft_kv_group")).state == State.stepped_aside
    monkeypatch.setattr(GPUModelRunner, "_is_uniform_decode", staticmethod(lambda *_: False))
    assert needed("prefill_graphs") is False
    if registry.look(registry.named("cpu_state_copies")).state == State.elsewhere:
        return
    assert needed("cpu_kernel_registry")
    monkeypatch.setattr(dispatcher, "_rebind_kernels", lambda overrides: None)
    assert not needed("cpu_kernel_registry")
    monkeypatch.setattr(mamba_utils, "precopy_mamba_align_fused_kernel", [])
    assert not needed("cpu_state_copies")


def test_registering_twice_changes_nothing():
    from vllm.v1.core.sched.scheduler import Scheduler

    vllm_plugin.register()
    once = Scheduler._update_after_schedule
    vllm_plugin.register()
    assert Scheduler._update_after_schedule is once


def test_other_models_are_left_alone():
    from vllm import ModelRegistry

    vllm_plugin.register()
    assert ModelRegistry.models["LlamaForCausalLM"].module_name.startswith("vllm.")
    assert ModelRegistry.models["Eagle3Qwen3ForCausalLM"].module_name.startswith("vllm.")
    assert ModelRegistry.models["Lfm2MoeForCausalLM"].module_name == "drafthead.vllm_plugin.lfm2"


def test_patches_can_be_left_out(monkeypatch, fresh):
    monkeypatch.setenv(registry.SKIP, "cpu_rope,batch_order")
    assert registry.skipped("cpu_rope")
    assert not registry.skipped("cpu_short_conv")
    monkeypatch.setenv(registry.SKIP, "all")
    assert registry.skipped("cpu_short_conv")
    registry.apply(registry.TABLE)
    assert {status.state for status in registry.statuses()} == {State.left_out}
    assert not fresh  # who asked for it need not be warned
    (row,) = (row for row in registry.TABLE if row.name == "accepted_counts")
    assert any(row.without in line for line in registry.unprotected("lfm2_moe"))
    assert not any(row.without in line for line in registry.unprotected("llama"))


# Stand-ins: a module of "vLLM", and patches of it.


@pytest.fixture
def standin(monkeypatch, fresh):
    """A module with functions to replace, and a way to make a patch of them."""
    place = ModuleType("standin")
    exec(
        "def add(a, b):\n    return a + b\n"
        "class Runner:\n"
        "    @staticmethod\n    def twice(a):\n        return 2 * a\n"
        "    @classmethod\n    def name(cls):\n        return cls.__name__\n",
        place.__dict__,
    )
    monkeypatch.setitem(sys.modules, "standin", place)

    def make(name, replacements=(), needed=None, **row):
        module = ModuleType(name)
        module.REPLACEMENTS = tuple(replacements)
        if needed is not None:
            module.needed = needed
        monkeypatch.setitem(sys.modules, f"drafthead.vllm_plugin.{name}", module)
        return Patch(name, "tests", f"{name} is wrong", **row)

    return SimpleNamespace(module=place, patch=make, warnings=fresh)


def plus(number):
    """Replaces ``add`` by one that adds a number more."""
    return Replacement("standin:add", "a b", lambda stock: lambda a, b: stock(a, b) + number)


def at(monkeypatch, version):
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)


def test_two_patches_of_one_function_compose(standin):
    rows = [standin.patch("one", [plus(1)]), standin.patch("ten", [plus(10)])]
    registry.apply(rows)
    assert standin.module.add(2, 3) == 16
    stock = patch.original(standin.module, "add")
    assert stock(2, 3) == 5
    registry._statuses.clear()
    registry.apply(rows)  # as in a process that registers twice
    assert standin.module.add(2, 3) == 16
    assert patch.original(standin.module, "add") is stock


def test_a_patch_that_would_undo_another_is_refused(standin):
    alone = Replacement("standin:add", "a b", lambda _: lambda a, b: 0)
    rows = [standin.patch("one", [plus(1)]), standin.patch("zero", [alone])]
    registry.apply(rows)
    assert standin.module.add(2, 3) == 6
    status = registry._statuses["zero"]
    assert (status.state, status.unprotected) == (State.off, True)
    assert "'one'" in status.why
    assert any("zero is wrong" in line for line in standin.warnings)


def test_methods_stay_what_they_are(standin):
    runner = standin.module.Runner
    patch.wrap(runner, "twice", lambda stock: lambda a: stock(a) + 1, "p")
    patch.wrap(runner, "name", lambda stock: lambda cls: stock(cls).lower(), "p")
    assert (runner.twice(3), runner().twice(3)) == (7, 7)
    assert (runner.name(), type("Other", (runner,), {}).name()) == ("runner", "other")
    assert patch.original(runner, "twice")(3) == 6
    assert patch.original(runner, "name")(int) == "int"


@pytest.mark.parametrize(
    ("version", "needed", "versions", "state", "protected"),
    [
        # Where the fault can be tried out, that decides.
        ("0.32.0", lambda: True, (), State.applied, True),
        ("0.34.0", lambda: True, (), State.applied, True),
        ("0.34.0", lambda: False, ((0, 34),), State.stepped_aside, True),
        # Where it cannot, the table's versions do.
        ("0.32.1.dev3+g1a2b", None, ((0, 32),), State.applied, True),
        ("0.33.0rc1", None, ((0, 32),), State.stepped_aside, True),
        ("0.33.0", lambda: None, ((0, 33),), State.applied, True),
        ("0.34.0", None, ((0, 32), (0, 33)), State.unknown, False),
        ("dev", None, ((0, 32), (0, 33)), State.unknown, False),
        ("0.34.0", lambda: 1 / 0, ((0, 33),), State.unknown, False),
        ("0.33.0", lambda: 1 / 0, ((0, 33),), State.applied, True),
    ],
)
def test_who_decides(standin, monkeypatch, version, needed, versions, state, protected):
    at(monkeypatch, version)
    registry.apply([standin.patch("p", [plus(1)], needed, versions=versions)])
    status = registry._statuses["p"]
    assert status.state == state
    assert (not status.unprotected) == protected == (not standin.warnings)
    applied = state in (State.applied, State.unknown)
    assert standin.module.add(2, 3) == 5 + applied


def test_what_only_saves_time_is_left_out_of_an_unknown_vllm_in_silence(standin, monkeypatch):
    at(monkeypatch, "0.34.0")
    registry.apply([standin.patch("p", [plus(1)], purpose="cost")])
    assert registry._statuses["p"].state == State.unknown
    assert standin.module.add(2, 3) == 5
    assert not standin.warnings


@pytest.mark.parametrize(
    "changed",
    [
        lambda module: delattr(module, "add"),
        lambda module: setattr(module, "add", lambda a, b, c: a),
        lambda module: setattr(module, "add", None),
    ],
)
@pytest.mark.parametrize("purpose", ["correctness", "cost"])
def test_a_place_that_has_changed(standin, monkeypatch, changed, purpose):
    changed(standin.module)
    registry.apply([standin.patch("p", [plus(1)], lambda: True, purpose=purpose)])
    status = registry._statuses["p"]
    assert status.state == State.off
    assert "standin:add" in status.why
    assert bool(standin.warnings) == (purpose == "correctness")
    if purpose == "correctness":
        (line,) = standin.warnings
        assert "p is wrong" in line
        assert "verify" in line


def test_a_function_that_is_replaced_whole_may_not_have_changed(standin, tmp_path, monkeypatch):
    (tmp_path / "standin_file.py").write_text("def f(a):\n    return a\n")
    monkeypatch.syspath_prepend(tmp_path)
    import standin_file

    text = patch.fingerprint(standin_file.f)
    place = ("standin_file:f", "a", lambda _: lambda a: a)
    assert not Replacement(*place, text=text).changed()
    assert Replacement(*place, text="another").changed()


def test_parameters_that_are_passed_on_may_come_and_go():
    some = Replacement("m:f", "self rows *", lambda stock: stock)
    assert some.fits(["self", "rows", "new"])
    assert not some.fits(["self", "new"])
    assert not Replacement("m:f", "self rows", lambda stock: stock).fits(["self", "rows", "new"])


def test_lfm2s_hook_steps_aside_for_a_vllm_that_brings_its_own(fresh, monkeypatch):
    """Llama's classes, which have it, stand for LFM2's; each class is asked by itself."""
    from vllm.model_executor.models import llama

    from drafthead.vllm_plugin import lfm2

    monkeypatch.setitem(lfm2.CLASSES, "LlamaForCausalLM", llama.__name__)
    decoder = llama.LlamaModel
    assert lfm2.with_hook("LlamaForCausalLM") is llama.LlamaForCausalLM
    assert llama.LlamaModel is decoder
    assert registry.status("aux_states").state == State.stepped_aside
    assert lfm2.Lfm2ForCausalLM.__mro__[1].__module__ == lfm2.CLASSES["Lfm2ForCausalLM"]


def test_lfm2_in_another_module_is_served_by_vllm_and_said_to_be_unprotected(fresh, monkeypatch):
    from vllm import ModelRegistry

    moved = SimpleNamespace(module_name="vllm.models.lfm2")
    monkeypatch.setitem(ModelRegistry.models, "Lfm2MoeForCausalLM", moved)
    vllm_plugin.register()
    assert ModelRegistry.models["Lfm2MoeForCausalLM"] is moved
    off = {status.patch.name for status in registry.statuses() if status.state == State.off}
    assert off == {"aux_states", *(row.name for row in registry.rows("lfm2"))}
    assert any("vllm.models.lfm2" in line for line in fresh)


def test_doctor_sees_the_table(capsys, fresh, monkeypatch):
    """What doctor's process prints, in this one."""
    from vllm import plugins

    monkeypatch.setattr(plugins, "load_general_plugins", vllm_plugin.register)  # once a process
    exec(engine._PLUGIN, {})
    lines = capsys.readouterr().out.splitlines()
    told = [json.loads(line.split(maxsplit=1)[1]) for line in lines if line.startswith("patch ")]
    assert [name for name, _, _ in told] == NAMES
    assert {advice for _, _, advice in told} == {""}


def test_an_unknown_vllm_serves_and_says_what_is_off(tmp_path):
    """A stand-in of 0.34.0 that has moved two functions, each of which its own code calls."""
    target = write_target(tmp_path / "target")
    head = write_head(tmp_path / "head", target, aux_layers=(2, 3, 6), repeats=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm.later", str(target), str(head)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["with head"] == told["alone"]
    assert told["accepted"] > 10
    assert set(told["off"]) == {"aux_copies", "resumed_prefills"}
    # What cannot be tried out is applied, and said to be unproved.
    assert {"accepted_counts", "placeholder_drafts"} <= set(told["unknown"])
    for name in (*told["off"], *told["unknown"]):
        assert name in done.stdout + done.stderr


def test_a_patch_leaves_no_mark_on_a_function_that_a_module_keeps():
    """Else it would pass for applied wherever it is used once more."""
    owner, stock = ModuleType("owner"), lambda: 1
    owner.f = stock
    kept = lambda: 2
    patch.wrap(owner, "f", lambda _: kept, "p")
    assert (owner.f(), patch.original(owner, "f")) == (2, stock)
    assert not vars(kept)
