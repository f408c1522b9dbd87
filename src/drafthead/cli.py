"""The command line: one thin function a command, no logic.

With ``--json`` a command prints one object on stdout; what people read goes to stderr.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.markup import escape

from drafthead import __version__
from drafthead.cli_options import (
    AsJson,
    Kind,
    Overwrite,
    RecipeFile,
    RunsDir,
    TrustRemoteCode,
    console,
    emit,
    one_stage,
    read_recipe,
    run_stage,
)
from drafthead.cli_prove import bench, verify
from drafthead.errors import ClaimFailed, DraftheadError, UnsupportedHead

app = typer.Typer(
    name="drafthead",
    help="Make a draft head for the model you serve (EAGLE-3, DSpark), serve it in vLLM, prove it.",
    epilog="Example: drafthead init ./my-model --prompts chats.jsonl; drafthead run recipe.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
INTERRUPTED = 130
STAGES, TOOLS = "The stages of run, one by one", "Tools"


def _version(show: bool) -> None:
    if show:
        print(f"drafthead {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    console.forget()


@app.command(epilog="Example: drafthead init ./my-model --prompts chats.jsonl")
def init(
    target: Annotated[str, typer.Argument(help="Target folder or hub id.")],
    prompts: Annotated[str, typer.Option(help="Your prompts: JSONL or Parquet.")] = "prompts.jsonl",
    out: Annotated[Path, typer.Option(help="Where to write the recipe.")] = Path("recipe.yaml"),
    chat_template: Annotated[
        str | None, typer.Option(help="Jinja file, for a target without a chat template.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    every_key: Annotated[
        bool, typer.Option("--all", help="Write every key, not only the nine that matter.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look at a target, your prompts and this machine; write a commented recipe for them."""
    from drafthead.init import describe, write_recipe

    about = write_recipe(
        target,
        prompts,
        out,
        chat_template=chat_template,
        trust_remote_code=trust_remote_code,
        every_key=every_key,
    )
    if as_json:
        emit(about, as_json)
    console.print(escape(describe(about)), soft_wrap=True)
    if not Path(prompts).exists():
        words = f"{prompts} is not there yet: the recipe is not fitted to it, and the run needs it"
        console.print(f"[yellow]{escape(words)}[/yellow]", soft_wrap=True)
    console.recipe = out
    console.print(
        f"wrote {escape(str(out))}; read it, then: drafthead doctor RECIPE, drafthead run RECIPE",
        soft_wrap=True,
    )


