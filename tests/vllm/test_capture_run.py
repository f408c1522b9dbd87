"""The stages generate and capture of a run: killed, repaired, refused, in one pass and in two."""

import json
import subprocess
import sys

import psutil
import pytest
import torch
import yaml
from rich.console import Console

from drafthead.capture import stages
from drafthead.capture.engine import CaptureEngine
from drafthead.capture.generate import answers_in, generate_units, prefill_units
from drafthead.capture.plan import make_plan
from drafthead.data.answers import read_answers, read_left_out, read_part
from drafthead.errors import DraftheadError
from drafthead.fsio import RunLock
from drafthead.recipe import parse_recipe
from drafthead.rundir import RunDir
from drafthead.states import StateReader
from drafthead.states.check import check_store, repair
from drafthead.states.index import shard_name, unit_numbers, unit_path
from drafthead.states.writer import open_store
from tests import disk
from tests.processes import below, ended, wait_for, writers
from tests.refused import refused
from tests.vllm.runs import WORDS, recipe_for

QUIET = Console(quiet=True)


def run_dir_files(root):
    return {
        p.relative_to(root): p.read_bytes()
        for folder in ("answers", "states")
        for p in (root / folder).iterdir()
        if not p.name.startswith(".")
    }


def command(recipe_file, runs):
    arguments = ["run", str(recipe_file), "--runs", str(runs), "--to", "capture", "--json"]
    return [sys.executable, "-m", "drafthead", *arguments]


def test_killed_and_started_again_it_ends_with_the_same_bytes(llama, tmp_path):
    recipe = recipe_for(llama, tmp_path, conversations=40, chunk=8)
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        command(recipe_file, tmp_path / "whole"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)  # whatever vLLM prints, stdout holds one object
    assert summary["generate"]["conversations"] == 40
    assert summary["generate"]["heldout"] == 4
    assert summary["capture"]["greedy_agreement"] == 1.0
    assert summary["capture"]["tokens"] > 1000

    root = tmp_path / "killed" / "t"
    log = tmp_path / "log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command(recipe_file, tmp_path / "killed"), stdout=output, stderr=output
        )
        alive = lambda: process.poll() is None
        engines = lambda: below(process.pid, "drafthead.capture.stages")
        wait_for(lambda: engines() or not alive())
        disk.stop(root / "answers" / "part-000003.parquet", engines()[0].pid)
        wait_for(lambda: unit_path(root / "states", 1).exists() or not alive())
        assert alive(), log.read_text()
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
    assert len(children) > 1
    wait_for(lambda: ended(children))  # no engine outlives the run that was killed
    captured = [unit_path(root / "states", n) for n in unit_numbers(root / "states")]
    written = {path: path.stat().st_mtime_ns for path in captured}
    assert len(written) >= 2
    for half in ("answers/.part-000001.parquet.1.tmp", "states/.unit-000001-00.safetensors.1.tmp"):
        (root / half).write_bytes(b"half")  # as a kill amid a write leaves it
    again = subprocess.run(
        command(recipe_file, tmp_path / "killed"), capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in written} == written  # not made twice
    whole, killed = run_dir_files(tmp_path / "whole" / "t"), run_dir_files(root)
    assert whole.keys() == killed.keys()
    assert [name for name in whole if whole[name] != killed[name]] == []
    assert not list(root.rglob(".*.tmp"))


@pytest.fixture(scope="module")
def ran(llama, tmp_path_factory):
    """One run in this process, with its engine left on."""
    folder = tmp_path_factory.mktemp("ran")
    plan = make_plan(parse_recipe(recipe_for(llama, folder), "test"))
    run = RunDir(folder)
    open_store(run.states, plan.meta)
    engine = CaptureEngine(plan.recipe, plan.target, plan.meta, run.states)
    close, engine.close = engine.close, lambda: None
    reports = []
    generate_units(plan, run.answers, run.states, range(3), lambda: engine, reports.append)
    yield plan, run, engine, reports
    close()


def test_samples_are_the_answers(ran):
    plan, run, _, reports = ran
    answers, reader = list(read_answers(run.answers)), StateReader(run.states)
    assert len(answers) == len(reader) == 18
    for i, answer in enumerate(answers):
        sample = reader[i]
        assert sample.ids.tolist() == answer.ids.tolist()
        assert sample.loss_mask.tolist() == answer.loss_mask.tolist()
        assert (sample.conversation, sample.split) == (answer.conversation, answer.split)
        assert len(sample.aux) == len(sample.ids) - 1
        assert answer.answer_ids[-1] in plan.target.eos_token_ids or len(answer.answer_ids) == 24
    assert [m["unit"] for m in reports if "unit" in m] == [0, 1, 2]
    assert sum(m.get("tokens", 0) for m in reports) >= sum(len(a.answer_ids) for a in answers)
    assert sum(m.get("answers", 0) for m in reports) == answers_in("generate", plan, range(3))


def test_later_turns_stand_in_the_context_of_the_targets_own_answers(ran):
    plan, run, _, _ = ran
    chats = {chat.id: chat for unit in plan.units for chat, _ in unit}
    two = [a for a in read_answers(run.answers) if len(chats[a.conversation].turns) == 2]
    assert len(two) == 6
    for answer in two:
        assert answer.prompt_mask.any()
        text = plan.template.tokenizer.decode(answer.prompt_ids[answer.prompt_mask])
        assert f"assistant\n{text}" in plan.template.tokenizer.decode(answer.prompt_ids)
        assert plan.template.tokenizer.decode(answer.prompt_ids).count("<|im_start|>user") == 2


