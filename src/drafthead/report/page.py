"""Stage report: one HTML page and one Markdown page from what a run measured, and the card."""

from typing import Any

from rich.console import Console

from drafthead.fsio import write_bytes
from drafthead.prove.noise import noise_words
from drafthead.recipe import Recipe
from drafthead.report.card import write_card
from drafthead.report.figures import figures, interval
from drafthead.report.results import Results, read_results
from drafthead.report.table import lossless_words, results_table, verdict_words
from drafthead.report.words import (
    beside_rows,
    environment,
    facts,
    grid_table,
    machine_facts,
    notes,
    predicted_cells,
    sampled_summary,
    sampled_words,
    served_cells,
    setting,
    speed_rows,
    tone,
    vocabulary_rows,
)
from drafthead.rundir import RunDir
from drafthead.serve import engine_plan


def render(r: Results, template: str) -> str:
    """Render ``report.html.j2`` or ``report.md.j2``."""
    expected, served = (
        r.bench["predicted_acceptance_by_position"],
        r.bench["acceptance_by_position"],
    )
    gap = 100 * abs(expected[0] - served[0]) if expected and served else None
    plan = engine_plan(r.recipe, head=r.run.head, num_speculative_tokens=r.recommended_k)
    values: dict[str, Any] = {
        "r": r,
        "bench": r.bench,
        "verify": r.verify,
        "verdict": verdict_words(r),
        "tone": tone(r.bench),
        "setting": setting(r.bench),
        "lossless": lossless_words(r.verify),
        "noise": noise_words(r.verify),
        "sampled": sampled_words(r.verify),
        "sampling": sampled_summary(r.verify),
        "predicted": predicted_cells(r.bench),
        "served": served_cells(r.bench),
        "gap": gap,
        "interval": interval(r),
        "figures": figures(r),
        "speed": speed_rows(r.bench),
        "grid": grid_table(r.bench),
        "beside": beside_rows(r.bench),
        "vocabularies": vocabulary_rows(r.bench),
        "notes": notes(r),
        "facts": facts(r),
        "machine": machine_facts(r.bench["machine"]),
        "serve": plan.public.shell(),
    }
    return environment().get_template(template).render(values)


def report(recipe: Recipe, run: RunDir, *, console: Console) -> dict:
    """Write ``report.html``, ``report.md`` and the head's card, and print the run's table.

    Args:
        recipe: the run's recipe.
        run: a run that has been verified and benched.
        console: where the table is printed.

    Returns:
        Paths of what was written.

    Raises:
        DraftheadError: verify or bench has not been run, or was run on another head.
    """
    results = read_results(recipe, run)
    markdown = run.root / "report.md"
    write_bytes(run.report_html, render(results, "report.html.j2").encode())
    write_bytes(markdown, render(results, "report.md.j2").encode())
    card = write_card(results)
    console.print(results_table(results))
    return {"report": str(run.report_html), "markdown": str(markdown), "card": str(card)}
