"""The stages of the main job in order: what each reads, what makes it stale, how it resumes."""

import contextlib
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from drafthead.data.records import check_file
from drafthead.data.template import given_template, recipe_template
from drafthead.errors import ClaimFailed, DraftheadError
from drafthead.fsio import (
    RunLock,
    file_hash,
    fingerprint,
    keep_hashes,
    sweep,
    visible_files,
)
from drafthead.head.checkpoint import head_folder, trained_steps
from drafthead.kinds import Jobs, each_kind
from drafthead.machine import torchrun_rank
from drafthead.progress import waiting, waiting_for_library
from drafthead.recipe import CaptureSection, Recipe, Source, without_secrets
from drafthead.rundir import SHARED, RunDir
from drafthead.targets import captured_layers, recipe_target
from drafthead.vocab import check_size

_PROVES = ("verify", "bench", "report")
_MEMORY = ("gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_seqs")


@dataclass(frozen=True)
class Stage:
    """One stage: where its function lives and what, when it changes, makes its output stale."""

    name: str
    does: str
    function: str
    """`module:name`, imported when the stage runs: vLLM takes seconds to import."""
    sections: tuple[str, ...]
    """The recipe's sections that the stage reads."""
    after: str | None
    """The stage whose output it reads; stale input makes it stale too."""
    beside: str | None = None
    """Another one, whose settings are among its own."""
    costly: bool = False
    """Hours of work: never thrown away without `--overwrite`."""
    check: str | None = None
    """`module:name`, called with recipe and run before output made with other settings is thrown
    away: raises for a mistake that the stage would find only after that."""
    reads_all: bool = False
    """Tells of every stage, so it runs again after any of them did."""


STAGES = (
    Stage(
        "generate",
        "the target writes the answers (and, in the same pass, the states)",
        "drafthead.capture.stages:generate",
        ("target", "prompts", "generate", "capture", "engine"),
        None,
        costly=True,
        check="drafthead.capture.stages:check_prompts",
    ),
    Stage(
        "capture",
        "the target's hidden states for those answers, checked",
        "drafthead.capture.stages:capture",
        (),
        "generate",
    ),
    Stage("vocab", "the draft vocabulary", "drafthead.vocab:vocab", ("vocab",), "generate"),
    Stage(
        "train",
        "the head, and its held-out acceptance",
        "drafthead.train.stage:train",
        ("vocab", "head", "train"),
        "capture",
        beside="vocab",
        costly=True,
        check="drafthead.train.stage:check_start",
    ),
    Stage(
        "export",
        "the folder that vLLM serves",
        "drafthead.drafters.export:export",
        ("export",),
        "train",
    ),
    Stage(
        "verify",
        "the same tokens with the head as without it",
        "drafthead.prove.verify:verify",
        ("engine", "serve", "verify"),
        "export",
    ),
    Stage(
        "bench",
        "the speed with the head against the speed without it",
        "drafthead.prove.bench:bench",
        ("engine", "serve", "bench"),
        "export",
    ),
    Stage(
        "report",
        "report and model card",
        "drafthead.report.page:report",
        ("verify", "publish"),
        "export",  # it tells what bench has not measured
        reads_all=True,
    ),
)
NAMES = tuple(stage.name for stage in STAGES)


def stage_named(name: str) -> Stage:
    """The stage called ``name``.

    Raises:
        DraftheadError: there is none.
    """
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise DraftheadError(f"no stage is called {name!r}; they are, in order: {', '.join(NAMES)}")


