"""Stage report: one HTML page and one Markdown page from what a run measured, and the card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console

from drafthead.fsio import write_bytes
from drafthead.prove import charts
from drafthead.prove.results import Results, read_results
from drafthead.prove.table import lossless_words, results_table, verdict_words
from drafthead.recipe import Recipe
from drafthead.rundir import RunDir
from drafthead.serve import engine_plan

_TONES = {"faster": "good", "slower": "bad"}


def tone(cell: dict) -> str:
    """Class of a ratio: ``good``, ``bad`` or ``unsure``."""
    return _TONES.get(cell["verdict"], "unsure")


def environment() -> jinja2.Environment:
    """Templates of this package; a name that is not given is an error, never an empty place."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(
        loader=loader,
        autoescape=jinja2.select_autoescape(["html.j2", "html"]),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )


def _figure(title: str, caption: str, svg: str, legend: Sequence = (), foot: str = "") -> dict:
    return {"title": title, "caption": caption, "svg": svg, "legend": legend, "foot": foot}


def _acceptance(r: Results) -> dict:
    served = r.bench["acceptance_by_position"]
    predicted = (r.bench["predicted_acceptance_by_position"] or [])[: len(served)]
    where = range(len(served))
    series = [charts.Series("served", "head", where, served)]
    legend = [("head", "served, the engine's own counters")]
    if predicted:
        series.insert(0, charts.Series("predicted", "predicted", where, predicted))
        legend.insert(0, ("predicted", "predicted on held-out states"))
    svg = charts.bars("Acceptance by draft position", [f"draft {i + 1}" for i in where], series)
    caption = "Share of steps in which the draft at this position, and all before it, was accepted."
    return _figure("Acceptance by position", caption, svg, legend)


def _speeds(r: Results) -> dict | None:
    rows = [(row["name"], row["speedup"], *row["speedup_ci95"]) for row in speed_rows(r.bench)]
    if len(rows) < 2:
        return None
    svg = charts.intervals("Speed with the head over speed without", rows)
    caption = (
        "Dots are measured ratios, bars their 95 % intervals. Left of 1 the head costs more than "
        "it saves."
    )
    return _figure("Speed with the head over without", caption, svg)


def _step_time(r: Results) -> dict | None:
    """Where a step's time goes: with each k, beside a plain step."""
    cells = [c for c in r.bench["grid"] if c["concurrency"] == 1 and not c["temperature"]]
    cells = [c for c in cells if c["step_s"]["base"] and c["step_s"]["drafted"]]
    if not cells:
        return None
    cells.sort(key=lambda cell: cell["num_speculative_tokens"])
    plain = 1000 * cells[0]["step_s"]["base"]
    rows: list[tuple[str, list[tuple[str, str, float]]]] = [
        ("plain step", [("target", "base", plain)])
    ]
    for cell in cells:
        step = 1000 * cell["step_s"]["drafted"]
        extra = ("drafting, checking", "head", max(step - plain, 0.0))
        k = cell["num_speculative_tokens"]
        rows.append((f"k = {k}", [("target", "base", min(plain, step)), extra]))
    pays = ", ".join(
        f"{c['accepted_length'] * plain / (1000 * c['step_s']['drafted']):.2f}× at k = "
        f"{c['num_speculative_tokens']}"
        for c in cells
    )
    return _figure(
        "Where a step's time goes",
        "Milliseconds of one decoding step, one request at a time. A plain step writes one token.",
        charts.stacks("Milliseconds of a decoding step", rows),
        [("base", "as long as a plain step"), ("head", "drafting, and checking more tokens")],
        f"Tokens a step over what a step takes: {pays} (decoding alone, prefill left out).",
    )


