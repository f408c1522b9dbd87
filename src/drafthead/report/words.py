"""Results in words and rows: what report and card both say."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jinja2

from drafthead.drafters import DRAFTERS
from drafthead.prove.choice import by_load, lead, made_beside
from drafthead.prove.paired_timing import LOAD
from drafthead.prove.served import drafts_by_load, method_of, proved_ks
from drafthead.recipe import without_paths
from drafthead.report.results import Results
from drafthead.rundir import RunDir

_TONES = {"faster": "good", "slower": "bad"}


def counted(count: int, thing: str) -> str:
    """``1 layer``, ``3 layers``."""
    return f"{count} {thing}" + "s" * (count != 1)


def tone(cell: dict) -> str:
    """Class of a ratio: ``good``, ``bad`` or ``unsure``."""
    return _TONES.get(cell["verdict"], "unsure")


@cache
def environment() -> jinja2.Environment:
    """Templates of this package; a name that is not given is an error, never an empty place."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(
        loader=loader,
        autoescape=jinja2.select_autoescape(["html.j2", "html"]),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )


def load_words(cell: dict, cells: Sequence[dict]) -> str:
    """The load of one of a grid's points: requests at once, length of the answers if it is not
    that of all, temperature if sampled, GPUs if several."""
    parts = [f"{cell['concurrency']} at once"]
    if len({other["max_new_tokens"] for other in cells}) > 1:
        parts.append(f"answers of {cell['max_new_tokens']}")
    if cell["temperature"]:
        parts.append(f"T={cell['temperature']:g}")
    if cell["tensor_parallel_size"] > 1:
        parts.append(f"{cell['tensor_parallel_size']} GPUs")
    if len({method_of(other) for other in cells}) > 1:
        parts.append(f"{method_of(cell)} drafts")
    return ", ".join(parts)


def speed_row(name: str, cell: dict) -> dict:
    """A point of the grid, or a part of one, as a row of the speed table."""
    latency = cell["latency"]["drafted"]

    def milliseconds(what: str) -> str:
        percentiles = latency[what]
        return (
            f"{1000 * percentiles['p50']:.1f} / {1000 * percentiles['p99']:.1f} ms"
            if percentiles
            else "–"
        )

    user = latency["tokens_per_s_of_a_user"]
    return {
        **cell,
        "name": name,
        "tone": tone(cell),
        "first": milliseconds("first_token_s"),
        "between": milliseconds("between_outputs_s"),
        "user": f"{user['p50']:.1f}" if user else "–",
    }


def speed_rows(bench: dict) -> list[dict]:
    """Rows of the speed table: each point of the grid, then the sources of the headline."""
    cells, order = bench["grid"], (*LOAD, "num_speculative_tokens")

    def name(cell: dict) -> str:
        return f"k={cell['num_speculative_tokens']}, {load_words(cell, cells)}"

    in_order = sorted(cells, key=lambda cell: [cell[field] for field in order])
    rows = [speed_row(name(cell), cell) for cell in in_order]
    by_source = cells[0]["by_source"]
    if len(by_source) > 1:
        first = name(cells[0])
        rows += [speed_row(f"{source}: {first}", cell) for source, cell in by_source.items()]
    return rows


def beside_rows(bench: dict) -> list[dict]:
    """The run's own head and every other drafter that was measured beside it, at the headline's
    point where they have it; empty without others."""
    others = bench.get("beside", {})
    if not others:
        return []
    at = (*LOAD, "num_speculative_tokens")
    headline = [bench["grid"][0][name] for name in at]

    def same_point(cells: list[dict]) -> dict:
        return next((c for c in cells if [c[name] for name in at] == headline), cells[0])

    rows = [speed_row("this head", bench["grid"][0])]
    return rows + [speed_row(name, same_point(other["grid"])) for name, other in others.items()]