def _settings(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The recipe's settings that each stage's output depends on."""
    dumped = without_secrets(recipe.model_dump(mode="json"))  # a new token makes nothing stale
    # The target's files count, by their hashes, and not where they lie.
    dumped["target"] = {k: v for k, v in dumped["target"].items() if k not in ("path", "revision")}
    dumped["train"]["ttt_steps"] = recipe.ttt_steps
    dumped["train"]["learning_rate"] = recipe.train.peak_learning_rate
    dumped["train"]["track"] = []  # who looks on does not change what is trained
    # … nor do the GPU that computes states online and the memory that they pass through.
    dumped["capture"] |= CaptureSection().model_dump(include={"online_bytes", "online_devices"})
    del dumped["capture"]["max_unusable"]  # … nor how many conversations may be left out
    # By default they follow from the target: `stage_inputs` names those that are captured.
    layers = dumped["capture"].pop("aux_layers")
    settings = {stage.name: {name: dumped[name] for name in stage.sections} for stage in STAGES}
    # How much memory the engine may take does not change what the target writes: who ran out of it
    # goes on with less.
    engine = settings["generate"]["engine"]
    settings["generate"]["engine"] = {k: v for k, v in engine.items() if k not in _MEMORY}
    if layers is not None:
        settings["generate"]["aux_layers"] = sorted(layers)
    return settings


def check_made(recipe: Recipe, run: RunDir) -> None:
    """Look whether the head of a run was made with this recipe, of one kind, which its card and its
    report will tell of. What verify and bench were asked their own records say.

    Raises:
        DraftheadError: it was made with another one.
    """
    for name, settings in _settings(recipe).items():
        if name in _PROVES:
            continue
        if changed := run.changed(name, settings):
            raise DraftheadError(
                f"{run.root}: its {name} stage was made with other settings "
                f"({', '.join(changed)}), and the card would describe this recipe; use "
                "the recipe that made it, or `drafthead run RECIPE` again"
            )


def _check_load(recipe: Recipe, wanted: Sequence[str]) -> None:
    """Whether the engines run as many requests at once as verify and bench put to them: of the rest
    of a load, which waits in vLLM's queue, a report would say that it was measured."""
    room = recipe.engine.max_num_seqs
    asked = {"verify": [recipe.verify.concurrency or 1], "bench": recipe.bench.concurrency}
    for stage, numbers in asked.items():
        if stage in wanted and max(numbers) > room:
            raise DraftheadError(
                f"{stage}.concurrency: {max(numbers)} requests at once, and engine.max_num_seqs "
                f"lets {room} run while the others wait; raise it to {max(numbers)}"
            )


def _folder_hash(folder: Path) -> str:
    """Fingerprint of a folder's files, hidden ones excluded: `datasets` does not read those
    either."""
    return fingerprint({name: file_hash(path) for name, path in visible_files(folder).items()})


def stage_inputs(recipe: Recipe, wanted: Sequence[str] = ()) -> dict[str, dict]:
    """What each stage depends on: equal inputs mean that a finished output still holds.

    Raises:
        DraftheadError: target or prompts cannot be read, or do not fit what the ``wanted`` stages
            need: better now than hours later.
    """
    target = recipe_target(recipe)
    if "generate" in wanted:
        recipe_template(recipe, target)
    if "vocab" in wanted:
        check_size(recipe.vocab.size, target.vocab_size)
    layers = captured_layers(recipe, target)
    _check_load(recipe, wanted)

    def hashes(sources: list[Source]) -> dict[str, str]:
        files = [source.path for source in sources if source.path]
        for path in files:
            check_file(path)
        hashed = {path: file_hash(path) for path in files}
        folders = [source.dataset for source in sources if source.dataset]
        return hashed | {name: _folder_hash(Path(name)) for name in folders if Path(name).is_dir()}

    settings = _settings(recipe)
    inputs: dict[str, dict] = {}
    for stage in STAGES:
        needs = settings[stage.name]
        if stage.name == "bench":
            needs["prompt_files"] = hashes(recipe.bench.sources or [])
        if stage.name == "export" and recipe.export.speculators:
            needs["k"] = recipe.serve.k  # which that format names
        if stage.name == "verify":
            needs["temperature"] = recipe.bench.temperature  # of the sampled answers
        if stage.name == "train" and (start := recipe.train.start_from):
            folder = head_folder(start)
            if "train" in wanted and not (folder / "config.json").is_file():
                raise DraftheadError(f"train.start_from: {start}: no head there (no config.json)")
            files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
            needs["start_files"] = {f.name: file_hash(f) for f in files if f.is_file()}
            if (steps := trained_steps(recipe)) != recipe.ttt_steps:
                needs["ttt_steps"] = steps  # follows that head and how many tokens may be drafted
        if stage.after is None:
            needs["aux_layers"] = list(layers)
            needs["target_files"] = target.fingerprint
            needs["prompt_files"] = hashes(recipe.prompts.sources)
            if recipe.target.chat_template is not None:
                needs["chat_template"] = fingerprint(given_template(recipe))
        else:
            needs["after"] = fingerprint(inputs[stage.after])
        inputs[stage.name] = needs
    return inputs


def _load(function: str) -> Callable[..., Any]:
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)


def _run_stage(
    stage: Stage,
    recipe: Recipe,
    run: RunDir,
    inputs: dict,
    overwrite: bool,
    beside: Jobs,
    console: Console,
) -> dict:
    """Run a stage in a run's folder. beside: all kinds of head that are made with it."""
    if torchrun_rank() > 0:
        # A further process of torchrun: the first one keeps the records.
        return _load(stage.function)(recipe, run, console=Console(quiet=True))
    if overwrite and stage.check:
        _load(stage.check)(recipe, run)
    run.begin(stage.name, inputs, overwrite=overwrite or not stage.costly)
    for other in STAGES:
        if other.reads_all and not stage.reads_all:
            for _, place in beside.values():
                place.forget(other.name)
    kind = "" if run.shared is None else f" ({recipe.head.only_kind})"
    console.print(f"[bold]{stage.name}{kind}[/bold]: {stage.does}")
    start = time.monotonic()
    summary = _load(stage.function)(recipe, run, console=console)
    summary["seconds"] = round(time.monotonic() - start, 1)
    run.finish(stage.name, inputs, summary)
    return summary


def _tell(summaries: dict[str, dict], stage: Stage, kind: str, summary: dict, beside: Jobs) -> None:
    """Add a stage's summary: by kind, if each of several has its own."""
    if stage.name in SHARED or len(beside) == 1:
        summaries[stage.name] = summary
    else:
        summaries.setdefault(stage.name, {})[kind] = summary


