"""The loop: it learns, it goes on after a kill as if nothing had been, alone or with others."""

import copy
import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from drafthead.drafters.eagle3.packing import pack_row
from drafthead.drafters.eagle3.step import Objective, TrainStep
from drafthead.head.checkpoint import load_head
from drafthead.ops.vocabulary import draft_ids
from drafthead.recipe import TrainSection
from drafthead.train import checkpoint, loop
from drafthead.train.log import Log, read_metrics
from drafthead.train.loop import fit, learning_rate
from drafthead.train.parallel import World
from drafthead.train.plan import beyond
from tests.processes import wait_for
from tests.refused import refused
from tests.train.toy import make_task, write_store

ALONE = World(0, 1, torch.device("cpu"))
REPO = Path(__file__).parents[2]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "states"
    write_store(path)
    return path


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes it is compared with
    fit(make_task(store), folder, ALONE, quiet())
    torch.set_num_threads(threads)
    return folder


def run(store, folder, processes=1, die_at=None, restarts=0, **settings):
    """`fit` in processes of its own, killed after step `die_at` if given; returns its exit code.

    restarts: times that torchrun may start them again; then only the last process is killed, and
    only once.
    """
    code = f"""
import io, os, signal
import torch
from pathlib import Path
from rich.console import Console
torch.set_num_threads(1)
from drafthead.train import checkpoint, loop
from drafthead.drafters.eagle3.packing import pack_row
from drafthead.train.parallel import World
from drafthead.drafters.eagle3.step import Objective, TrainStep
from tests.train.toy import make_task
loop.CHECKPOINT_SECONDS = 0.0  # one after every step
loop.CHECKPOINT_SHARE = 1e9
die_at, original, once = {die_at!r}, loop._Fit._step, {bool(restarts)!r}
died = Path({str(folder.with_suffix(".died"))!r})
def step(self, *arguments):
    last = self.world.rank == self.world.size - 1
    if self.progress.step == die_at and not (once and (died.exists() or not last)):
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments)
loop._Fit._step = step
world = World.join()
task = make_task(Path({str(store)!r}), **{settings!r})
loop.fit(task, Path({str(folder)!r}), world, Console(file=io.StringIO()))
world.leave()
"""
    environment = {**os.environ, "PYTHONPATH": f"{REPO / 'src'}:{REPO}", "OMP_NUM_THREADS": "1"}
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        start += [f"--max-restarts={restarts}"]
        script = folder.with_suffix(".py")
        script.write_text(code)
        command = [*start, str(script)]
    else:
        command = [*start, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if die_at is None or restarts:
        assert done.returncode == 0, done.stderr[-3000:]
    return done.returncode


def weights(folder):
    return load_file(folder / "best" / "model.safetensors")


def curve(folder):
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("loss", ["kl", "ce+smoothl1", "acceptance"])
def test_learns_a_rule_and_leaves_a_head_that_vllm_reads(store, tmp_path, loss):
    console = quiet()
    summary = fit(
        make_task(store, loss=loss, epochs=24, learning_rate=2e-2), tmp_path, ALONE, console
    )
    assert summary["accepted_length"] > 2.3
    losses = curve(tmp_path)
    assert losses[-1] < 0.3 * losses[0]
    loaded = load_head(tmp_path / "best")
    assert loaded.read.provenance["trained"]["step"] == summary["best_step"]
    assert json.loads((tmp_path / "best.json").read_text()) == summary
    assert [h["k"] for h in summary["heldout"]] == [1, 2, 3, 4, 5]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    best = max(line["accepted_length"] for line in lines if "accepted_length" in line)
    at_best = [line["step"] for line in lines if line.get("accepted_length") == best]
    assert summary["best_step"] == at_best[0]
    assert (
        summary["accepted_length"] == loaded.read.provenance["trained"]["accepted_length"] == best
    )
    shares = [line["waiting"] for line in lines if "waiting" in line]
    assert 0.9 * min(shares) < summary["waiting"] < 1.1 * max(shares)
    assert any((tmp_path / "tensorboard").iterdir())
    assert "held-out accepted length at k=3" in console.file.getvalue()


def assert_same_weights(folder, other, **tolerance):
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if tolerance:
            torch.testing.assert_close(ours[name], theirs[name], **tolerance)
        else:
            assert torch.equal(ours[name], theirs[name]), name


def test_a_killed_run_ends_with_the_same_bits(store, whole, tmp_path):
    killed = tmp_path / "killed"
    assert run(store, killed, die_at=5) == -signal.SIGKILL
    assert run(store, killed, die_at=9) == -signal.SIGKILL
    assert checkpoint.read_progress(killed / "checkpoint").step == 9
    run(store, killed)
    assert_same_weights(killed, whole)
    # The look after a start sums fewer steps; every later one is the same to the last bit.
    assert curve(killed)[-4:] == curve(whole)[-4:]
    last = lambda folder: next((folder / "checkpoint").glob("step-*/optimizer.safetensors"))
    assert last(killed).read_bytes() == last(whole).read_bytes()


def trained(folder):
    """Steps of the last checkpoint."""
    made = (folder / "checkpoint").glob("step-*")
    return max((int(path.name.removeprefix("step-")) for path in made), default=0)


def test_a_kill_at_any_instant(store, whole, tmp_path):
    """Killed from outside, wherever it happens to be."""
    code = (
        "import io, torch; from pathlib import Path; from rich.console import Console\n"
        "from drafthead.train import loop; from drafthead.train.parallel import World\n"
        "from tests.train.toy import make_task; torch.set_num_threads(1)\n"
        "loop.CHECKPOINT_SECONDS = 0.0; loop.CHECKPOINT_SHARE = 1e9; print('up', flush=True)\n"
        f"loop.fit(make_task(Path({str(store)!r})), Path({str(tmp_path / 'killed')!r}),"
        " World.join(), Console(file=io.StringIO()))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{REPO / 'src'}:{REPO}", "OMP_NUM_THREADS": "1"}
    for steps in (2, 6):
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        wait_for(lambda steps=steps: trained(tmp_path / "killed") >= steps)
        process.kill()
        process.wait()
    run(store, tmp_path / "killed")
    assert_same_weights(tmp_path / "killed", whole)


def test_two_processes_follow_the_curve_of_one(store, whole, tmp_path):
    run(store, tmp_path / "two", processes=2)
    one, two = curve(whole), curve(tmp_path / "two")
    assert len(one) > 3
    assert two == pytest.approx(one, rel=1e-4)
    lengths = lambda folder: [
        line["accepted_length"]
        for line in read_metrics(folder / "metrics.jsonl")
        if "accepted_length" in line
    ]
    assert lengths(tmp_path / "two") == pytest.approx(lengths(whole), rel=0.02)


def test_torchrun_starts_a_killed_worker_again_and_the_run_goes_on(store, whole, tmp_path):
    restarted = tmp_path / "restarted"
    run(store, restarted, processes=2, die_at=7, restarts=1)
    assert restarted.with_suffix(".died").exists()
    steps = [line["step"] for line in read_metrics(restarted / "metrics.jsonl")]
    assert steps == sorted(steps)
    assert curve(restarted)[-4:] == pytest.approx(curve(whole)[-4:], rel=1e-4)


def test_goes_on_with_another_number_of_processes(store, whole, tmp_path):
    changed = tmp_path / "changed"
    run(store, changed, processes=2, die_at=6)
    assert checkpoint.read_progress(changed / "checkpoint").step in (5, 6)
    run(store, changed)
    assert curve(changed)[-4:] == pytest.approx(curve(whole)[-4:], rel=1e-4)
    assert_same_weights(changed, whole, rtol=0.05, atol=5e-3)


def test_rows_of_a_step_add_up_to_one_row(store):
    """Accumulation: the gradients of two rows are those of one row with all their documents."""
    task = make_task(store)
    to_draft = draft_ids(task.head.target_ids(), task.head.config.vocab_size)
    step = TrainStep(task.head, task.teacher, Objective())
    samples = [task.reader[i] for i in (1, 2, 3, 4)]

    def gradients(parts):
        task.head.zero_grad()
        for part in parts:
            row = pack_row(part, 3, to_draft, 1000, task.embedding)
            assert row is not None
            step.backward(row.batch("cpu"))
        return [p.grad.clone() for p in task.head.parameters()]

    for a, b in zip(gradients([samples[:2], samples[2:]]), gradients([samples])):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("encoding", ["fp32", "fp8-aux"])
def test_states_that_are_not_finite_are_named(tmp_path, encoding):
    write_store(tmp_path / "states", 17, encoding)
    with refused("c17", "--repair"):
        fit(make_task(tmp_path / "states"), tmp_path / "train", ALONE, quiet())


def test_a_learning_rate_that_blows_up_is_said(store, tmp_path):
    task = make_task(store, learning_rate=1e30, warmup_ratio=0.0)
    with refused("train.learning_rate"):
        fit(task, tmp_path, ALONE, quiet())


def test_stops_early(store, tmp_path):
    task = make_task(store, learning_rate=1e-12, patience=2, eval_every=1)
    summary = fit(task, tmp_path, ALONE, quiet())
    assert summary["stopped_early"]
    assert summary["steps"] == 3
    assert fit(task, tmp_path, ALONE, quiet())["steps"] == 3, "a stopped run stays stopped"
    planned = summary["planned_steps"]
    task = make_task(store, learning_rate=1e-12, patience=1, eval_every=planned - 1)
    summary = fit(task, tmp_path / "to the end", ALONE, quiet())
    assert (summary["steps"], summary["stopped_early"]) == (planned, False)


def test_a_run_that_goes_on_for_another_k_keeps_the_best_head_for_that(
    store, tmp_path, monkeypatch
):
    task, step = make_task(store, ttt_steps=3, epochs=12, learning_rate=2e-2), loop._Fit._step

    def stop(fit, *arguments):
        if fit.progress.step == fit.plan.steps // 2:
            raise KeyboardInterrupt
        return step(fit, *arguments)

    monkeypatch.setattr(loop._Fit, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(replace(task, head=copy.deepcopy(task.head), k=5), tmp_path, ALONE, quiet())
    monkeypatch.undo()
    found = fit(replace(task, k=1), tmp_path, ALONE, quiet())
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "acceptance" in line]
    at_one = [line["accepted_length"] for line in lines if len(line["acceptance"]) == 1]
    at_five = [line["accepted_length"] for line in lines if len(line["acceptance"]) == 5]
    assert max(at_five) > max(at_one), "or nothing is shown here"
    assert found["accepted_length"] >= max(at_one)


def test_other_settings_do_not_go_on(store, tmp_path):
    fit(make_task(store, epochs=1), tmp_path, ALONE, quiet())
    with refused("checkpoint"):
        fit(make_task(store, epochs=1, learning_rate=1e-3), tmp_path, ALONE, quiet())


def test_too_little_data_for_a_step(store, tmp_path):
    with refused(500, "train.rows_per_step"):
        fit(make_task(store, rows_per_step=500), tmp_path, ALONE, quiet())


def test_nothing_held_out_is_said_before_anything_is_trained(store, tmp_path):
    task = make_task(store)
    task.reader.split[:] = "train"
    with refused("states", "prompts.heldout"):
        fit(task, tmp_path / "train", ALONE, quiet())
    assert not (tmp_path / "train").exists()


def test_answers_that_rows_cut_off_are_told_of(store, tmp_path):
    reader = make_task(store).reader
    train = [reader[i] for i in reader.indices("train")]
    for tokens in (4, 12, 64):
        drafts = draft_ids(torch.arange(61), 61)
        rows = [pack_row([s], 3, drafts, tokens, torch.zeros(61, 32)) for s in train]
        trained = sum(row.places["labels"].shape[0] for row in rows if row)
        whole = sum(int(s.loss_mask.sum()) for s in train)
        assert beyond(reader, tokens) == pytest.approx(1 - trained / whole)
    console = quiet()
    fit(make_task(store, epochs=0.2, row_tokens=12), tmp_path / "some", ALONE, console)
    assert "are cut off by rows of 12 tokens; raise train.row_tokens" in console.file.getvalue()
    task = make_task(store, row_tokens=4)
    task.reader.prompt[:] = np.maximum(task.reader.prompt, 6)
    with refused("states", "train.row_tokens"):
        fit(task, tmp_path / "none", ALONE, quiet())


def test_more_processes_than_rows(store, tmp_path):
    with refused("train.rows_per_step", 4):
        fit(make_task(store), tmp_path, World(0, 4, torch.device("cpu")), quiet())


def test_a_tracker_that_is_not_installed(store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with refused("train.track", "pip install wandb"):
        fit(make_task(store, track=["wandb"]), tmp_path, ALONE, quiet())
    assert not any(tmp_path.iterdir()), "what is left would be another recipe's"


def test_a_tracker_gets_the_figures_and_one_run_stays_one(store, tmp_path, monkeypatch):
    class Fake:
        def __init__(self):
            self.logged, self.runs = [], []

        def init(self, *, project, resume, name, id):
            self.runs.append((project, resume, name, id))

        def log(self, figures, step):
            self.logged.append((step, figures))

        def finish(self):
            self.done = True

    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    fit(make_task(store, track=["wandb"], epochs=1), tmp_path / "a", ALONE, quiet())
    assert fake.done
    assert {"loss", "accuracy/1", "acceptance/3", "learning_rate"} <= set().union(
        *(figures for _, figures in fake.logged)
    )
    fit(make_task(store, track=["wandb"], epochs=1), tmp_path / "a", ALONE, quiet())
    fit(make_task(store, track=["wandb"], epochs=1), tmp_path / "b", ALONE, quiet())
    first, again, other = fake.runs
    assert first == again != other


def test_wandb_itself_takes_the_figures(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (0, 10):
        # Folders are named by the second: two starts within one would share it.
        (tmp_path / str(step)).mkdir()
        monkeypatch.setenv("WANDB_DIR", str(tmp_path / str(step)))
        with Log(tmp_path / "train", step, 20, "toy", ["wandb"], quiet()) as log:
            log.write(step + 10, {"acceptance": [0.1], "conditional_acceptance": [0.2]})
            assert wandb.run.name == "toy"
    wandb.teardown()  # its process would outlive this test
    records = list(tmp_path.glob("*/wandb/offline-run-*/run-*.wandb"))
    assert len(records) == 2
    assert len({path.name for path in records}) == 1, "both starts belong to one run"
    assert all(b"conditional_acceptance/1" in path.read_bytes() for path in records)


def test_altered_records_of_training_are_named(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": NaN, "mfu": 0.1}\n{"step": 2}\n{"st')
    assert read_metrics(metrics) == [{"step": 1, "loss": None, "mfu": 0.1}, {"step": 2}]
    metrics.write_text('{"step": 1}\n{"step": "2"}\n')
    with refused("metrics.jsonl, line 2", "step", "'2'"):
        read_metrics(metrics)
    checkpoint.save(tmp_path, checkpoint.Progress("inputs", 4, step=3), {"a": torch.zeros(1)})
    progress = tmp_path / "step-00000003" / "progress.json"
    content = json.loads(progress.read_text())
    progress.write_text(json.dumps(content | {"more": 1}))
    assert checkpoint.read_progress(tmp_path) == checkpoint.Progress("inputs", 4, step=3)
    progress.write_text(json.dumps(content | {"step": "three"}))
    with refused("progress.json", "step", "'three'"):
        checkpoint.read_progress(tmp_path)


def test_the_line_on_a_terminal(store, tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    fit(make_task(store), tmp_path, ALONE, console)
    line = (
        r"loss \d+\.\d+ · [\d,]+ tokens/s · MFU \d+% · waiting for data \d+% · accepted length \d"
    )
    assert re.search(line, console.file.getvalue())


def test_the_line_goes_on_where_a_killed_run_was(tmp_path):
    console = Console(file=io.StringIO())
    with Log(tmp_path, 10, 20, "toy", [], console) as log:
        assert "10 of 20 steps" in console.file.getvalue()
        log.write(15, {"loss": 1.0, "tokens_per_s": 2.0, "mfu": 0.1, "waiting": 0.0})
    assert "15 of 20 steps" in console.file.getvalue()


def test_learning_rate_warms_up_and_falls_to_nothing():
    settings = TrainSection(learning_rate=1.0, warmup_ratio=0.1)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert max(rates) == rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-3


@pytest.mark.parametrize("rank", [0, 1])
def test_more_processes_than_packed_rows_are_refused_at_the_start(store, tmp_path, rank):
    world = World(rank, 2, torch.device("cpu"))
    task = make_task(store, row_tokens=1 << 20, epochs=1, rows_per_step=None)
    with refused("1 rows", "takes 2", "processes"):
        fit(task, tmp_path, world, quiet())
    assert not list(tmp_path.iterdir())
