"""The table that a run ends with."""

from rich.table import Table

from drafthead.report.results import Results
from drafthead.report.words import beyond_reason, predicted_cells, served_cells


def verdict_words(results: Results) -> str:
    """In words what the interval of the headline allows to say."""
    bench = results.bench
    if bench["verdict"] == "faster":
        more = ", by more than its tokens a step can give"
        return "faster with the head" + (more if beyond_reason(bench) else "")
    if bench["verdict"] == "slower":
        return "slower with the head on this machine"
    return "no difference could be told: the interval spans 1"


def lossless_words(verify: dict) -> str:
    """In words what verify found."""
    words = f"{verify['identical']} of {verify['prompts']} answers identical, token for token"
    if verify["differences"]:
        words += f"; {verify['differences']} differ: NOT LOSSLESS"
    if verify["ties"]:
        words += f"; {verify['ties']} part at a tie within numeric noise"
        # Measured once for each set of prompts, whatever k.
        noises = {r["workload"]: r["noise"] for r in verify["runs"] if r["noise"]}.values()
        parted = sum(max(n["parted"]) for n in noises)
        answers = sum(n["answers"] for n in noises)
        words += f" (of the target alone {parted} of {answers}, asked again)"
    if not verify["differences"] and not all(r["lossless"] for r in verify["runs"]):
        words += ", more or more widely than the target's own: NOT LOSSLESS"
    return words


def results_table(results: Results) -> Table:
    """Target alone and with the head: speed, ratio with interval, acceptance, losslessness."""
    bench, run = results.bench, results.run
    title = f"{results.target_name}: {results.kind_name} head, {results.k} drafts a step"
    machine = (bench or results.verify)["machine"]["summary"]
    table = Table(title=title, caption=f"{'measured' if bench else 'proved'} on {machine}")
    table.add_column("")
    table.add_column("predicted", justify="right")
    table.add_column("served", justify="right")
    if bench:
        _add_speed(table, results)
    else:
        table.add_row("speed", "", "not measured", end_section=True)
    table.add_row("lossless", "", lossless_words(results.verify))
    table.add_row("head", "", str(run.head))
    table.add_row("report", "", str(run.report_html))
    return table


def kinds_beside(kinds: dict) -> Table:
    """Each kind of head at each load, and which to serve there; ``kinds`` as ``kinds_table``."""
    table = Table(title="which head to serve, by load")
    for name in ("load", *kinds["names"], "serve"):
        table.add_column(name)
    for row in kinds["rows"]:
        cells = [
            f"{c['speedup']:.2f}× at k = {c['num_speculative_tokens']}" if c else "–"
            for c in row["cells"]
        ]
        table.add_row(row["name"], *cells, row["serve"])
    return table


def _add_speed(table: Table, results: Results) -> None:
    bench = results.bench
    table.add_row("target alone, tokens/s", "", f"{bench['base_tokens_per_s']:.1f}")
    table.add_row("with the head, tokens/s", "", f"{bench['drafted_tokens_per_s']:.1f}")
    low, high = bench["speedup_ci95"]
    ratio = f"{bench['speedup']:.2f}× [{low:.2f}, {high:.2f}]"
    table.add_row("ratio, 95 % interval", "", ratio)
    table.add_row("", "", verdict_words(results), end_section=True)
    *rates, length = zip(predicted_cells(bench), served_cells(bench), strict=True)
    for i, (predicted, served) in enumerate(rates, 1):
        table.add_row(f"accepted at position {i}", predicted, served)
    table.add_row("mean accepted length", *length, end_section=True)
