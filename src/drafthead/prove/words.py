"""Results in words and rows: what report and card both say."""

from pathlib import Path

import jinja2

from drafthead.prove.results import Results

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
                f"{states['tokens']:,} tokens, "
                + (f"{states['bytes'] / 1e6:,.0f} MB" if states["bytes"] else "never on disk")
                + f" ({states['format']})"
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