@app.command(epilog="Example: drafthead run recipe.yaml --from train --to export")
def run(
    recipe: RecipeFile,
    first: Annotated[
        str, typer.Option("--from", help="First stage; those before it must be done.")
    ] = "generate",
    last: Annotated[str, typer.Option("--to", help="Last stage.")] = "report",
    kind: Kind = None,
    runs: RunsDir = Path("runs"),
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Do the whole job: generate, capture, vocab, train, export, verify, bench, report."""
    from drafthead.run import execute

    result = execute(
        read_recipe(recipe),
        runs,
        first=first,
        last=last,
        kind=kind,
        overwrite=overwrite,
        console=console,
    )
    if as_json:
        emit(result, as_json)


def _add_stage(name: str, help_text: str) -> None:
    def command(
        recipe: RecipeFile,
        kind: Kind = None,
        runs: RunsDir = Path("runs"),
        overwrite: Overwrite = False,
        as_json: AsJson = False,
    ) -> None:
        one_stage(name, read_recipe(recipe), runs, overwrite, as_json, kind=kind)

    epilog = f"Example: drafthead {name} recipe.yaml"
    app.command(name, help=help_text, epilog=epilog, rich_help_panel=STAGES)(command)


def _add_cluster_stage(name: str, help_text: str) -> None:
    def command(
        recipe: RecipeFile,
        ray: Annotated[
            str | None, typer.Option(help="Ray cluster to spread over: auto, local, an address.")
        ] = None,
        workers: Annotated[
            int | None,
            typer.Option(help="Engines at once; by default all that there is room for.", min=1),
        ] = None,
        location: Annotated[
            str | None,
            typer.Option(help="fsspec URL for what workers finish; by default the run's folder."),
        ] = None,
        runs: RunsDir = Path("runs"),
        overwrite: Overwrite = False,
        as_json: AsJson = False,
    ) -> None:
        from drafthead.capture.cluster import on_cluster

        spread = on_cluster(read_recipe(recipe), ray, workers, location)
        one_stage(name, spread, runs, overwrite, as_json)

    epilog = f"Example: drafthead {name} recipe.yaml --ray auto --location s3://bucket/run"
    app.command(name, help=help_text, epilog=epilog, rich_help_panel=STAGES)(command)


for _name, _help in (
    ("generate", "Let the target write the answers (and capture its states in the same pass)."),
    ("capture", "Take the target's hidden states for the answers, and check them."),
):
    _add_cluster_stage(_name, _help)

_add_stage("vocab", "Choose the draft vocabulary from what the target wrote.")


@app.command(
    epilog="Example: torchrun --nproc-per-node 8 -m drafthead train recipe.yaml",
    rich_help_panel=STAGES,
)
def train(
    recipe: RecipeFile,
    start: Annotated[
        str | None,
        typer.Option("--from", help="Head to go on from: a folder or a hub id."),
    ] = None,
    kind: Kind = None,
    runs: RunsDir = Path("runs"),
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Train the head; under torchrun, on many GPUs."""
    from drafthead.machine import torchrun_rank
    from drafthead.train.stage import from_head

    rank = torchrun_rank()
    console.quiet = rank > 0
    loaded = from_head(read_recipe(recipe), start)
    one_stage("train", loaded, runs, overwrite, as_json and rank == 0, kind=kind)
    if start is not None:
        console.print(
            "The stages after train go by the recipe. Write into it: "
            f"train: {{start_from: {escape(str(start))}}}"
        )


@app.command(
    epilog="Example: drafthead export recipe.yaml --for vllm,sglang,llama.cpp,mlx",
    rich_help_panel=STAGES,
)
def export(
    recipe: RecipeFile,
    engines: Annotated[
        str | None,
        typer.Option("--for", help="Engines that are to serve it: vllm,sglang,llama.cpp,mlx."),
    ] = None,
    kind: Kind = None,
    runs: RunsDir = Path("runs"),
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the folder that vLLM serves; with --for, what other engines need besides, and say which
    of them serve it and why not."""
    from drafthead.drafters.export import export_for
    from drafthead.drafters.support import check_engines
    from drafthead.kinds import each_kind

    loaded, names = read_recipe(recipe), engines.split(",") if engines else []
    check_engines(names)
    summary = run_stage("export", loaded, runs, overwrite, kind=kind)
    if names:
        jobs = each_kind(loaded, runs, kind)
        made = {name: export_for(*job, names, console=console) for name, job in jobs.items()}
        several = len(loaded.head.kinds) > 1
        summary = {**summary, "engines": made if several else next(iter(made.values()))}
    emit(summary, as_json)


app.command(
    epilog="Example: drafthead verify recipe.yaml --k 1,2,3,5,7 --concurrency 64",
    rich_help_panel=STAGES,
)(verify)
app.command(
    epilog="Example: drafthead bench recipe.yaml --k 1,3,5 --head OTHER", rich_help_panel=STAGES
)(bench)
_add_stage("report", "Write the report and the model card of a finished run.")


@app.command(
    epilog="Example: drafthead quantize ./my-model ./my-model-nvfp4 --prompts r.yaml",
    rich_help_panel=TOOLS,
)
def quantize(
    target: Annotated[str, typer.Argument(help="Dense target folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="The new checkpoint's folder.")],
    prompts: Annotated[
        Path, typer.Option(help="What to calibrate on: a recipe (.yaml), JSONL or Parquet.")
    ],
    to: Annotated[
        Literal["nvfp4"], typer.Option("--format", help="The four-bit format.")
    ] = "nvfp4",
    samples: Annotated[int, typer.Option(help="Conversations to calibrate on.", min=1)] = 64,
    heldout: Annotated[int, typer.Option(help="Conversations to measure on.", min=1)] = 16,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Leave modules of this name unquantized; replaces the defaults."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a target with ModelOpt, calibrated on your prompts; print perplexity."""
    from drafthead.quantize import EXCLUDE, chats_of
    from drafthead.quantize import quantize as make

    calibration, held = chats_of(
        target, prompts, samples, heldout, trust_remote_code=trust_remote_code
    )
    record = make(
        target,
        out,
        calibration,
        held,
        exclude=exclude or EXCLUDE,
        trust_remote_code=trust_remote_code,
        console=console,
    )
    if as_json:
        emit(record, as_json)


@app.command(
    epilog="Example: drafthead inspect runs/my-model/head --target ./my-model",
    rich_help_panel=TOOLS,
)
def inspect(
    head: Annotated[str, typer.Argument(help="Head folder or hub id.")],
    target: Annotated[str | None, typer.Option(help="Target to hold the head against.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Say what a head is, and what is wrong with a broken one (exit code 2), or that vLLM may
    serve it but drafthead cannot compute it (3)."""
    from drafthead.drafters.inspect import describe, inspect_head
    from drafthead.head.checkpoint import head_folder
    from drafthead.progress import waiting, waiting_for_library
    from drafthead.targets import load_target

    with waiting_for_library(console, f"reading {target}"):
        loaded = load_target(target, trust_remote_code=trust_remote_code) if target else None
    with waiting(console, f"reading {head}"):
        about = inspect_head(head_folder(head), loaded)
    if as_json:
        emit(about, as_json)
    else:
        console.print(describe(about))
    if about["problems"]:
        raise typer.Exit(DraftheadError.exit_code)
    if about["unsupported"]:
        raise typer.Exit(UnsupportedHead.exit_code)


@app.command(
    epilog="Example: drafthead convert OWNER/NAME my-head --target ./my-model",
    rich_help_panel=TOOLS,
)
def convert(
    head: Annotated[str, typer.Argument(help="Head folder or hub id, in any format.")],
    out: Annotated[Path, typer.Argument(help="The new head's folder.")],
    target: Annotated[str | None, typer.Option(help="Target that the head is for.")] = None,
    engine: Annotated[str, typer.Option("--for", help="Engine that is to serve it.")] = "vllm",
    layer_ids: Annotated[
        Literal["inputs", "outputs"] | None,
        typer.Option(help="What eagle_config means, where that is not clear: SGLang's outputs."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a published head (vLLM's, speculators', SpecForge's, ModelOpt's, Liquid's) as an engine
    reads it: its configuration and names; no weight is changed."""
    from drafthead.drafters.export import convert_head, support_words
    from drafthead.head.checkpoint import head_folder
    from drafthead.progress import waiting, waiting_for_library
    from drafthead.targets import load_target

    with waiting_for_library(console, f"reading {target}"):
        loaded = load_target(target, trust_remote_code=trust_remote_code) if target else None
    with waiting(console, f"converting {head}"):
        about = convert_head(
            head_folder(head),
            out,
            target=loaded,
            engine=engine,
            layer_ids=layer_ids,
        )
    for name, can in about["engines"].items():
        console.print(support_words(name, can, out), soft_wrap=True)
    if as_json:
        emit(about, as_json)


@app.command(
    epilog="Example: drafthead serve recipe.yaml --print -- --port 8001",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def serve(
    context: typer.Context,
    recipe: RecipeFile,
    kind: Annotated[
        str | None, typer.Option(help="Of several kinds of head; by default the faster one.")
    ] = None,
    runs: RunsDir = Path("runs"),
    print_only: Annotated[
        bool, typer.Option("--print", help="Print the command, each flag explained; start nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Serve target and head with vLLM. Unknown arguments are passed on to it; --json prints the
    plan as JSON and starts nothing: vLLM's log would follow it on stdout. --print also names the
    commands of other engines that read the head."""
    from drafthead.drafters.inspect import other_engines
    from drafthead.fsio import keep_hashes
    from drafthead.progress import waiting
    from drafthead.prove.choice import to_serve
    from drafthead.prove.proof import why_unproved
    from drafthead.prove.served import as_served, served_k
    from drafthead.serve import example_request, serve_plan
    from drafthead.targets import recipe_target

    loaded, run = to_serve(read_recipe(recipe), runs, kind)
    if run.shared is not None:
        console.print(f"the {loaded.head.only_kind} head, {escape(str(run.head))}")
    k = served_k(loaded, run)
    served = as_served(loaded, run)
    plan = serve_plan(served, runs, extra=context.args, k=k, head=run.head)
    keep_hashes(run.top)
    target = recipe_target(loaded)
    with waiting(console, "hashing target and head"):
        drafted = plan.args["speculative_config"].get("num_speculative_tokens_per_batch_size")
        not_proved = why_unproved(run, k, served.serve.named_method, target, drafted)
    if not_proved:
        console.print(f"[yellow]{escape(not_proved)}[/yellow]", soft_wrap=True)
    for notice in plan.notices:
        console.print(f"[yellow]{escape(notice)}[/yellow]", soft_wrap=True)
    for setting in plan.settings:
        if setting.notable:
            console.print(f"[yellow]{escape(setting.why)}[/yellow]", soft_wrap=True)
    request = example_request(plan)
    if as_json or print_only:
        names = {"target_name": str(plan.settings[0].value), "head_name": str(run.head.resolve())}
        engines = other_engines(run.head, target, k, **names)
    if as_json:
        more = {"not_proved": not_proved, "example_request": request, "other_engines": engines}
        emit(plan.as_dict() | more, as_json)
    elif print_only:
        print(f"{plan.text()}\n\n# Once it is up:\n# {request}")
        for engine, lines in engines.items():
            print("\n".join([f"\n# In {engine}:", *(f"# {line}" for line in lines)]))
    else:
        console.print(f"once it is up: {escape(request)}", soft_wrap=True, highlight=False)
        os.execvpe(plan.command[0], plan.command, os.environ | plan.environment)
    if plan.unsupported:
        raise typer.Exit(UnsupportedHead.exit_code)


states_app = typer.Typer(
    help="Look after a store of states.",
    epilog="Example: drafthead states check runs/demo/states",
    no_args_is_help=True,
)
app.add_typer(states_app, name="states", rich_help_panel=TOOLS)


@states_app.command(
    "check", epilog="Example: drafthead states check runs/demo/states --repair, then capture"
)
def states_check(
    store: Annotated[Path, typer.Argument(help="Folder of the states.", metavar="DIR")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Throw broken units out, for capture to redo.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Verify every byte of a store; name what is broken."""
    from drafthead.states.check import check_command

    result = check_command(store, fix=repair, console=console)
    for fault in result["faults"]:
        console.print(f"[red]unit {fault['unit']}[/red]: {escape(fault['what'])}", soft_wrap=True)
    if as_json:
        emit(result, as_json)
    if result["whole"]:
        console.print(
            f"{escape(str(store))}: all {result['units']} units are whole", soft_wrap=True
        )
        return
    console.print(
        f"{len(result['faults'])} of {result['units']} units are broken; "
        f"next: `{escape(result['mend'])}`",
        soft_wrap=True,
    )
    raise typer.Exit(0 if repair else ClaimFailed.exit_code)


@app.command(epilog="Example: drafthead publish recipe.yaml --repo me/my-model-head --dry-run")
def publish(
    recipe: RecipeFile,
    repo: Annotated[str | None, typer.Option(help="OWNER/NAME on the hub.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="Of several kinds of head; by default the faster one.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files; upload nothing.")
    ] = False,
    runs: RunsDir = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Upload the head with its model card, proof and measurements to the hub."""
    from drafthead.prove.choice import to_serve
    from drafthead.report.publish import publish as upload
    from drafthead.run import check_made

    loaded, run = to_serve(read_recipe(recipe), runs, kind)
    check_made(loaded, run)
    result = upload(loaded, run, repo=repo, dry_run=dry_run, console=console)
    if as_json:
        emit(result, as_json)


@app.command(epilog="Example: drafthead doctor recipe.yaml")
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe whose target, prompts, disk and head to check.")
    ] = None,
    runs: RunsDir = Path("runs"),
    url: Annotated[
        str | None, typer.Option(help="A live server to diagnose, http://HOST:PORT.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check Python, PyTorch, vLLM, plugin, GPU and disk; say how to fix each fault."""
    from drafthead.doctor import diagnose

    found = diagnose(read_recipe(recipe) if recipe else None, runs, url=url, console=console)
    if as_json:
        emit(found, as_json)
    if not found["healthy"]:
        raise typer.Exit(DraftheadError.exit_code)


UsageError: Any = typer.BadParameter.__base__
"""A wrong command line. typer does not export the class, nor is it always click's own."""


def main() -> None:
    """Run the command line; errors a user can fix are one line and an exit code, no traceback.

    With ``--json`` such an error is the one object on stdout: ``{"error": …}``.
    """
    from drafthead.fsio import disk_errors

    try:
        with disk_errors("drafthead"):  # the last net: a disk that fills up is no traceback
            code = app(standalone_mode=False)
    except UsageError as error:
        if not error.format_message():  # no arguments at all: typer has printed the help
            sys.exit(error.exit_code)
        if error.ctx is not None:
            console.print(escape(error.ctx.get_usage()), soft_wrap=True)
        _fail("error", error.format_message(), error.exit_code)
    except ClaimFailed as error:
        _fail("claim failed", str(error), error.exit_code)
    except UnsupportedHead as error:
        _fail("unsupported", str(error), error.exit_code)
    except DraftheadError as error:
        _fail("error", str(error), error.exit_code)
    except (ImportError, OSError) as error:
        # A library that does not find its own shared objects raises an OSError without a number.
        ours = (getattr(error, "name", None) or "").startswith("drafthead")
        if ours or getattr(error, "errno", None) is not None:
            raise
        words = (
            f"{error}: incomplete installation; `drafthead doctor` looks at it, or install "
            "drafthead in a fresh environment"
        )
        _fail("error", words, DraftheadError.exit_code)
    if code == INTERRUPTED:  # typer's own answer to Ctrl-C
        words = "stopped; run the same command again to go on"
        console.print(words)
        if "--json" in sys.argv and not console.quiet:
            emit({"error": words}, True)
    sys.exit(code)


def _fail(kind: str, message: str, code: int) -> NoReturn:
    first, console.quiet = not console.quiet, False  # an error may be a further process's alone
    console.print(f"[red]{kind}:[/red] {escape(message)}", soft_wrap=True)
    if "--json" in sys.argv and first:
        emit({"error": message}, True)
    sys.exit(code)