def predicted_cells(bench: dict) -> list[str]:
    """Predicted acceptance at each position drafted, then the tokens a step; what was predicted
    for fewer drafts than were served has no length to compare."""
    rates, k = bench["predicted_acceptance_by_position"] or [], bench["num_speculative_tokens"]
    length = bench["predicted_accepted_length"] if len(rates) == k else None
    return _acceptance_cells(rates, length, k)


def served_cells(bench: dict) -> list[str]:
    """Served acceptance at each position drafted, then the tokens a step; none of answers of one
    token."""
    rates, k = bench["acceptance_by_position"], bench["num_speculative_tokens"]
    return _acceptance_cells(rates, bench["accepted_length"], k)


def _acceptance_cells(rates: Sequence[float], length: float | None, k: int) -> list[str]:
    cells = [f"{100 * rate:.1f} %" for rate in rates]
    return cells + ["–"] * (k - len(rates)) + [f"{length:.2f}" if length else "–"]


def grid_table(bench: dict) -> dict | None:
    """The ratios of the grid: a row a load, a column a k; None if there is one of them only.

    Returns:
        ``ks``, and ``rows`` with ``name`` and for each k its cell (or None), the one that was
        fastest over the pairs that all share marked ``best`` if it is faster for certain.
    """
    ks = sorted({cell["num_speculative_tokens"] for cell in bench["grid"]})
    loads: dict[tuple, dict[int, dict]] = {}
    of_one_method = [cell | {"draft_sample_method": "greedy"} for cell in bench["grid"]]
    for cell in bench["grid"]:
        at = tuple(cell[name] for name in LOAD)
        # Of two ways to draw drafts the headline's comes first.
        loads.setdefault(at, {}).setdefault(cell["num_speculative_tokens"], cell)
    if len(ks) * len(loads) < 2:
        return None
    rows = []
    for _, by_k in sorted(loads.items()):
        best = max(by_k.values(), key=lambda cell: cell["compared_speedup"])
        faster = tone(best) == "good"
        cells = [
            by_k[k] | {"tone": tone(by_k[k]), "best": faster and by_k[k] is best}
            if k in by_k
            else None
            for k in ks
        ]
        rows.append({"name": load_words(best, of_one_method), "cells": cells})
    return {"ks": ks, "rows": rows}


def kinds_table(run: RunDir) -> dict | None:
    """Each kind of head at each load that was measured; None of a run with one kind.

    Returns:
        ``names``, and ``rows`` with ``name``, for each kind its fastest cell (or None), and
        ``serve``, which to serve there.
    """
    runs = made_beside(run)
    loads = by_load(runs)
    if len(runs) < 2 or not loads:
        return None
    rows = []
    every = [cell for best in loads for cell in best.values()]
    for best in loads:
        kinds = list(best)
        serve = DRAFTERS[kinds[0]].name
        if len(kinds) > 1:
            ratio, low, high = lead(best[kinds[0]], best[kinds[1]])
            serve += f", {ratio:.2f}× as fast ({low:.2f} – {high:.2f}"
            serve += "; spans 1, no difference shown)" if low <= 1 else ")"
        cells = [best[kind] | {"tone": tone(best[kind])} if kind in best else None for kind in runs]
        rows.append({"name": load_words(best[kinds[0]], every), "cells": cells, "serve": serve})
    return {"names": [DRAFTERS[kind].name for kind in runs], "rows": rows}


