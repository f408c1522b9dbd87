"""Inspect a head of any kind: its configuration, and the faults of a broken one."""

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from drafthead.drafters import DRAFTERS, drafter_of
from drafthead.drafters.engines import ENGINES
from drafthead.drafters.support import commands, support
from drafthead.errors import DraftheadError
from drafthead.head.formats import FLAGS
from drafthead.targets import Target


def inspect_head(
    path: Path | str,
    target: Target | None = None,
    *,
    deep: bool = True,
    length: int | None = None,
) -> dict[str, Any]:
    """Look at a head without running it; see `head.inspect.inspect_head` for what is returned, to
    which `engines` is added: see `support.support`. A folder that is of no known kind is looked at
    as an EAGLE-3 head, which says what is missing. length: the longest sequence of the engine; None
    is the target's own."""
    folder = Path(path)
    try:
        drafter = drafter_of(folder)
    except DraftheadError:
        drafter = DRAFTERS["eagle3"]
    about = drafter.inspect(folder, target, deep)
    about["engines"] = support(about, folder, target)
    if foreign := about["engines"]["vllm"]["foreign"]:
        about["ok"] = False
        about["problems"] += [
            f"{words}; `drafthead convert HEAD OUT` fixes it" for words in foreign
        ]
    if target is not None:
        about["notes"] += beyond_reach(about, length or target.max_position_embeddings)
    return about


def beyond_reach(about: dict[str, Any], length: int) -> list[str]:
    """What happens to sequences longer than a head is made for, if there can be any.

    Args:
        about: what `inspect_head` found.
        length: the longest sequence of the engine (`max_model_len`).
    """
    if "config" not in about:
        return []
    config = about["config"]
    scaling = config.get("rope_scaling") or {}
    stretch = scaling["factor"] if scaling.get("rope_type") == "linear" else 1
    reach = int(config["max_position_embeddings"] * stretch)  # as vLLM derives max_model_len
    if reach >= length:
        return []
    return [
        f"max_position_embeddings: the head ends at {reach} positions, the engine goes to "
        f"{length}. In every step with a longer sequence, vLLM's V1 model runner drafts token 0 "
        "for all sequences, which costs time and gains nothing; its V2 runner drafts from "
        f"positions that the head was not made for. Serve with engine.max_model_len: {reach}, or "
        "train on from the head (train.start_from) with longer conversations"
    ]


def check_fit(folder: Path, target: Target, length: int) -> tuple[list[str], list[str]]:
    """Look at a head before an engine is started with it: no weights, no hashes.

    Args:
        folder: the head.
        target: the model that it is served with.
        length: the longest sequence of the engine (`max_model_len`).

    Returns:
        Why drafthead cannot compute the head, though vLLM may; and what to know before it is
        served.

    Raises:
        DraftheadError: it is broken or of another target.
    """
    about = inspect_head(folder, target, deep=False)
    if about["problems"]:
        named = (p.removeprefix(f"{folder}: ") for p in about["problems"])
        raise DraftheadError("\n".join(f"{folder}: {problem}" for problem in named))
    return about["unsupported"], beyond_reach(about, length)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def other_engines(
    folder: Path, target: Target, k: int, *, target_name: str, head_name: str
) -> dict[str, list[str]]:
    """The commands of the engines besides vLLM that serve the head in `folder` as it is, by title
    and version. target_name, head_name: what the commands call the two."""
    about = inspect_head(folder, target, deep=False)
    return {
        f"{engine.title} {engine.versions}": commands(name, about, target_name, head_name, k)
        for name, engine in ENGINES.items()
        if name != "vllm" and about["engines"][name]["serves"]
    }


def describe(found: dict[str, Any]) -> Group:
    """What `inspect_head` found, for people."""
    table = Table(show_header=False, box=None)
    config, cost = found.get("config"), found.get("cost")
    if config is not None and cost is not None:
        on = [flag for flag in FLAGS if config.get(flag)]
        rows = {
            "format": found["format"],
            "width": f"{config['hidden_size']}, MLP {config['intermediate_size']}, heads "
            f"{config['num_attention_heads']}/{config['num_key_value_heads']} of "
            f"{config['head_dim']}, layers {config['num_hidden_layers']}",
            "reads": f"layers {', '.join(map(str, config['aux_layer_ids']))} of a target of width "
            f"{config['target_hidden_size']}",
            "drafts": f"{config['draft_vocab_size']} of {config['vocab_size']} tokens",
            "a drafted token": f"reads {cost['bytes_per_draft_step'] / 1e6:.1f} MB, "
            f"{cost['lm_head_share']:.0%} of it the LM head",
        }
        if "block_size" in config:
            rows["blocks"] = f"of {config['block_size']}, Markov rank {config['markov_rank']}"
        else:
            rows["norm flags"] = ", ".join(on) or "none"
        if about := found.get("provenance"):
            rows["says of itself"] = ", ".join(
                f"{k} {_short(v)}" for k, v in about.items() if v != ""
            )
        for name, value in rows.items():
            table.add_row(name, escape(str(value)))
    for name, engine in found.get("engines", {}).items():
        if "config" in found:
            can = "; ".join(["yes", *engine["notes"]])
            if not engine["serves"]:
                fix = f" (`drafthead convert --for {name}` fixes it)" if engine["convert"] else ""
                can = f"no{fix}: {'; '.join(engine['why'])}"
            title = f"{ENGINES[name].title} {ENGINES[name].versions}"
            table.add_row(title, escape(can))
    if "bytes" in found:
        table.add_row("weights", f"{found['parameters']:,} in {found['bytes'] / 1e6:.1f} MB")
    lines: list[Table | Text] = [table]
    lines += [Text(f"note: {note}", style="yellow") for note in found["notes"]]
    lines += [Text(f"unsupported: {reason}", style="yellow") for reason in found["unsupported"]]
    lines += [Text(f"broken: {problem}", style="red") for problem in found["problems"]]
    if found["ok"]:
        words = "no fault, but read the notes" if found["notes"] else "nothing wrong found"
        lines.append(Text(words, style="green"))
    return Group(*lines)