def _cost_model(r: Results) -> dict | None:
    for fit in r.bench.get("cost_model") or []:
        points = fit["points"]
        if fit["concurrency"] != 1 or len(points) < 2:
            continue
        ks = [int(k) for k in fit["predicted_speedup"]]
        line = charts.Series("model", "predicted", ks, list(fit["predicted_speedup"].values()))
        dots = charts.Series(
            "measured",
            "head",
            [p["num_speculative_tokens"] for p in points],
            [p["measured"] for p in points],
            joined=False,
        )
        error = fit["median_relative_error"]
        return _figure(
            "How many drafts pay",
            "Decoding speed with k drafts a step over without, one request at a time.",
            charts.lines("Decoding speedup by k", [line, dots], "drafts a step (k)"),
            [("predicted", "cost model"), ("head", "measured")],
            f"Best: k = {fit['best_num_speculative_tokens']}."
            + (
                f" Median out-of-sample error of the model {error:.1%}."
                if error is not None
                else ""
            ),
        )
    return None


def _coverage(r: Results) -> dict | None:
    if r.coverage is None:
        return None
    sizes = [point["size"] for point in r.coverage["curve"]]
    shares = [point["coverage"] for point in r.coverage["curve"]]
    size, share = r.coverage["size"], r.coverage["coverage"]
    unseen = r.coverage.get("heldout_coverage")
    return _figure(
        "Draft vocabulary",
        "Share of the tokens that the target wrote which the head could draft, by size.",
        charts.lines(
            "Coverage of the draft vocabulary",
            [charts.Series("coverage", "head", sizes, shares)],
            "tokens in the draft vocabulary",
            y_format=charts.percent,
            log_x=True,
            mark=(size, share, f"{size:,}: {share:.1%}"),
        ),
        foot="" if unseen is None else f"Of the held-out answers {unseen:.1%}; the rest is a miss.",
    )


def _training(r: Results) -> list[dict]:
    figures = []
    for field, title, caption in (
        ("loss", "Training loss", "As logged, over the optimizer's steps."),
        (
            "accepted_length",
            "Held-out accepted length",
            "Tokens a step as it would be served; the best checkpoint is chosen by it.",
        ),
    ):
        points = [(m["step"], m[field]) for m in r.metrics if m.get(field) is not None]
        if len(points) > 1:
            x, y = zip(*points, strict=True)
            series = charts.Series(title, "head", x, y)
            figures.append(
                _figure(title, caption, charts.lines(title, [series], "step", from_zero=False))
            )
    return figures


def speed_rows(bench: dict) -> list[dict]:
    """Rows of the speed table: each point of the grid, then the sources of the first."""

    def row(name: str, cell: dict) -> dict:
        latency = cell["latency"]["drafted"]
        first, later = latency["first_token_s"], latency["per_later_token_s"]
        return {
            **cell,
            "name": name,
            "tone": tone(cell),
            "first": f"{1000 * first['p50']:.0f} ms" if first else "–",
            "later": f"{1000 * later['p50']:.1f} / {1000 * later['p99']:.1f} ms" if later else "–",
        }

    rows = []
    order = ("temperature", "concurrency", "num_speculative_tokens")
    for cell in sorted(bench["grid"], key=lambda cell: [cell[name] for name in order]):
        warm = f", T={cell['temperature']:g}" if cell["temperature"] else ""
        at_once = f", {cell['concurrency']} at once" if cell["concurrency"] > 1 else ""
        rows.append(row(f"k={cell['num_speculative_tokens']}{at_once}{warm}", cell))
    by_source = bench["grid"][0]["by_source"]
    if len(by_source) > 1:
        rows += [row(source, cell) for source, cell in by_source.items()]
    return rows


