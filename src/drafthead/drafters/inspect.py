"""What a head is, whatever its kind, and what is wrong with a broken one."""

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from drafthead.drafters import DRAFTERS, drafter_of
from drafthead.errors import DraftheadError
from drafthead.head.formats import FLAGS
from drafthead.targets import Target


def inspect_head(
    path: Path | str, target: Target | None = None, *, deep: bool = True
) -> dict[str, Any]:
    """Look at a head without running it; see `head.inspect.inspect_head` for what is returned. A
    folder that is of no known kind is looked at as an EAGLE-3 head, which says what is missing."""
    folder = Path(path)
    try:
        drafter = drafter_of(folder)
    except DraftheadError:
        drafter = DRAFTERS["eagle3"]
    return drafter.inspect(folder, target, deep)


def refuse_unfit(folder: Path, target: Target) -> None:
    """Look at a head before an engine is started with it.

    Raises:
        DraftheadError: it is broken or of another target. Heads of a kind that drafthead cannot
            compute itself, but vLLM may, pass if their files are whole.
    """
    found = inspect_head(folder, target, deep=False)
    understood, whole = "format" in found, "tensors" in found
    if found["problems"] and (understood or not whole):
        raise DraftheadError("\n".join(f"{folder}: {problem}" for problem in found["problems"]))


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
            rows["says of itself"] = ", ".join(f"{k} {v}" for k, v in about.items() if v != "")
        for name, value in rows.items():
            table.add_row(name, escape(str(value)))
    if "bytes" in found:
        table.add_row("weights", f"{found['parameters']:,} in {found['bytes'] / 1e6:.1f} MB")
    lines: list[Table | Text] = [table]
    lines += [Text(f"note: {note}", style="yellow") for note in found["notes"]]
    lines += [Text(f"broken: {problem}", style="red") for problem in found["problems"]]
    if found["ok"]:
        lines.append(Text("nothing wrong found", style="green"))
    return Group(*lines)
