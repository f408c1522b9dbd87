"""What stands between this machine, or a live server, and a head that helps; and the fix.

``installation`` looks at what is installed, ``engine`` at whether PyTorch and vLLM work, ``recipe``
at target, prompts, memory, disk and head of a run; ``prove.live_server`` diagnoses a server.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from drafthead.doctor.engine import EngineCheck
from drafthead.doctor.installation import check_installation
from drafthead.errors import DraftheadError
from drafthead.finding import Finding
from drafthead.machine import Machine, this_machine
from drafthead.progress import waiting

# What needs PyTorch is imported where it is used: doctor must work where PyTorch does not.
if TYPE_CHECKING:
    from drafthead.recipe import Recipe

_MARKS = {"ok": "[green]ok[/green]", "warning": "[yellow]??[/yellow]", "fault": "[red]no[/red]"}


def __getattr__(name: str) -> Any:
    """`check_recipe` and `check_head`, imported when asked for."""
    if name in ("check_recipe", "check_head"):
        from drafthead.doctor import recipe as checks

        return getattr(checks, name)
    raise AttributeError(name)


def check_kinds(recipe: "Recipe", runs: Path, machine: Machine) -> list[Finding]:
    """See ``doctor.recipe``."""
    from drafthead.doctor import recipe as checks

    return checks.check_kinds(recipe, runs, machine)


def diagnose(
    recipe: "Recipe | None", runs: Path, *, url: str | None = None, console: Console
) -> dict:
    """Look at the installation, and at what recipe and live server add to it.

    Args:
        recipe: a run to check target, disk and head for.
        runs: folder of all runs.
        url: a live vLLM server to diagnose from its metrics.
        console: where people read the findings, each as soon as it is known.

    Returns:
        ``healthy`` (no fault) and ``findings``, JSON-able.

    Raises:
        DraftheadError: the server does not answer.
    """
    findings: list[Finding] = []

    def look(what: str, check: Callable[[], list[Finding]]) -> None:
        with waiting(console, what):
            new = check()
        findings.extend(new)
        for finding in new:
            words = f"{_MARKS[finding.state]} {finding.what}: {escape(finding.found)}"
            console.print(words, soft_wrap=True)
            if finding.mend:  # often a command, to be copied whole
                console.print(f"   [bold]{escape(finding.mend)}[/bold]", soft_wrap=True)

    machine = this_machine()
    look("looking at the installation", lambda: check_installation(machine))
    with EngineCheck(machine) as engine:  # it imports vLLM while the recipe is looked at
        with waiting(console, "importing PyTorch"):
            works = engine.torch_works()
        if not works and (recipe is not None or url is not None):
            skipped = " and ".join(
                name for name, value in (("recipe", recipe), ("server", url)) if value is not None
            )
            console.print(
                f"[yellow]Skipping the checks of the {skipped}: they need PyTorch.[/yellow]"
            )
            recipe = url = None
        if recipe is not None:
            look("reading target and prompts", lambda: check_kinds(recipe, runs, machine))
        extra = recipe.engine.extra if recipe is not None else {}
        look("importing vLLM", lambda: engine.findings(_architecture(recipe), extra))
    if url is not None:
        from drafthead.prove.live_server import diagnose_server

        look(f"asking {url}", lambda: diagnose_server(url, recipe, runs))
    return {
        "healthy": all(finding.state != "fault" for finding in findings),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }


def _architecture(recipe: "Recipe | None") -> str | None:
    """vLLM's class for the recipe's target; None where that is not one."""
    if recipe is None:
        return None
    from drafthead.targets import recipe_target

    try:
        (architecture,) = recipe_target(recipe).architectures
    except (DraftheadError, ValueError):  # said already; of several vLLM takes the first it knows
        return None
    return architecture
