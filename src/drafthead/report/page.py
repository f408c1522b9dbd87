"""Stage report: one HTML page from what a run measured, and the card."""

from typing import Any

from rich.console import Console

from drafthead.fsio import write_bytes
from drafthead.progress import waiting
from drafthead.prove.choice import better_kind, made_beside
from drafthead.prove.numeric_noise import noise_words
from drafthead.recipe import Recipe
from drafthead.report.card import write_card
from drafthead.report.figures import figures, interval
from drafthead.report.results import Results, read_results
from drafthead.report.table import kinds_beside, lossless_words, results_table, verdict_words
from drafthead.report.words import (
    beside_rows,
    beyond_reason,
    environment,
    facts,
    grid_table,
    kinds_table,
    machine_facts,
    notes,
    predicted_cells,
    sampled_summary,
    sampled_words,
    served_cells,
    setting,
    speed_rows,
    tone,
)
from drafthead.rundir import RunDir
from drafthead.serve import engine_plan


def render(r: Results) -> str:
    """The page as HTML."""
    machine = (r.bench or r.verify)["machine"]
    values: dict[str, Any] = {
        "r": r,
        "bench": r.bench,
        "verify": r.verify,
        "lossless": lossless_words(r.verify),
        "noise": noise_words(r.verify),
        "sampled": sampled_words(r.verify),
        "sampling": sampled_summary(r.verify),
        "figures": figures(r),
        "notes": notes(r),
        "facts": facts(r),
        "machine": machine,
        "machine_facts": machine_facts(machine),
        "serve": serve_command(r),
        "kinds": kinds_table(r.run),
    }
    if r.bench:
        values |= _speed(r)
    return environment().get_template("report.html.j2").render(values)


def _speed(r: Results) -> dict[str, Any]:
    """What the template shows of the measured speed."""
    expected = r.bench["predicted_acceptance_by_position"]
    served = r.bench["acceptance_by_position"]
    return {
        "verdict": verdict_words(r),
        "tone": tone(r.bench),
        "doubted": beyond_reason(r.bench),
        "setting": setting(r.bench),
        "predicted": predicted_cells(r.bench),
        "served": served_cells(r.bench),
        "gap": 100 * abs(expected[0] - served[0]) if expected and served else None,
        "interval": interval(r),
        "speed": speed_rows(r.bench),
        "grid": grid_table(r.bench),
        "beside": beside_rows(r.bench),
    }


def serve_command(r: Results) -> str:
    """The command to serve with: as it was planned on the machine that was measured (or where only
    the proof was made, on that one), which need not be the one that this page is made on."""
    planned = {k: how["command"] for k, how in r.proof["served"].items()}
    planned |= r.bench.get("commands", {})
    if str(r.served_k) in planned:
        return planned[str(r.served_k)]
    plan = engine_plan(r.recipe, head=r.run.head, num_speculative_tokens=r.served_k)
    return plan.public.shell()


def report(recipe: Recipe, run: RunDir, *, console: Console) -> dict:
    """Write ``report.html`` and the head's card, and print the run's table. Of several kinds of
    head the better one's page also lies in the whole run's folder.

    Args:
        recipe: the run's recipe.
        run: a run that has been verified; what bench has not measured is said to be so.
        console: where the table is printed.

    Returns:
        Paths of what was written.

    Raises:
        DraftheadError: verify has not been run, or was run on another head.
    """
    with waiting(console, "reading records and hashing the head"):
        results = read_results(recipe, run)
    page = render(results).encode()
    places = {run.root}
    if better_kind(made_beside(run)) in (None, results.kind):
        places.add(run.top)
    for place in places:
        write_bytes(place / "report.html", page)
    card = write_card(results)
    console.print(results_table(results))
    if run.top in places and (kinds := kinds_table(run)):
        console.print(kinds_beside(kinds))
    return {"report": str(run.report_html), "card": str(card)}
