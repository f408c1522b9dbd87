"""The command line as a newcomer meets it: a mistake gives one message that names file, field and
mend, exit code 2, and never a traceback."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from drafthead.cli_options import console
from drafthead.errors import ClaimFailed, DraftheadError
from drafthead.fsio import RunLock
from tests.prove import crafted
from tests.refused import refused

RECIPE = """\
name: r
target: {path: target}
prompts:
  sources: [{path: p.jsonl}]
  heldout: 4
vocab: {size: 256}
train: {epochs: 1}
engine: {max_model_len: 128}
"""
RUN = ("run", "r.yaml")


@pytest.fixture
def place(tmp_path, llama, monkeypatch):
    """A folder with a target, prompts and a recipe, as the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, "target")
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": f"q{i}"}) + "\n" for i in range(40)))
    Path("r.yaml").write_text(RECIPE)
    return tmp_path


def edit(old, new):
    """A change of the recipe."""
    assert old in RECIPE
    return lambda: Path("r.yaml").write_text(RECIPE.replace(old, new))


def write(name, content):
    return lambda: Path(name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def remove(pattern):
    return lambda: [path.unlink() for path in Path().glob(pattern)]


def folder(name):
    def make():
        Path(name).unlink(missing_ok=True)
        Path(name).mkdir(parents=True)

    return make


def truncate():
    path = Path("target/model.safetensors")
    path.write_bytes(path.read_bytes()[:5000])


def truncated_head():
    crafted.head(Path("runs/r/head"), Path("target"))
    path = Path("runs/r/head/model.safetensors")
    path.write_bytes(path.read_bytes()[:900])


def head_without_weights():
    crafted.head(Path("runs/r/head"), Path("target"))
    Path("runs/r/head/model.safetensors").unlink()


def head_of_another_target():
    crafted.head(Path("runs/r/head"), Path("target"))
    path = Path("runs/r/head/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 1024}))


def base_model_with_prompts_of_its_own_to_bench():
    Path("target/chat_template.jinja").rename("t.jinja")
    edit("path: target", "path: target, chat_template: t.jinja")()
    text = Path("r.yaml").read_text()
    Path("r.yaml").write_text(text + "bench: {sources: [{path: p.jsonl}], max_new_tokens: 16}\n")


def nothing():
    pass


TARGETS = {
    "missing": (lambda: shutil.rmtree("target"), "target: no such folder"),
    "a file": (edit("path: target", "path: p.jsonl"), "a target is a folder"),
    "broken config": (write("target/config.json", "{broken"), "config.json: cannot be read"),
    "empty config": (write("target/config.json", "{}"), "config.json: cannot be read"),
    "binary config": (write("target/config.json", b"\xff\xfe\0"), "config.json: cannot be read"),
    "unknown model": (write("target/config.json", '{"model_type": "x"}'), "model type `x`"),
    "no chat template": (remove("target/chat_template.jinja"), "no chat template"),
    "broken template": (write("target/chat_template.jinja", "{{ x "), "chat template"),
    "truncated": (truncate, "model.safetensors: not a whole safetensors file"),
    "missing shard": (
        write("target/model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}'),
        "shards are missing: b.safetensors",
    ),
    "broken index": (write("target/model.safetensors.index.json", "{}"), "broken index"),
    "no tokenizer": (remove("target/token*"), "tokenizer cannot be loaded"),
    "broken tokenizer": (write("target/tokenizer.json", "{"), "tokenizer cannot be loaded"),
}
PROMPTS = {
    "missing": (remove("p.jsonl"), "p.jsonl: no such file"),
    "a folder": (folder("p.jsonl"), "p.jsonl is a folder"),
    "empty": (write("p.jsonl", ""), "p.jsonl: no prompt in it"),
    "broken line": (write("p.jsonl", '{"prompt": "a"}\n{"prompt": \n'), "p.jsonl, line 2: broken"),
    "no roles": (write("p.jsonl", '{"messages": [{"content": "a"}]}\n'), "line 1: message 0"),
    "lists": (write("p.jsonl", '["a"]\n'), "record 1: a record is an object, found str"),
    "latin-1": (write("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}\n'), "line 2: not UTF-8"),
    "utf-16": (write("p.jsonl", '{"prompt": "a"}\n'.encode("utf-16")), "line 1: not UTF-8"),
    "text file": (edit("p.jsonl", "r.yaml"), "found .yaml"),
    "held out": (edit("heldout: 4", "heldout: 40"), "prompts.heldout is 40"),
}
RECIPES = {
    "missing": (remove("r.yaml"), "r.yaml: no such recipe; `drafthead init"),
    "a folder": (folder("r.yaml"), "r.yaml: is a folder"),
    "empty": (write("r.yaml", ""), "found nothing"),
    "binary": (write("r.yaml", b"\xff\0\x80"), "a YAML file in UTF-8"),
    "null bytes": (write("r.yaml", "name: \0"), "not YAML"),
    "tabs": (write("r.yaml", "name: r\ntarget:\n\tpath: t\n"), "line 3, column 1"),
    "code": (write("r.yaml", "a: !!python/object/apply:os.system ['true']"), "not YAML"),
    "duplicate key": (
        write("r.yaml", RECIPE + "train: {epochs: 2}\n"),
        "`train` is written twice, here and in line 7",
    ),
    "duplicate inner key": (edit("epochs: 1", "epochs: 1, epochs: 2"), "written twice"),
    "typo": (edit("epochs", "epoch"), "unknown key `train.epoch`; did you mean `epochs`?"),
    "negative": (edit("heldout: 4", "heldout: -4"), "`prompts.heldout`"),
    "not a number": (edit("epochs: 1", "learning_rate: .nan"), "`train.learning_rate`"),
    "infinite": (edit("epochs: 1", "learning_rate: .inf"), "`train.learning_rate`"),
    "Python's None": (edit("max_model_len: 128", "max_model_len: None"), "should be `null`"),
    "list for a section": (edit("{epochs: 1}", "[1]"), "`train`: should be a mapping"),
    "no target": (edit("target: {path: target}", "target:"), "`target` is missing"),
    "vocabulary too large": (edit("size: 256", "size: 9999"), "only 512 tokens"),
    "vocabulary too small": (edit("size: 256", "size: 0"), "`vocab.size`"),
    "aux layer": (edit("vocab:", "capture: {aux_layers: [1, 99]}\nvocab:"), "run from 0 to 6"),
    "too long": (edit("max_model_len: 128", "max_model_len: 9999"), "reaches only 512"),
    "more drafts than a block has": (
        edit("vocab:", "head: {kind: dspark}\nbench: {num_speculative_tokens: [9]}\nvocab:"),
        "bench.num_speculative_tokens: 9",
    ),
    "runs is a file": (write("runs", ""), "is a file, not a folder"),
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(*case, id=f"{kind}: {name}")
        for kind, cases in (("target", TARGETS), ("prompts", PROMPTS), ("recipe", RECIPES))
        for name, case in cases.items()
    ],
)
def test_wrong_input_is_one_message_before_any_work(place, drafthead, change, words):
    change()
    code, out, err = drafthead(*RUN)
    assert code == 2
    assert "error:" in err
    assert words in err
    assert "Traceback" not in err
    assert out == ""
    assert not list(Path("runs").glob("r/answers/part*"))


@pytest.mark.parametrize(
    ("change", "args", "words"),
    [
        (nothing, ("run", "r.yaml", "--from", "train", "--to", "vocab"), "comes after"),
        (nothing, ("run", "r.yaml", "--from", "trian"), "they are, in order: generate"),
        (nothing, ("run", "r.yaml", "--form", "train"), "No such option"),
        (nothing, ("rnu", "r.yaml"), "Did you mean 'run'?"),
        (nothing, ("train", "r.yaml"), "`drafthead run r.yaml`"),
        (nothing, ("report", "r.yaml", "--runs", "a b"), "`drafthead run r.yaml --runs 'a b'`"),
        (folder("runs/r"), ("report", "r.yaml"), "`drafthead run r.yaml --from generate`"),
        (folder("runs/r"), ("train", "r.yaml", "--from", "nope"), "train.start_from: nope"),
        (nothing, ("serve", "r.yaml", "--print"), "no head there"),
        (truncated_head, ("serve", "r.yaml", "--print"), "not a whole safetensors file"),
        (
            head_without_weights,
            ("serve", "r.yaml", "--print"),
            "error: {0}/runs/r/head: no *.safetensors",
        ),
        (head_of_another_target, ("serve", "r.yaml", "--print"), "head of another target"),
        (
            head_of_another_target,
            ("inspect", "runs/r/head", "--target", "target"),
            "head of another target",
        ),
        (folder("h"), ("inspect", "h"), "config.json: not found"),
        (nothing, ("inspect", "nope"), "no such head"),
        (nothing, ("generate", "r.yaml", "--location", "s3://b/c"), "add --ray"),
        (nothing, ("bench", "r.yaml", "--k", "one"), "`bench.num_speculative_tokens.0`"),
        (nothing, ("bench", "r.yaml", "--temperature", "nan"), "`bench.temperature.0`"),
        (nothing, ("verify", "r.yaml", "--samples", "-1"), "`verify.samples`"),
        (nothing, ("inspect", "p.jsonl"), "no such head"),
        (nothing, ("states", "check", "nope"), "nope/meta.json: not found"),
        (nothing, ("states", "check", "target"), "a run's is runs/NAME/states"),
        (nothing, ("bench", "r.yaml", "--head", "nope"), "nope: no such folder; a head is"),
        (
            folder("runs/r"),
            ("bench", "r.yaml", "--set", "code=no.jsonl"),
            "no.jsonl: no such file; a path",
        ),
        (nothing, ("publish", "r.yaml", "--repo", "a/b"), "`drafthead verify r.yaml`"),
        (nothing, ("quantize", "target", "target", "--prompts", "p.jsonl"), "would be replaced"),
        (nothing, ("quantize", "target", "out", "--prompts", "nope.jsonl"), "no such file"),
        (nothing, ("init", "target", "--out", "r.yaml"), "r.yaml: exists already"),
        (nothing, ("init", "nowhere", "--out", "n.yaml"), "nowhere: no such folder"),
        (nothing, ("init", "target", "--out", "p.jsonl/n.yaml"), "is no folder"),
        (nothing, ("doctor", "--url", "http://127.0.0.1:9"), "is a vLLM server there?"),
    ],
)
def test_wrong_use_is_one_message(place, drafthead, quick_doctor, change, args, words):
    change()
    before = set(place.rglob("[!.]*"))
    code, _, err = drafthead(*args)
    assert code == 2
    assert set(place.rglob("[!.]*")) == before, "a mistake leaves nothing behind"
    assert words.format(place) in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["my recipe.yaml", "[a].yaml", "deep/in/r.yaml"])
def test_a_message_names_the_recipe_that_was_given(place, drafthead, name):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(RECIPE)
    _, out, err = drafthead("serve", name, "--json")
    assert f"`drafthead run {shlex.quote(name)}`" in json.loads(out)["error"]
    assert f"`drafthead run {shlex.quote(name)}`" in err


def test_the_command_line_is_imported_without_what_takes_long():
    code = "import sys, drafthead.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "vllm", "numpy", "pydantic", "pyarrow", "psutil"}


def test_a_further_process_of_torchruns_says_what_is_wrong(place, drafthead, monkeypatch):
    """It may be of that one alone, as a GPU that it has not; the JSON is the first one's."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = drafthead("train", "r.yaml", "--json")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "`drafthead run r.yaml`" in err


@pytest.mark.parametrize("command", ["train", "run"])
@pytest.mark.parametrize("size", [None, "1"])
def test_a_process_that_has_no_first_one_beside_it(place, drafthead, monkeypatch, command, size):
    """As a scheduler may leave it in the environment: it wrote nothing, and said nothing of it."""
    monkeypatch.setenv("RANK", "1")
    if size:
        monkeypatch.setenv("WORLD_SIZE", size)
    code, _, err = drafthead(command, "r.yaml")
    assert code == 2
    assert err.startswith("error: RANK=1, ")
    assert f"WORLD_SIZE is {size or 'not set'}; " in err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "change",
    [
        write("r.yaml", RECIPE.replace("{epochs: 1}", "")),  # a section with nothing in it
        write("r.yaml", "\ufeff" + RECIPE),
        write("r.yaml", RECIPE.replace("\n", "\r\n")),
        lambda: Path("p.jsonl").write_text("\ufeff" + Path("p.jsonl").read_text()),
        lambda: Path("p.jsonl").write_text(Path("p.jsonl").read_text().replace("\n", "\r\n")),
        base_model_with_prompts_of_its_own_to_bench,
        lambda: Path("p.jsonl").write_text(
            json.dumps({"prompt": "word " * 1_000_000}) + "\n" + Path("p.jsonl").read_text()
        ),
    ],
    ids=[
        "empty section",
        "bom",
        "crlf",
        "prompts bom",
        "prompts crlf",
        "base model",
        "a huge line",
    ],
)
def test_what_only_looks_odd_is_taken(place, drafthead, monkeypatch, change):
    """Up to where the engine would start, and no further."""

    def started(_stage, plan, _run, _console):
        raise DraftheadError(f"started, {sum(len(unit) for unit in plan.units)} conversations")

    monkeypatch.setattr("drafthead.capture.stages._in_child", started)
    change()
    _, _, err = drafthead(*RUN)
    assert "started, 40 conversations" in err or "started, 41 conversations" in err


def test_a_mistake_mended_before_anything_was_made_is_no_other_setting(
    place, drafthead, monkeypatch
):
    def started(*_args):
        raise ClaimFailed("started")

    monkeypatch.setattr("drafthead.capture.stages._in_child", started)
    Path("p.txt").write_text("What is one?\n")
    edit("p.jsonl", "p.txt")()
    code, _, err = drafthead(*RUN)
    assert code == 2
    assert "found .txt" in err
    Path("r.yaml").write_text(RECIPE)
    code, _, err = drafthead(*RUN, "--to", "generate")
    assert code == 1, err


def test_a_mistake_throws_nothing_away(place, drafthead, monkeypatch):
    """Neither broken prompts, nor a head that does not fit, nor a machine that cannot train so
    costs what was made before."""
    kept = [Path("runs/r/answers/part"), Path("runs/r/train/best.json")]
    for path in kept:
        path.parent.mkdir(parents=True)
        path.write_text("hours of work")
    stages = Path("runs/r/.stages")
    stages.mkdir()
    for name in ("generate", "train"):
        (stages / f"{name}.begun.json").write_text('{"train": "other settings"}')
    Path("p.jsonl").write_text("no JSON\n")
    code, _, err = drafthead(*RUN, "--overwrite")
    assert code == 2
    assert "p.jsonl, line 1: broken JSON" in err
    monkeypatch.setattr(
        "drafthead.rundir.RunDir.finished", lambda self, name, _: {} if name != "train" else None
    )
    folder("h")()
    code, _, err = drafthead("train", "r.yaml", "--from", "h", "--overwrite")
    assert code == 2
    assert "train.start_from: h" in err
    assert [path.read_text() for path in kept] == ["hours of work"] * 2


def test_init_says_that_prompts_are_missing(place, drafthead):
    code, _, err = drafthead("init", "target", "--prompts", "no.jsonl", "--out", "n.yaml")
    assert code == 0
    assert "no.jsonl is not there yet" in err
    _, _, err = drafthead("init", "target", "--prompts", "p.jsonl", "--out", "o.yaml")
    assert "not there" not in err


def test_a_second_run_in_the_same_folder_is_refused(place, drafthead):
    with RunLock(place / "runs" / "r"):
        code, _, err = drafthead(*RUN)
    assert code == 2
    assert "another drafthead run" in err


def test_a_disk_that_fills_up_anywhere_is_one_message(place, drafthead, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device", "runs/r/states/unit")

    monkeypatch.setattr("drafthead.run.execute", full)
    code, _, err = drafthead(*RUN)
    assert code == 2
    assert "runs/r/states/unit: the disk is full" in err


@pytest.mark.parametrize("kind", [ImportError, OSError])
def test_a_library_that_cannot_be_imported_is_one_message(place, drafthead, monkeypatch, kind):
    def broken(*_args, **_options):
        raise kind("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr("drafthead.run.execute", broken)
    code, _, err = drafthead(*RUN)
    assert code == 2
    assert "libcudart.so.13" in err
    assert "drafthead doctor" in err


def test_ctrl_c_says_how_to_go_on_and_lets_go_of_the_folder(place, drafthead):
    """A real process, stopped by a real SIGINT while a stage is at work."""
    script = """
        import signal, sys, time
        from drafthead import cli, run

        # Whoever starts the suite in the background has it ignore the signal.
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def stage(recipe, run, *, console):
            print("at work", flush=True)
            time.sleep(86_400)

        run._load = lambda function: stage
        sys.argv = ["drafthead", "run", "r.yaml", "--to", "generate", "--json"]
        cli.main()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "at work\n"
    with refused(place / "runs" / "r"), RunLock(place / "runs" / "r"):
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "stopped; run the same command again to go on" in err
    assert "Traceback" not in err
    with RunLock(place / "runs" / "r"):
        pass


def test_commands_to_copy_are_on_one_line(drafthead, llama, tmp_path):
    """A console 80 wide breaks lines between words."""
    recipe = tmp_path / ("a-long-name-" * 5) / "recipe.yaml"
    _, _, err = drafthead("init", str(llama), "--out", str(recipe), "--prompts", "none.jsonl")
    assert f"drafthead doctor {recipe}, drafthead run {recipe}\n" in err
    _, _, err = drafthead("doctor", str(recipe))
    assert "none.jsonl: no such file; a path in a recipe is relative to the folder" in err


def test_a_message_names_no_recipe_of_an_earlier_command(place, drafthead):
    edit("{", "{")()
    drafthead("report", "r.yaml", "--runs", "elsewhere")
    assert console.named("drafthead capture RECIPE") == "drafthead capture r.yaml --runs elsewhere"
    drafthead("states", "check", "none")
    assert console.named("drafthead capture RECIPE") == "drafthead capture RECIPE"
