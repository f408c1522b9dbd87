"""The report's figures: each a chart with its title, caption and legend, from a run's results."""

from collections.abc import Sequence

from drafthead.prove.paired_timing import LOAD
from drafthead.report import charts
from drafthead.report.results import Results
from drafthead.report.words import load_words


def _figure(title: str, caption: str, svg: str, legend: Sequence = (), foot: str = "") -> dict:
    return {"title": title, "caption": caption, "svg": svg, "legend": legend, "foot": foot}


def _acceptance(r: Results) -> dict | None:
    served = r.bench["acceptance_by_position"]
    if not served:  # answers of one token
        return None
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


def interval(r: Results) -> str:
    """The headline's ratio with its interval, and a line at 1."""
    row = ("with the head", r.bench["speedup"], *r.bench["speedup_ci95"])
    return charts.intervals("Speed with the head over without", [row])


def _speeds(r: Results) -> dict | None:
    """The headline's load at every k, and its sources: the whole grid is a table."""
    first = r.bench["grid"][0]
    load = {name: first[name] for name in LOAD}
    cells = [c for c in r.bench["grid"] if load.items() <= c.items()]
    cells.sort(key=lambda cell: cell["num_speculative_tokens"])
    named = [(f"k = {c['num_speculative_tokens']}", c) for c in cells]
    if len(first["by_source"]) > 1:
        named += [(f"{s}, k = {r.k}", c) for s, c in first["by_source"].items()]
    rows = [(name, c["speedup"], *c["speedup_ci95"]) for name, c in named]
    if len(rows) < 2:
        return None
    svg = charts.intervals("Speed with the head over speed without", rows)
    caption = (
        f"{load_words(first, r.bench['grid']).capitalize()}: dots are measured ratios, bars "
        "their 95 % intervals. Left of 1 the head costs more than it saves."
    )
    return _figure("Speed with the head over without", caption, svg)


def _step_time(r: Results) -> dict | None:
    """The parts of a step's time at each k, next to a plain step."""
    load = {name: r.bench[name] for name in LOAD} | {"temperature": 0}
    cells = [
        c
        for c in r.bench["grid"]
        if load.items() <= c.items()
        and c["step_s"]["base"]
        and c["step_s"]["drafted"]
        and c["accepted_length"]
    ]
    if not cells:
        return None
    cells.sort(key=lambda cell: cell["num_speculative_tokens"])
    plain = 1000 * cells[0]["step_s"]["base"]
    rows: list[tuple[str, list[tuple[str, str, float]]]] = [
        ("plain step", [("target", "base", plain)])
    ]
    for cell in cells:
        k, step = cell["num_speculative_tokens"], 1000 * cell["step_s"]["drafted"]
        parts = [
            ("target", "base", min(plain, step)),
            ("drafting, checking", "head", max(step - plain, 0.0)),
        ]
        rows.append((f"k = {k}", parts))
    legend = [
        ("base", "as long as a plain step"),
        ("head", "drafting, and checking more tokens"),
    ]
    pays = ", ".join(
        f"{c['accepted_length'] * plain / (1000 * c['step_s']['drafted']):.2f}× at k = "
        f"{c['num_speculative_tokens']}"
        for c in cells
    )
    return _figure(
        "Where a step's time goes",
        f"Milliseconds of one decoding step, {r.bench['concurrency']} at once. A plain "
        "step writes one token.",
        charts.stacks("Milliseconds of a decoding step", rows),
        legend,
        f"Tokens a step over what a step takes: {pays} (decoding alone, prefill left out).",
    )


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


def figures(r: Results) -> list[dict]:
    """All figures that the run has results for, in the order of the page."""
    of_speed = [_acceptance(r), _speeds(r), _step_time(r)] if r.bench else []
    made = [*of_speed, _coverage(r)]
    return [figure for figure in made if figure] + _training(r)