def test_finished_units_start_no_engine(ran):
    plan, run, _, _ = ran
    before = run_dir_files(run.root)
    generate_units(plan, run.answers, run.states, range(3), pytest.fail, pytest.fail)
    prefill_units(plan, run.answers, run.states, range(3), pytest.fail, pytest.fail)
    assert run_dir_files(run.root) == before


def test_repaired_unit_is_captured_again_by_prefill(ran):
    plan, run, engine, _ = ran
    reader = StateReader(run.states)
    before = [reader[i].states.clone() for i in range(len(reader))]
    shard = sorted(run.states.glob("unit-000001-*.safetensors"))[0]
    body = bytearray(shard.read_bytes())
    body[-1] ^= 1
    shard.write_bytes(body)
    faults = check_store(run.states, QUIET)
    assert [fault.unit for fault in faults] == [1]
    repair(run.states, faults)
    prefill_units(plan, run.answers, run.states, range(3), lambda: engine, lambda _: None)
    assert check_store(run.states, QUIET) == []
    reader = StateReader(run.states)
    for i, states in enumerate(before):
        assert (reader[i].states - states).abs().max() < 1e-3
        assert reader[i].ids.tolist() == list(read_answers(run.answers))[i].ids.tolist()


def test_redone_unit_is_bit_for_bit_the_same(ran):
    plan, run, engine, _ = ran
    before = run_dir_files(run.root)
    (run.answers / "part-000002.parquet").unlink()
    generate_units(plan, run.answers, run.states, range(3), lambda: engine, lambda _: None)
    assert run_dir_files(run.root) == before


def test_full_disk_stops_the_stage_and_what_is_there_counts(ran):
    plan, run, engine, _ = ran
    for number in (1, 2):
        (run.answers / f"part-{number:06d}.parquet").unlink()
    disk.fill_for_children(run.states / shard_name(2, 0))
    with refused("unit-000002"):
        generate_units(plan, run.answers, run.states, range(3), lambda: engine, lambda _: None)
    assert (run.answers / "part-000001.parquet").exists()
    assert not (run.answers / "part-000002.parquet").exists()
    generate_units(plan, run.answers, run.states, range(3), lambda: engine, lambda _: None)
    assert check_store(run.states, QUIET) == []


def test_prompts_longer_than_the_model_are_named_and_left_out(ran, tmp_path):
    plan, _, engine, _ = ran
    recipe = recipe_for(plan.target.path, tmp_path, conversations=7)
    long = {"prompt": WORDS * 40}
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    other = make_plan(parse_recipe(recipe, "test"))
    generate_units(other, tmp_path / "answers", None, range(2), lambda: engine, lambda _: None)
    (reason,) = read_left_out(tmp_path / "answers")
    assert reason == "prompt longer than the model"
    assert len(read_left_out(tmp_path / "answers")[reason]) == 1
    assert len(list(read_answers(tmp_path / "answers"))) == 7
    assert len(read_part(tmp_path / "answers" / "part-000001.parquet")) == 2 - (
        len(read_part(tmp_path / "answers" / "part-000000.parquet")) == 6
    )


def test_stage_errors_come_out_of_the_engines_process(llama, tmp_path):
    recipe = parse_recipe(recipe_for(llama, tmp_path, engine={"extra": {"block_size": 7}}), "test")
    with pytest.raises(DraftheadError, match=r"vLLM does not start|process died"):
        stages.generate(recipe, RunDir(tmp_path / "t"), console=QUIET)


def test_bad_targets_and_settings_are_refused_before_an_engine_starts(llama, tmp_path):
    def plan(**sections):
        return make_plan(parse_recipe(recipe_for(llama, tmp_path, **sections), "test"))

    with refused("capture.aux_layers", [99]):
        plan(capture={"aux_layers": [1, 99]})
    with refused("engine.max_model_len", 9999):
        plan(engine={"max_model_len": 9999})
    with pytest.raises(DraftheadError, match="no such folder"):
        plan(target={"path": str(tmp_path / "nothing")})
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in llama.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    with refused("target.chat_template"):
        plan(target={"path": str(bare)})
    with RunLock(tmp_path / "t"):
        recipe_file = tmp_path / "recipe.yaml"
        recipe_file.write_text(yaml.safe_dump(recipe_for(llama, tmp_path)))
        done = subprocess.run(
            command(recipe_file, tmp_path), capture_output=True, text=True, check=False
        )
    assert done.returncode == 2
    assert "another drafthead run" in done.stderr


def test_tensor_parallel_engine_gives_the_states_of_one(ran, llama, tmp_path, monkeypatch):
    # Through the command, whose child reads standard input in a thread: vLLM's workers must not
    # be forked from there.
    one = StateReader(ran[1].states)
    recipe = recipe_for(llama, tmp_path)
    recipe["engine"]["tensor_parallel_size"] = 2
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(recipe))
    # vLLM wants a NUMA node for each worker, or to be told which core each may have.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    done = subprocess.run(
        command(recipe_file, tmp_path / "two"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    two = StateReader(tmp_path / "two" / "t" / "states")
    assert len(one) == len(two) == 18
    for index in range(18):
        assert torch.equal(one[index].ids, two[index].ids)
        torch.testing.assert_close(two[index].states, one[index].states, rtol=1e-4, atol=1e-4)


def test_the_writing_processs_death_ends_the_stage(ran):
    """The last of them: ``ran``'s engine captures nothing after it."""
    plan, run, engine, _ = ran
    for number in (1, 2):
        (run.answers / f"part-{number:06d}.parquet").unlink()
    for writer in writers():
        writer.kill()
    with pytest.raises(DraftheadError, match="the process that writes the states died"):
        generate_units(plan, run.answers, run.states, range(3), lambda: engine, lambda _: None)
    assert [fault.unit for fault in check_store(run.states, QUIET)] == [1]
    assert (run.answers / "part-000000.parquet").exists()