def facts(r: Results) -> list[tuple[str, str]]:
    """How target and head look and what the head was made from."""
    config = r.head_config
    layers = config.get("eagle_aux_hidden_state_layer_ids")
    rows = [
        ("target", without_paths(r.recipe.target.path)),
        (
            "head",
            f"{counted(config['num_hidden_layers'], 'layer')}, hidden {config['hidden_size']}, MLP "
            f"{config['intermediate_size']}, {config['draft_vocab_size']:,} of "
            f"{config['vocab_size']:,} tokens, reads layers {layers}",
        ),
    ]
    made = r.stages.get("generate", {})
    if made:
        rows.append(
            (
                "answers by the target",
                f"{made['conversations']:,} conversations ({made['heldout']:,} held out), "
                f"{made['answer_tokens']:,} tokens",
            )
        )
    states = r.stages.get("capture", {})
    if states:
        agree = states.get("greedy_agreement")
        rows.append(
            (
                "hidden states",
                f"{states['tokens']:,} tokens, "
                + (f"{states['bytes'] / 1e6:,.0f} MB" if states["bytes"] else "never on disk")
                + f" ({states['format']})"
                + (f", teacher equals the token served in {agree:.2%}" if agree else ""),
            )
        )
    if r.training:
        train, waiting = r.recipe.train, r.training.get("waiting")
        rows.append(
            (
                "training",
                f"{train.loss} loss, {DRAFTERS[r.kind].training_words(r.recipe)}, "
                f"{train.epochs:g} epochs ({r.training['steps']:,} steps, "
                f"{r.training['tokens']:,} positions), learning rate {train.peak_learning_rate:g}"
                + (f", {waiting:.1%} of the time waiting for data" if waiting is not None else ""),
            )
        )
    seconds = {name: s["seconds"] for name, s in r.stages.items() if "seconds" in s}
    if seconds:
        rows.append(("time", ", ".join(f"{name} {s:,.0f} s" for name, s in seconds.items())))
    return rows


def sampling_words(bench: dict) -> list[str]:
    """What the two ways to draw drafts are expected to give at each temperature, and what choosing
    one loses where the other is better; empty without a prediction."""
    by_heat: dict[float, dict[str, float]] = {}
    for one in bench.get("predicted_sampling", []):
        lengths = by_heat.setdefault(one["temperature"], {})
        lengths[one["draft_sample_method"]] = one["accepted_length"]
    if not by_heat:
        return []
    served, k = method_of(bench), bench["num_speculative_tokens"]
    told = "; ".join(
        f"at temperature {heat:g} "
        + ", ".join(f"{length:.2f} with {method} drafts" for method, length in lengths.items())
        for heat, lengths in by_heat.items()
    )
    lost = {
        heat: 1 - lengths[served] / max(lengths.values())
        for heat, lengths in by_heat.items()
        if lengths[served] < 0.99 * max(lengths.values())
    }
    words = f"Tokens a step expected of sampled requests from held-out states, k = {k}: {told}."
    chosen = f" Served with {served} drafts"
    if lost:
        chosen += ": " + ", ".join(f"{x:.0%} fewer at {heat:g}" for heat, x in lost.items())
    sentences = [words + chosen + "."]
    stretches = bench["predicted_sampling"][0]["by_answer_position"]
    if len(stretches) > 1:
        told = ", ".join(f"{s['accepted_length']:.2f} from {s['begin']}" for s in stretches)
        sentences.append(
            f"By the position in an answer, at temperature {min(by_heat):g}: {told} tokens on."
        )
    return sentences


def setting(bench: dict) -> str:
    """The headline's conditions in words."""
    at_once = bench["concurrency"]
    requests = (
        "One request at a time"
        if at_once == 1
        else f"{at_once} requests at once, each that ends replaced by the next"
    )
    sampling = f"temperature {bench['temperature']:g}" if bench["temperature"] else "greedy"
    tokens = bench["max_new_tokens"]
    k = bench["num_speculative_tokens"]
    return f"{requests}, {sampling}, k = {k}, answers of {tokens} tokens at most"


NOT_MEASURED = "Speed was not measured."


def beyond_reason(bench: dict) -> bool:
    """Whether the ratio is more than the tokens a step can give: a step with drafts takes as long
    as one without, or longer. A tenth more may be the noise of a few pairs."""
    length = bench["accepted_length"]
    return bool(length) and bench["speedup"] > 1.1 * length


