"""The order of the stages: nothing done twice, nothing stale used, nothing costly thrown away."""

import errno
import json
import os
import shutil

import pytest
import yaml
from rich.console import Console

from drafthead import fsio
from drafthead import run as run_module
from drafthead.errors import ClaimFailed, DraftheadError
from drafthead.fsio import write_json
from drafthead.head.checkpoint import read_folder
from drafthead.recipe import load_recipe
from drafthead.run import NAMES, execute
from drafthead.rundir import MADE, RunDir
from drafthead.targets import Target, recipe_target
from tests import templates
from tests.prove import crafted
from tests.refused import refused

CONSOLE = Console(quiet=True)


@pytest.fixture
def job(tmp_path, llama, monkeypatch):
    """A recipe whose stages only note that they ran; ``job.ran`` lists them."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "Hello"}) + "\n")

    class Job:
        def __init__(self):
            self.ran, self.fail, self.error = [], None, ClaimFailed("not lossless")

        def recipe(self, **sections):
            path = tmp_path / "recipe.yaml"
            base = {
                "name": "job",
                "target": {"path": str(llama)},
                "prompts": {"sources": [{"path": str(prompts)}]},
                "vocab": {"size": 256},
            }
            path.write_text(yaml.safe_dump(base | sections))
            return load_recipe(path)

        def execute(self, recipe, **options):
            self.ran.clear()
            return execute(recipe, tmp_path / "runs", console=CONSOLE, **options)

    job = Job()
    job.root = tmp_path / "runs" / "job"
    job.prompts = prompts

    def load(function):
        name = function.split(":")[1]
        if name in ("check_prompts", "check_start"):
            return lambda _recipe, _run: None

        def stage(recipe, run, *, console):
            job.ran.append(name)
            if job.fail == name:
                raise job.error
            if name == "generate":
                run.answers.mkdir(exist_ok=True)
                (run.answers / "part").write_text("answers")
            if name in MADE:
                (run.root / MADE[name]).mkdir(exist_ok=True)
            return {"made": name}

        return stage

    monkeypatch.setattr(run_module, "_load", load)
    return job


def test_runs_in_order_once(job):
    recipe = job.recipe()
    assert list(job.execute(recipe)) == list(NAMES)
    assert job.ran == list(NAMES)
    result = job.execute(recipe)
    assert job.ran == []
    assert result["train"]["made"] == "train"


@pytest.mark.parametrize(
    ("deleted", "again"),
    [("head", ["export", "report"]), ("bench.json", ["bench", "report"]), ("answers", [])],
)
def test_what_was_deleted_is_made_again_unless_it_took_hours(job, deleted, again):
    job.execute(job.recipe())
    shutil.rmtree(job.root / deleted)
    job.execute(job.recipe())
    assert job.ran == again


def test_deleted_answers_are_made_again_once_they_are_missed(job):
    job.execute(job.recipe())
    shutil.rmtree(job.root / "answers")
    job.fail, job.error = "verify", DraftheadError("no answers", field="answers")
    with pytest.raises(DraftheadError):
        job.execute(job.recipe(), first="verify", again=True)
    job.execute(job.recipe(), last="generate")
    assert job.ran == ["generate"]


def test_a_change_redoes_only_what_depends_on_it(job):
    job.execute(job.recipe())
    job.execute(job.recipe(serve={"num_speculative_tokens": 5}))
    assert job.ran == ["verify", "bench", "report"]


def test_who_ran_out_of_memory_goes_on_with_less(job):
    job.execute(job.recipe())
    less = {"gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": 1 << 28, "max_num_seqs": 8}
    job.execute(job.recipe(engine=less))
    assert job.ran == ["verify", "bench", "report"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DraftheadError("no engine")])
def test_a_proved_head_has_its_report_when_bench_is_stopped(job, error):
    job.fail, job.error = "bench", error
    with pytest.raises(type(error)):
        job.execute(job.recipe())
    assert job.ran == list(NAMES)
    job.fail = None
    job.execute(job.recipe())
    assert job.ran == ["bench", "report"]
    job.fail = "train"
    with pytest.raises(type(error)):
        job.execute(job.recipe(train={"epochs": 1}), overwrite=True)
    assert job.ran == ["train"]  # of what is not made there is no report


def test_each_kind_of_head_is_made_of_one_capture_and_goes_on_where_it_was_killed(job):
    both = job.recipe(head={"kind": ["eagle3", "dspark"]})
    once = ["generate", "capture", "vocab"]
    each = [name for name in NAMES if name not in once for _ in range(2)]
    job.fail, job.error = "verify", KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        job.execute(both)
    assert job.ran == [*once, "train", "train", "export", "export", "verify"]
    job.fail = None
    result = job.execute(both)
    assert job.ran == each[each.index("verify") :]
    assert result["generate"]["made"] == "generate"
    assert list(result["train"]) == ["eagle3", "dspark"]
    job.execute(both)
    assert job.ran == []
    # What one of them is trained with concerns no other; the reports tell of both.
    other = job.recipe(
        head={"kind": ["eagle3", "dspark"]}, for_kind={"dspark": {"train": {"epochs": 9}}}
    )
    job.execute(other, overwrite=True)
    assert job.ran == ["train", "export", "verify", "bench", "report", "report"]
    job.execute(other, first="bench", last="bench", kind="eagle3", again=True)
    assert job.ran == ["bench"]
    job.execute(other)
    assert job.ran == ["report", "report"]


def test_a_report_needs_no_bench(job):
    recipe = job.recipe()
    job.execute(recipe, last="verify")
    job.execute(recipe, first="report")
    assert job.ran == ["report"]
    job.execute(recipe)
    assert job.ran == ["bench", "report"]


def test_states_online_may_be_computed_elsewhere_from_then_on(job):
    job.execute(job.recipe(capture={"mode": "online"}))
    moved = {"mode": "online", "online_devices": [1], "online_bytes": 1 << 30}
    job.execute(job.recipe(capture=moved))
    assert job.ran == []


def test_costly_output_is_kept_unless_told(job):
    job.execute(job.recipe())
    changed = job.recipe(generate={"max_new_tokens": 7})
    with refused("generate.max_new_tokens", 512, 7, "--overwrite"):
        job.execute(changed)
    assert (job.root / "answers" / "part").exists()
    assert job.ran == []
    job.execute(changed, overwrite=True)
    assert job.ran == list(NAMES)


def test_changed_prompts_or_target_make_answers_stale(job):
    recipe = job.recipe()
    job.execute(recipe)
    job.prompts.write_text(json.dumps({"prompt": "Bye"}) + "\n")
    with refused("prompt_files"):
        job.execute(recipe)
    other = job.prompts.rename(job.prompts.with_name("other.jsonl"))
    with refused("prompts.sources") as stale:
        job.execute(job.recipe(prompts={"sources": [{"path": str(other)}]}))
    assert "prompt_files" not in str(stale.value)  # hashes of names that the sources tell already


def test_a_target_that_has_moved_makes_nothing_stale(job, llama, tmp_path):
    job.execute(job.recipe())
    (tmp_path / "link").symlink_to(llama)
    job.execute(job.recipe(target={"path": str(tmp_path / "link")}))
    assert job.ran == []


def test_a_target_is_hashed_once_in_a_process(job, monkeypatch):
    hashed, real = [], fsio.sha256_file
    monkeypatch.setattr(fsio, "_hashes", fsio._Hashes())
    monkeypatch.setattr(fsio, "_TIME_STAMP_NS", -fsio._TIME_STAMP_NS)
    monkeypatch.setattr(fsio, "sha256_file", lambda path: hashed.append(path) or real(path))
    recipe = job.recipe()
    job.execute(recipe)
    job.execute(recipe, first="verify", again=True)
    assert recipe_target(recipe).fingerprint
    assert len(hashed) == len(set(hashed)) > 3


def test_a_changed_folder_of_prompts_makes_answers_stale(job, tmp_path):
    data = tmp_path / "data" / "train.jsonl"
    data.parent.mkdir()
    data.write_text('{"prompt": "Hello"}\n')
    recipe = job.recipe(prompts={"sources": [{"dataset": str(data.parent)}]})
    job.execute(recipe)
    (data.parent / ".hidden").write_text("nothing that is read")
    job.execute(recipe)
    assert job.ran == []
    data.write_text('{"prompt": "Bye"}\n')
    with refused("prompt_files"):
        job.execute(recipe)


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        ({"head": {"num_attention_heads": 3}}, "num_attention_heads; 3"),
        ({"head": {"hidden_size": 100}}, "head.hidden_size; 100"),
        ({"head": {"aux_layers": [0]}}, "head.aux_layers; [0]; capture.aux_layers"),
        ({"train": {"start_from": "nowhere"}}, "train.start_from; nowhere"),
    ],
)
def test_a_head_that_cannot_be_made_is_told_before_the_first_answer(job, sections, names):
    with refused(*names.split("; ")):
        job.execute(job.recipe(**sections))
    assert job.ran == []
    job.execute(job.recipe(**sections), last="capture")  # which it does not concern
    assert job.ran == ["generate", "capture"]


def test_a_head_to_start_from_that_reads_other_layers_is_told_before_the_first_answer(job, llama):
    """Told after capture, those layers would have cost the answers too."""
    head = crafted.head(job.prompts.with_name("head"), llama)
    start = {"train": {"start_from": str(head)}}
    layers = read_folder(head).config.aux_layer_ids
    with refused("head.aux_layers", (0, 1, 5)):
        job.execute(job.recipe(**start, capture={"aux_layers": [0, 1, 5]}))
    assert job.ran == []
    captured = {"aux_layers": sorted({0, *layers})}
    job.execute(job.recipe(**start, capture=captured, head={"aux_layers": list(layers)}))
    assert job.ran == list(NAMES)


def test_a_load_that_would_wait_in_a_queue_is_refused(job):
    """64 of 128 would run, and the report say 128 at once."""
    for section, value in (("bench", [1, 128]), ("verify", 128)):
        load = {section: {"concurrency": value}}
        with refused(f"{section}.concurrency", 128, "engine.max_num_seqs"):
            job.execute(job.recipe(**load))
        job.execute(job.recipe(**load, engine={"max_num_seqs": 128}), overwrite=True)


def test_a_changed_head_to_start_from_makes_training_stale_and_a_tracker_does_not(job, llama):
    head = crafted.head(job.prompts.with_name("head"), llama)
    start = {"start_from": str(head)}
    layers = {"aux_layers": list(read_folder(head).config.aux_layer_ids)}
    job.execute(job.recipe(train=start, capture=layers))
    job.execute(job.recipe(train=start | {"track": ["wandb"]}, capture=layers))
    assert job.ran == []
    (head / "model.safetensors").write_text("trained once more")
    job.execute(job.recipe(train=start, capture=layers))
    assert job.ran == list(NAMES[NAMES.index("train") :])


def test_from_and_to(job):
    recipe = job.recipe()
    job.execute(recipe, last="vocab")
    assert job.ran == ["generate", "capture", "vocab"]
    with refused("stage export", "train"):
        job.execute(recipe, first="export")
    with refused("--from train", "--to vocab"):
        job.execute(recipe, first="train", last="vocab")
    with refused("'trian'", "train"):
        job.execute(recipe, first="trian")


def test_training_wants_the_vocabulary_that_the_recipe_names(job):
    job.execute(job.recipe(), last="vocab")
    smaller = job.recipe(vocab={"size": 128})
    with refused("stage train", "vocab", "--from vocab"):
        job.execute(smaller, first="train", last="train")
    assert job.ran == []
    job.execute(smaller, first="vocab", last="train")
    assert job.ran == ["vocab", "train"]


def test_a_failed_claim_still_writes_the_report_and_is_told(job):
    recipe = job.recipe()
    job.fail = "verify"
    with pytest.raises(ClaimFailed):
        job.execute(recipe)
    assert job.ran[-3:] == ["verify", "bench", "report"]
    job.fail = None
    job.execute(recipe)
    assert job.ran == ["verify", "report"]


def test_only_what_was_made_with_other_settings_is_in_the_way(job):
    job.execute(job.recipe())
    other = job.recipe(generate={"max_new_tokens": 7})
    with refused("generate.max_new_tokens", 512, 7):
        job.execute(other)
    job.prompts.write_text(json.dumps({"prompt": "Bye"}) + "\n")
    with refused("generate.max_new_tokens", "prompts.jsonl"):
        job.execute(other)
    (job.root / "answers" / "part").unlink()
    job.execute(other)
    assert job.ran == list(NAMES)


def test_defaults_are_held_against_what_a_run_was_made_with(job, monkeypatch):
    job.execute(job.recipe())
    job.execute(job.recipe(capture={"aux_layers": [2, 3]}, train={"learning_rate": 2e-3}))
    assert job.ran == []
    monkeypatch.setattr(Target, "default_aux_layers", lambda self: (1, 3))
    with refused("aux_layers", [2, 3], [1, 3]):
        job.execute(job.recipe())


def test_missing_prompts_file(job):
    recipe = job.recipe()
    job.prompts.unlink()
    with refused("prompts.jsonl"):
        job.execute(recipe)


@pytest.mark.parametrize(
    ("state", "content", "named"),
    [
        ("done", "{", "JSON"),
        ("done", "[]", []),
        ("done", '{"inputs": {}}', "summary"),
        ("done", '{"inputs": 3, "summary": {}}', "inputs"),
        ("begun", "3", 3),
    ],
)
def test_broken_record_is_named(job, state, content, named):
    recipe = job.recipe()
    job.execute(recipe)
    record = job.root / ".stages" / f"vocab.{state}.json"
    record.write_text(content)
    with refused(f"vocab.{state}.json", named):
        job.execute(recipe, first="vocab", again=True)
    assert RunDir(job.root).answers.exists()


def test_again_measures_again_and_keeps_what_took_hours(job):
    recipe = job.recipe()
    job.execute(recipe)
    job.execute(recipe, first="bench", last="bench", again=True)
    assert job.ran == ["bench"]
    job.execute(recipe)
    assert job.ran == ["report"]  # it told of the old measurement
    job.execute(recipe, again=True)
    assert job.ran == [name for name in NAMES if name not in ("generate", "train")]


def test_a_claim_that_fails_when_measured_again_is_not_done(job):
    recipe = job.recipe()
    job.execute(recipe)
    job.fail = "verify"
    with pytest.raises(ClaimFailed):
        job.execute(recipe, first="verify", last="verify", again=True)
    with pytest.raises(ClaimFailed):  # and the report told of the measurement before it
        job.execute(recipe)
    assert job.ran == ["verify", "report"]


def test_killed_while_its_record_is_written_the_report_does_not_tell_of_what_was(job, monkeypatch):
    recipe = job.recipe()
    job.execute(recipe)
    with monkeypatch.context() as patched:
        finish = RunDir.finish

        def then_killed(*args):
            finish(*args)
            raise KeyboardInterrupt

        patched.setattr(RunDir, "finish", then_killed)
        with pytest.raises(KeyboardInterrupt):
            job.execute(recipe, first="bench", last="bench", again=True)
    job.execute(recipe)
    assert job.ran == ["report"]


def test_killed_while_output_is_thrown_away_it_is_not_done(job, monkeypatch):
    recipe = job.recipe()
    job.execute(recipe)
    real = os.unlink

    def unlink(path, **options):
        if str(path).endswith("part"):
            raise KeyboardInterrupt
        real(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            job.execute(job.recipe(generate={"max_new_tokens": 7}), overwrite=True)
    job.execute(job.recipe())  # the old settings again
    assert job.ran[:2] == ["generate", "capture"]  # the states went with the answers


def test_what_a_link_leads_to_is_thrown_away_and_the_link_stays(job, tmp_path):
    elsewhere = tmp_path / "large disk"
    (elsewhere / "more").mkdir(parents=True)
    job.root.mkdir(parents=True)
    (job.root / "answers").symlink_to(elsewhere)
    job.execute(job.recipe())
    old = elsewhere / "more" / "part-000007.parquet"
    old.touch()
    job.execute(job.recipe(generate={"max_new_tokens": 7}), overwrite=True)
    assert not old.exists()  # it would count as one of the new answers
    assert (job.root / "answers").is_symlink()
    assert (elsewhere / "part").exists()


def test_output_that_cannot_be_thrown_away_is_not_gone_on_with(job, monkeypatch):
    job.execute(job.recipe())

    real = os.unlink

    def denied(path, **options):
        if str(path).endswith("part"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        real(path, **options)

    monkeypatch.setattr(os, "unlink", denied)
    with refused("part"):
        job.execute(job.recipe(generate={"max_new_tokens": 7}), overwrite=True)
    assert job.ran == []


def test_a_new_token_makes_nothing_stale(job):
    extra = {"hf_token": "first", "load_format": "hf"}
    job.execute(job.recipe(engine={"extra": extra}))
    job.execute(job.recipe(engine={"extra": extra | {"hf_token": "second"}}))
    assert job.ran == []
    assert not any(b"first" in f.read_bytes() for f in job.root.rglob("*") if f.is_file())
    with refused("engine.extra.load_format"):
        job.execute(job.recipe(engine={"extra": {**extra, "load_format": "auto"}}))


def test_another_k_is_written_into_the_format_that_names_it(job):
    for speculators, stages in ((False, ["verify"]), (True, ["export", "verify"])):
        settings = {"export": {"speculators": speculators}}
        job.execute(job.recipe(**settings, serve={"num_speculative_tokens": 3}), last="verify")
        job.execute(job.recipe(**settings, serve={"num_speculative_tokens": 5}), last="verify")
        assert job.ran == stages


def test_a_format_that_is_no_longer_asked_for_is_not_left_of_an_older_head(job):
    job.execute(job.recipe(export={"speculators": True}))
    (job.root / "head-speculators").mkdir()
    job.execute(job.recipe(export={"speculators": False}))
    assert not (job.root / "head-speculators").exists()


def test_what_a_kill_left_half_made_is_swept_from_the_runs_folders(job, tmp_path):
    recipe = job.recipe()
    job.execute(recipe)
    (tmp_path / "disk").mkdir()
    (job.root / "states").symlink_to(tmp_path / "disk")
    halves = [".verify.json.1.tmp", ".stages/.x.json.1.tmp", "states/.unit-000000.json.1.tmp"]
    folders = [".head.1.tmp", "train/.best.1.tmp", "train/checkpoint/.step-00000007.1.tmp"]
    for folder in folders:
        (job.root / folder).mkdir(parents=True)
    for half in (*halves, *(f"{folder}/model.safetensors" for folder in folders)):
        (job.root / half).write_bytes(b"half")
    for name in ("replaced", "not replaced"):  # killed before and after the new one took its place
        (job.root / "train" / f".{name}.old").mkdir()
        (job.root / "train" / f".{name}.old" / "old").touch()
    (job.root / "train" / "replaced").mkdir()
    job.execute(recipe)
    hidden = {str(p.relative_to(job.root)) for p in job.root.rglob(".*")}
    assert {name for name in hidden if name.endswith((".tmp", ".old"))} == set()
    assert list((tmp_path / "disk").iterdir()) == []
    assert list((job.root / "train" / "replaced").iterdir()) == []
    assert (job.root / "train" / "not replaced" / "old").exists()


def test_answers_are_stale_when_the_template_or_its_arguments_change(job, llama, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text(templates.THINKING_OFF)
    target = {"path": str(llama), "chat_template": str(own)}
    job.execute(job.recipe(target=target), last="generate")
    with refused("target.chat_template_kwargs"):
        off = target | {"chat_template_kwargs": {"enable_thinking": False}}
        job.execute(job.recipe(target=off), last="generate")
    own.write_text(templates.CHATML)
    with refused("chat_template"):
        job.execute(job.recipe(target=target), last="generate")
    job.execute(job.recipe(target=target), last="generate", overwrite=True)
    assert job.ran == ["generate"]


def test_a_target_without_a_template_is_refused_before_it_is_hashed(
    job, llama, tmp_path, monkeypatch
):
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    monkeypatch.setattr(Target, "fingerprint", property(lambda _: pytest.fail("hashed")))
    with refused("target.chat_template"):
        job.execute(job.recipe(target={"path": str(base)}))


def test_a_stage_keeps_the_day_on_which_it_first_began(tmp_path):
    run = RunDir(tmp_path / "run")
    assert run.began("generate") is None
    run.begin("generate", {"a": 1}, overwrite=False)
    began = run.began("generate")
    run.begin("generate", {"a": 1}, overwrite=False)
    assert run.began("generate") == began
    run.begin("generate", {"a": 2}, overwrite=True)
    assert run.began("generate") > began
    write_json(run.record("generate", "begun"), {"a": 2})  # as runs before this kept no day
    assert run.began("generate") is None
    run.begin("generate", {"a": 2}, overwrite=False)
    assert run.began("generate") > began