def execute(
    recipe: Recipe,
    runs_dir: Path,
    *,
    first: str = NAMES[0],
    last: str = NAMES[-1],
    kind: str | None = None,
    overwrite: bool = False,
    again: bool = False,
    console: Console,
) -> dict[str, dict]:
    """Run the stages from ``first`` to ``last``; what is finished is not done again.

    A claim that fails in verify or bench does not keep the later stages from running: the report
    must show it. It is raised at the end. So is what stops bench, Ctrl-C or an engine that fails: a
    proved head gets its report and card, which say that speed was not measured.

    Args:
        recipe: the run's recipe.
        runs_dir: folder of all runs; this one's is ``runs_dir / recipe.name``.
        first: name of the first stage to run.
        last: name of the last one.
        kind: of several kinds of head, the only one to do it for; None is each.
        overwrite: let answers, states or training made with other settings be replaced.
        again: do finished stages again, those that take hours excepted: measure once more.
        console: where people read what happens.

    Returns:
        Each stage's summary, by its name; with several kinds of head, and from train on, one of
        each kind.

    Raises:
        DraftheadError: wrong input, or a stage before ``first`` has not been run.
        ClaimFailed: not lossless.
    """
    wanted = NAMES[NAMES.index(stage_named(first).name) : NAMES.index(stage_named(last).name) + 1]
    if not wanted:
        raise DraftheadError(f"--from {first} comes after --to {last}")
    first_process = torchrun_rank() == 0
    run = RunDir(runs_dir / recipe.name)
    if NAMES[0] not in wanted and not run.root.is_dir():
        raise DraftheadError(
            f"{run.root}: no such run, and {wanted[0]} is not its first stage; start it with "
            "`drafthead run RECIPE`, or name the folder that it lies in with --runs"
        )
    keep_hashes(run.root)
    with waiting_for_library(console, f"reading {recipe.target.path}"):
        target = recipe_target(recipe)  # comes from the hub if it is not here
    jobs = each_kind(recipe, runs_dir, kind)
    beside = jobs if kind is None else each_kind(recipe, runs_dir)
    with waiting(console, "hashing target and prompts"):
        inputs = {name: stage_inputs(of_kind, wanted) for name, (of_kind, _) in jobs.items()}
    if {"generate", "train"} <= set(wanted):
        from drafthead.train.stage import check_shape

        for of_kind, place in jobs.values():
            check_shape(of_kind, place)  # now, not after hours of answers
    if recipe.bench.sources and {"generate", "bench"} <= set(wanted):
        from drafthead.prove.prompts import own_prompts

        own_prompts(recipe, target, recipe_template(recipe, target))  # … as well
    # Each stage for all kinds before the next one: a report tells of all.
    steps = [
        (stage, name)
        for stage in STAGES
        for name in (list(jobs)[:1] if stage.name in SHARED else jobs)
        if stage.name in wanted
    ]
    summaries: dict[str, dict] = {}
    failed: ClaimFailed | None = None
    stopped: BaseException | None = None
    anything_ran = False
    with RunLock(run.root) if first_process else contextlib.nullcontext():
        if first_process:
            for folder in {run.root, *(place.root for _, place in jobs.values())}:
                sweep(folder)
        for stage, name in steps:
            if stopped is not None and not stage.reads_all:
                continue
            (of_kind, place), needs = jobs[name], inputs[name]
            if stage.name in SHARED:
                place = run
            done = place.finished(stage.name, needs[stage.name])
            redo = (again and not stage.costly) or (stage.reads_all and anything_ran)
            if done is not None and not redo:
                console.print(f"[dim]{stage.name}: done before[/dim]")
                _tell(summaries, stage, name, done, beside)
                continue
            anything_ran = True
            for before in (stage.after, stage.beside):
                if (
                    before
                    and before not in wanted
                    and place.finished(before, needs[before]) is None
                ):
                    unfinished = next(s for s in NAMES if place.finished(s, needs[s]) is None)
                    raise DraftheadError(
                        f"{place.root}: stage {stage.name} needs {before}, which has not ended "
                        f"with this recipe; run `drafthead run RECIPE --from {unfinished}`"
                    )
            try:
                done = _run_stage(
                    stage, of_kind, place, needs[stage.name], overwrite, beside, console
                )
                _tell(summaries, stage, name, done, beside)
            except ClaimFailed as error:
                console.print(f"[red]{stage.name}: {escape(str(error))}[/red]")
                failed = error
            except (DraftheadError, KeyboardInterrupt) as error:
                if getattr(error, "field", None) == "answers":  # deleted since: or the command
                    run.forget(NAMES[0])  # that the error names would find nothing to do
                if stopped is not None:  # a report cannot be made of what there is
                    console.print(f"[red]{stage.name}: {escape(str(error))}[/red]")
                elif stage.name == "bench" and NAMES[-1] in wanted:
                    console.print("bench: stopped; points that were measured are kept")
                    stopped = error
                else:
                    raise
    if stopped is not None:
        raise stopped
    if failed is not None:
        raise failed
    return summaries