def facts(r: Results) -> list[tuple[str, str]]:
    """How target and head look and what the head was made from."""
    config = r.head_config
    layers = config.get("eagle_aux_hidden_state_layer_ids")
    found = [
        ("target", r.recipe.target.path),
        (
            "head",
            f"{config['num_hidden_layers']} layer, hidden {config['hidden_size']}, MLP "
            f"{config['intermediate_size']}, {config['draft_vocab_size']:,} of "
            f"{config['vocab_size']:,} tokens, reads layers {layers}",
        ),
    ]
    made = r.stages.get("generate", {})
    if made:
        found.append(
            (
                "answers by the target",
                f"{made['conversations']:,} conversations ({made['heldout']:,} held out), "
                f"{made['answer_tokens']:,} tokens",
            )
        )
    states = r.stages.get("capture", {})
    if states:
        agree = states.get("greedy_agreement")
        found.append(
            (
                "hidden states",
                f"{states['tokens']:,} tokens, {states['bytes'] / 1e6:,.0f} MB ({states['format']})"
                + (f", teacher equals the token served in {agree:.2%}" if agree else ""),
            )
        )
    if r.training:
        train = r.recipe.train
        found.append(
            (
                "training",
                f"{train.loss} loss, {train.ttt_steps} training-time-test steps, {train.epochs:g} "
                f"epochs ({r.training['steps']:,} steps, {r.training['tokens']:,} positions), "
                f"learning rate {train.learning_rate:g}",
            )
        )
    seconds = {name: s["seconds"] for name, s in r.stages.items() if "seconds" in s}
    if seconds:
        found.append(("time", ", ".join(f"{name} {s:,.0f} s" for name, s in seconds.items())))
    return found


def setting(bench: dict) -> str:
    """The headline's conditions in words."""
    at_once = bench["concurrency"]
    load = "One request at a time" if at_once == 1 else f"{at_once} requests at once"
    heat = f"temperature {bench['temperature']:g}" if bench["temperature"] else "greedy"
    tokens = bench["max_new_tokens"]
    return (
        f"{load}, {heat}, k = {bench['num_speculative_tokens']}, answers of {tokens} tokens at most"
    )


def sampled_words(verify: dict) -> list[str]:
    """In words what the test of sampled distributions found, if it was run."""
    sampled = verify.get("sampled")
    return [sampled["words"]] if sampled else []


def machine_facts(machine: dict) -> list[tuple[str, str]]:
    """The machine's description as names and words."""
    gpus = ", ".join(f"{g['name']} ({g['memory_bytes'] / 2**30:.0f} GiB)" for g in machine["gpus"])
    found = [
        ("processor", f"{machine['cpu']}, {machine['cores']} cores"),
        ("memory", f"{machine['memory_bytes'] / 2**30:.0f} GiB"),
        ("GPUs", gpus or "none"),
        ("system", machine["system"]),
    ]
    if machine["driver"]:
        found.append(("driver", machine["driver"]))
    return found + [(name, version) for name, version in machine["versions"].items()]


def render(r: Results, template: str) -> str:
    """Render ``report.html.j2`` or ``report.md.j2``."""
    expected, served = (
        r.bench["predicted_acceptance_by_position"],
        r.bench["acceptance_by_position"],
    )
    gap = 100 * abs(expected[0] - served[0]) if expected and served else None
    made: list[dict | None] = [_acceptance(r), _speeds(r), _step_time(r), _cost_model(r)]
    made += [_coverage(r), *_training(r)]
    plan = engine_plan(r.recipe, head=r.run.head, num_speculative_tokens=r.recommended_k)
    values: dict[str, Any] = {
        "r": r,
        "bench": r.bench,
        "verify": r.verify,
        "verdict": verdict_words(r),
        "tone": tone(r.bench),
        "setting": setting(r.bench),
        "lossless": lossless_words(r.verify),
        "sampled": sampled_words(r.verify),
        "gap": gap,
        "figures": [figure for figure in made if figure],
        "speed": speed_rows(r.bench),
        "facts": facts(r),
        "machine": machine_facts(r.bench["machine"]),
        "serve": plan.shell(),
    }
    return environment().get_template(template).render(values)


def report(recipe: Recipe, run: RunDir, *, console: Console) -> dict:
    """Write ``report.html`` and ``report.md``, and print the run's table.

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
    console.print(results_table(results))
    return {"report": str(run.report_html), "markdown": str(markdown)}