def notes(r: Results) -> list[str]:
    """What the choice of k rests on, and how the figures were taken where that matters."""
    sentences = sampling_words(r.bench) if r.bench else [NOT_MEASURED]
    if r.recommended:
        ks = sorted({cell["num_speculative_tokens"] for cell in r.bench["grid"]})
        first = r.bench["grid"][0]
        chosen = first["speedup"] != first["compared_speedup"]
        sentences.append(
            f"k = {r.served_k} is the fastest of k = {', '.join(map(str, ks))}, over the pairs "
            "that all of them were timed on"
            + ("; its own figures are of other pairs." if chosen else ".")
        )
    if r.bench and beyond_reason(r.bench):
        sentences.append(
            f"{r.bench['speedup']:.2f}× is more than {r.bench['accepted_length']:.2f} tokens a "
            "step can give: something else ran on this machine. Measure again when it is idle."
        )
    if beyond := r.bench.get("accepted_past_end"):
        length = r.bench["accepted_length"]
        without = (
            f" Without them it is {length - beyond / r.bench['drafts']:.2f} tokens a step."
            if length
            else ""
        )
        sentences.append(
            f"Acceptance is counted as vLLM does: {beyond:,} drafts with it that stood beyond the "
            f"end of an answer, which nobody got.{without} Tokens a second are of what was got."
        )
    if r.bench and r.bench["grid"][0]["engines_at_once"] == 1:
        sentences.append(
            "Memory held one engine at a time: the target alone and with the head were timed in "
            "turn, each started twice (A B A B). What drifts in the minutes between two engines is "
            "in the ratio, and not in its interval."
        )
    if r.served_k != r.k:
        sentences.append(f"k = {r.served_k}, the one to serve, was not measured at this load.")
    if ranges := r.recipe.serve.drafts_by_load:
        drafts = ", ".join(f"{k} from {start}" for start, k in ranges)
        sentences.append(f"Drafts a step by the number of requests at once: {drafts}.")
    elif r.bench and (best := drafts_by_load(r.bench["grid"], proved_ks(r.proof))):
        sentences.append(
            "The best number of drafts changed with the load, which is neither proved nor served "
            f"so: `serve.drafts_by_load: {best}` would do it."
        )
    if r.proof["lossless"] and str(r.served_k) not in r.proof["served"]:
        proved = ", ".join(sorted(r.proof["served"], key=int))
        sentences.append(f"k = {r.served_k}, the one to serve, was not proved; k = {proved} was.")
    return sentences


def sampled_summary(verify: dict) -> list[str]:
    """The same in a few words, for the headline."""
    sampled = verify.get("sampled")
    if not sampled:
        return []
    if not verify["lossless"]:
        return [sampled["words"].removeprefix("Sampling: ").capitalize()]
    return [
        f"Two-sample test over {sampled['contexts']} contexts of {sampled['samples']} answers: "
        f"p = {sampled['p_value']:.2g}"
        + ("." if sampled.get("detectable_shift") else "; too few to find a difference by.")
    ]


def sampled_words(verify: dict) -> list[str]:
    """In words what the test of sampled distributions found, if it was run."""
    sampled = verify.get("sampled")
    return [sampled["words"]] if sampled else []


def machine_facts(machine: dict) -> list[tuple[str, str]]:
    """The machine's description as names and words."""
    gpus = ", ".join(f"{g['name']} ({g['memory_bytes'] / 2**30:.0f} GiB)" for g in machine["gpus"])
    quota = f", {given:g} of them given" if (given := machine.get("cpu_quota")) else ""
    limited = machine.get("memory_limit_bytes")
    limit = f", {limited / 2**30:.3g} of them given" if limited else ""
    rows = [
        ("processor", f"{machine['cpu']}, {machine['cores']} cores" + quota),
        ("memory", f"{machine['memory_bytes'] / 2**30:.0f} GiB" + limit),
        ("GPUs", gpus or "none"),
        ("system", machine["system"]),
    ]
    if machine["driver"]:
        rows.append(("driver", machine["driver"]))
    return rows + [(name, version) for name, version in machine["versions"].items()]
