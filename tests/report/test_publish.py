"""Card and upload: every figure from the run, every file on the hub, nothing unproved."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from rich.console import Console

from drafthead.errors import ClaimFailed
from drafthead.fsio import RunLock, read_json, sha256_file, write_json
from drafthead.prove.proof import command_line
from drafthead.prove.verify import Outcome, verify
from drafthead.recipe import with_options
from drafthead.report.card import find_licence, usage, write_card
from drafthead.report.page import report
from drafthead.report.publish import files_to_publish, publish
from drafthead.report.results import read_results
from drafthead.rundir import RunDir
from drafthead.targets import load_target
from tests import templates
from tests.prove import made_run
from tests.refused import refused
from tests.report import hub

QUIET = Console(quiet=True)
PUBLISH = {"repo": "me/head", "base_model": "some/target", "license": "apache-2.0"}


@pytest.fixture
def made(tmp_path):
    recipe, run = made_run.make(tmp_path, publish=PUBLISH)
    report(recipe, run, console=QUIET)
    return recipe, run


def card_of(run):
    text = (run.head / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_card_header_and_figures(made):
    recipe, run = made
    header, body = card_of(run)
    assert header["base_model"] == "some/target"
    assert header["license"] == "apache-2.0"
    assert header["library_name"] == "vllm"
    assert header["pipeline_tag"] == "text-generation"
    assert header["base_model_relation"] == "adapter"
    bench = read_json(run.bench_json, "")
    for cell in bench["grid"]:
        assert f"**{cell['speedup']:.2f}×**" in body
        assert f"{cell['drafted_tokens_per_s']:.1f} tokens/s" in body
    for rate in (*bench["acceptance_by_position"], *bench["predicted_acceptance_by_position"]):
        assert f"{100 * rate:.1f} %" in body
    assert "63 of 64 answers identical" in body
    assert str(run.root) not in body  # no path of this machine
    assert recipe.target.path not in body
    assert "vllm serve some/target" in body
    assert "NCCL_P2P_DISABLE=1 NCCL_CUMEM_ENABLE=0 vllm serve" in body
    assert "--disable-custom-all-reduce" in body
    assert '"method":"eagle3","model":"me/head"' in body
    assert "enforce_eager" not in body


def test_no_command_stands_twice_at_the_end_of_the_card(made):
    recipe, run = made
    for path in (run.verify_json, run.bench_json):  # both proved and measured by one command
        write_json(path, read_json(path, "") | {"command": "drafthead run recipe.yaml"})
    report(recipe, run, console=QUIET)
    commands = card_of(run)[1].split("```")[-2].strip().splitlines()
    assert commands.count("drafthead run recipe.yaml") == 1
    assert len(commands) == len({*commands})


def test_the_card_gives_no_advice_that_is_of_one_machine(made):
    recipe, run = made
    bench = read_json(run.bench_json, "")
    slow = [c | {"compared_speedup": 0.9} for c in bench["grid"] if c["num_speculative_tokens"] > 1]
    ones = [c for c in bench["grid"] if c["num_speculative_tokens"] == 1]
    write_json(run.bench_json, bench | {"grid": ones + slow})
    plans = usage(
        read_results(recipe, run), "me/head", "some/target", load_target(recipe.target.path)
    )
    for plan in plans:
        assert plan is not None
        flags = {s.name for s in plan.settings}
        assert "speculative_config" in flags
        assert not flags & {"max_num_seqs", "max_cudagraph_capture_size", "gpu_memory_utilization"}


def test_the_card_says_what_the_target_needs_to_be_served(made):
    recipe, run = made
    needed = {
        "load_format": "hf",
        "hf_overrides": {"rope_theta": 1e6},
        "limit_mm_per_prompt": {"image": 0},
        "enable_prefix_caching": False,
        "max_logprobs": 40,
    }
    here = {
        "max_num_batched_tokens": 64,
        "cpu_offload_gb": 4,
        "compilation_config": {"cudagraph_capture_sizes": [1, 2]},
        "enforce_eager": True,
        "distributed_executor_backend": "ray",
        "download_dir": "a folder",
        "hf_token": "a secret",
    }
    keys = {"dtype": "float32", "tensor_parallel_size": 8}
    given = with_options(recipe, "engine", {"extra": needed | here, **keys})
    plans = usage(
        read_results(given, run), "me/head", "some/target", load_target(recipe.target.path)
    )
    for plan, gpus in zip(plans, (None, 2), strict=True):
        assert plan is not None
        assert plan.args | needed == plan.args
        assert plan.args.get("tensor_parallel_size") == gpus
        assert not plan.args.keys() & {*here, "dtype"}
    write_card(read_results(given, run))
    assert "--no-enable-prefix-caching" in card_of(run)[1]


def test_the_card_serves_with_the_template_beside_it(made):
    recipe, run = made
    arguments = {"enable_thinking": False}
    keys = {"chat_template": templates.THINKING_OFF, "chat_template_kwargs": arguments}
    given = with_options(recipe, "target", keys)
    write_card(read_results(given, run))
    assert "--chat-template chat_template.jinja" in card_of(run)[1]
    assert """--default-chat-template-kwargs '{"enable_thinking":false}'""" in card_of(run)[1]


def test_card_follows_the_figures(made):
    """No figure is typed: other results, another card."""
    recipe, run = made
    bench = read_json(run.bench_json, "")
    old = f"{bench['speedup']:.2f}×"
    text = json.dumps(bench).replace(json.dumps(bench["speedup"]), "7.77")
    run.bench_json.write_text(text)
    write_card(read_results(recipe, run))
    _, body = card_of(run)
    assert "**7.77×**" in body
    assert f"| **{old}**" not in body.split("k=3, 1 at once |")[1].split("\n")[0]


def test_licence_of_the_target_is_bundled_and_named(made):
    recipe, run = made
    target = load_target(recipe.target.path)
    assert find_licence(target, None).header == {"license": "unknown"}
    (target.path / "LICENSE").write_text("Apache License\n   Version 2.0, January 2004")
    assert find_licence(target, None).header == {"license": "apache-2.0"}
    (target.path / "LICENSE").write_text("LFM Open License v1.0\n")
    (target.path / "README.md").write_text("---\nlicense: other\nlicense_name: lfm1.0\n---\n# X\n")
    licence = find_licence(target, None)
    assert licence.header == {
        "license": "other",
        "license_name": "lfm1.0",
        "license_link": "LICENSE",
    }
    write_card(read_results(recipe, run))
    assert (run.head / "LICENSE").read_text() == "LFM Open License v1.0\n"
    assert "bundled as LICENSE" in card_of(run)[1]
    (target.path / "LICENSE").unlink()
    (target.path / "LICENSES").mkdir()  # one file a licence: none of them is the target's for sure
    latin = "---\nlicense: mit\n---\nCaf\u00e9\n".encode("latin-1")
    (target.path / "README.md").write_bytes(latin)
    assert find_licence(target, None).header == {"license": "mit"}
    # The proof is of the head as served: card and licence do not undo it.
    read_results(recipe, run)


@pytest.mark.parametrize(
    ("architecture", "needed"),
    [("LlamaForCausalLM", False), ("Gemma2ForCausalLM", True), ("Cohere2ForCausalLM", True)],
)
def test_the_card_says_who_needs_the_plugin(made, architecture, needed):
    """Stock vLLM refuses a head on a target whose class has no hook."""
    recipe, run = made
    config = load_target(recipe.target.path).path / "config.json"
    write_json(config, read_json(config, "") | {"architectures": [architecture]})
    write_card(read_results(recipe, run))
    assert ("pip install git+" in card_of(run)[1]) == needed


def test_dry_run_lists_and_uploads_nothing(made, monkeypatch):
    recipe, run = made
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = publish(recipe, run, repo=None, dry_run=True, console=QUIET)
    assert result["url"] is None
    listed = {f["path"]: f for f in result["files"]}
    assert set(listed) == {
        "README.md",
        "bench.json",
        "config.json",
        "model.safetensors",
        "proof.json",
        "report.html",
        "verify.json",
    }
    assert listed["model.safetensors"]["sha256"] == sha256_file(run.head / "model.safetensors")


def test_no_secret_is_published(made, monkeypatch):
    """Those that engines are started with: the proof has their arguments, the report the recipe."""
    recipe, run = made
    extra = {
        "load_format": "tensorizer",
        "hf_token": "zebra-1",
        "model_loader_extra_config": {"s3_secret_access_key": "zebra-2"},
    }
    given = with_options(recipe, "engine", {"extra": extra})
    started = []

    def prove(plans, *_):
        started.extend(plan.args for plan in plans.drafted.values())
        return Outcome(read_json(run.verify_json, "")["runs"])

    monkeypatch.setattr("drafthead.prove.verify.many_prompts", lambda *_: [])
    monkeypatch.setattr("drafthead.prove.verify.prove_lossless", prove)
    verify(given, run, console=QUIET)
    report(given, run, console=QUIET)
    publish(given, run, repo=None, dry_run=True, console=QUIET)
    assert [args | extra for args in started] == started
    published = {name: path.read_bytes() for name, path in files_to_publish(run).items()}
    assert {name for name, content in published.items() if b"zebra-" in content} == set()
    assert b"--load-format tensorizer" in published["proof.json"]
    assert b"hf_token: (not shown)" in published["report.html"]
    assert b"--load-format tensorizer" in published["README.md"]
    assert b"not shown" not in published["README.md"]  # no advice to others


def test_no_path_of_this_machine_is_published(made, monkeypatch, tmp_path):
    """Whoever reads them has other disks; the names alone stay."""
    recipe, run = made
    monkeypatch.setattr(sys, "argv", ["drafthead", "run", str(tmp_path / "my recipe.yaml")])
    given = with_options(recipe, "engine", {"extra": {"tokenizer": str(tmp_path / "tok")}})
    given = with_options(given, "prompts", {"sources": [{"path": str(tmp_path / "p.jsonl")}]})
    given = with_options(given, "train", {"start_from": str(tmp_path / "runs" / "old" / "head")})

    def prove(*_):
        return Outcome(read_json(run.verify_json, "")["runs"])

    monkeypatch.setattr("drafthead.prove.verify.many_prompts", lambda *_: [])
    monkeypatch.setattr("drafthead.prove.verify.prove_lossless", prove)
    write_json(run.bench_json, read_json(run.bench_json, "") | {"command": command_line()})
    verify(given, run, console=QUIET)
    report(given, run, console=QUIET)
    published = {name: path.read_bytes() for name, path in files_to_publish(run).items()}
    assert [name for name, content in published.items() if bytes(tmp_path) in content] == []
    proof = json.loads(published["proof.json"])
    assert proof["target"]["name"] == "SmolLM2-135M-Instruct"
    for served in proof["served"].values():
        assert served["engine_args"]["model"] == "SmolLM2-135M-Instruct"
        assert served["engine_args"]["speculative_config"]["model"] == "head"
    assert proof["command"] == "drafthead run 'my recipe.yaml'"
    # verify and bench of one `drafthead run` are one command.
    assert published["README.md"].count(b"drafthead run 'my recipe.yaml'") == 1


@pytest.mark.parametrize("url", [None, "https://git.example/drafthead"])
def test_the_card_says_how_to_install_drafthead(made, monkeypatch, url):
    """It is on no package index."""
    recipe, run = made
    monkeypatch.setattr("drafthead.report.card.repository", lambda: url)
    config = load_target(recipe.target.path).path / "config.json"
    write_json(config, read_json(config, "") | {"architectures": ["Gemma2ForCausalLM"]})
    write_card(read_results(recipe, run))
    assert f"`pip install git+{url or 'URL'}`" in card_of(run)[1]


def test_what_is_not_proved_is_not_published(tmp_path):
    recipe, run = made_run.make(tmp_path, lossless=False, publish=PUBLISH)
    report(recipe, run, console=QUIET)
    with refused("proof.json", error=ClaimFailed):
        publish(recipe, run, repo=None, dry_run=True, console=QUIET)
    proof = read_json(run.root / "proof.json", "")
    (run.root / "proof.json").write_text(json.dumps(proof | {"lossless": True}))
    with refused("proof.json", field="seal"):
        publish(recipe, run, repo=None, dry_run=True, console=QUIET)


def test_figures_of_another_head_are_not_published(made):
    recipe, run = made
    bench = read_json(run.bench_json, "")
    write_json(run.bench_json, bench | {"head": {"sha256": {"model.safetensors": "0" * 64}}})
    with refused("bench.json", "drafthead bench RECIPE"):
        publish(recipe, run, repo=None, dry_run=True, console=QUIET)
    run.bench_json.unlink()
    with refused("bench.json", "drafthead bench RECIPE"):
        publish(recipe, run, repo=None, dry_run=True, console=QUIET)
    write_json(run.bench_json, bench | {"speedup": 7.77})
    publish(recipe, run, repo=None, dry_run=True, console=QUIET)
    assert "7.77×" in run.report_html.read_text()  # what was written before told of other figures


def command(made, server, *arguments):
    recipe, run = made
    path = run.root.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return subprocess.run(
        [
            *(sys.executable, "-m", "drafthead", "publish", str(path), "--json"),
            *("--runs", str(run.root.parent), *arguments),
        ],
        env=os.environ
        | {
            "HF_ENDPOINT": server.url if server else "http://127.0.0.1:9",
            "HF_TOKEN": "a-token",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # the stand-in speaks plain LFS
            "NO_PROXY": "127.0.0.1",
        },
        capture_output=True,
        text=True,
    )


def test_another_recipe_than_made_the_head_is_refused(made):
    """The card would say that it was trained as this one asks."""
    recipe, run = made
    resolved = {
        "ttt_steps": recipe.ttt_steps,
        "learning_rate": recipe.train.peak_learning_rate,
    }
    train = recipe.model_dump(mode="json")["train"] | resolved
    card = (run.head / "README.md").read_text()
    for epochs, code in ((1, 2), (3, 0)):
        run.finish("train", {"train": train | {"epochs": epochs}, "after": "…"}, {"seconds": 240})
        done = command(made, None, "--dry-run")
        assert done.returncode == code, done.stderr
        assert ("its train stage was made with other settings" in done.stderr) == (code == 2)
        assert ("train.epochs: 1 -> 3" in done.stderr.replace("\n", " ")) == (code == 2)
        assert (run.head / "README.md").read_text() == card


def test_upload_brings_every_byte_to_the_hub(made):
    _, run = made
    with hub.running() as server:
        done = command(made, server, "--repo", "you/other")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["url"] == f"{server.url}/you/other/commit/{'1' * 40}"
        assert set(server.files) == {f["path"] for f in result["files"]}
        assert server.files["model.safetensors"] == (run.head / "model.safetensors").read_bytes()
        assert server.files["proof.json"] == (run.root / "proof.json").read_bytes()
        assert b'"model":"you/other"' in server.files["README.md"]
        assert "POST /api/models/you/other/commit/main" in server.log


def test_a_hub_that_refuses_is_a_clear_error(made):
    with hub.running() as server:
        server.refuse = True
        done = command(made, server)
        assert done.returncode == 2
        assert server.url in done.stderr
        assert "Traceback" not in done.stderr
        assert server.files == {}
    done = command(made, server)  # which has ended: nobody answers there
    assert done.returncode == 2
    assert "me/head: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_another_process_works_on_is_not_published(made):
    recipe, run = made
    with RunLock(run.root), refused(run.root):
        publish(recipe, run, repo="me/head", dry_run=True, console=QUIET)
    elsewhere = run.root.parent / "elsewhere"
    with refused("proof.json"):
        publish(recipe, RunDir(elsewhere), repo="me/head", dry_run=True, console=QUIET)
    assert not elsewhere.exists()


@pytest.mark.parametrize("repo", ["head", "me/some head", "a/b/c", "me/--x"])
def test_no_repository_by_that_name(made, repo):
    recipe, run = made
    with refused("publish.repo", repo):
        publish(recipe, run, repo=repo, dry_run=True, console=QUIET)
