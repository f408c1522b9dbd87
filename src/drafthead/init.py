"""A commented recipe fit for a target that was looked at."""

import re
import textwrap
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from drafthead.data.chats import read_chats
from drafthead.errors import DraftheadError
from drafthead.fsio import write_bytes
from drafthead.recipe import PromptsSection, Recipe, Source, parse_recipe
from drafthead.targets import Target, load_target

# Share of the vocabulary that a head drafts from: 32,000 of 128,000 covered 99.8 % of tokens.
_DRAFT_SHARE = 4
# Of few prompts at most a fifth is held out; the rest is little enough to train on.
_HELDOUT_SHARE = 5


def _run_name(path_or_id: str) -> str:
    """The target's own name, without what a run's name may not have."""
    name = Path(path_or_id).name or Path(path_or_id).resolve().name  # "." has a name there
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "run"


def fit_recipe(target: Target, path_or_id: str, prompts: str, heldout: int) -> dict[str, Any]:
    """The fields whose best value follows from the target; all others keep their defaults."""
    vocab = min(32000, max(target.vocab_size // _DRAFT_SHARE, min(target.vocab_size, 4096)))
    return {
        "name": _run_name(path_or_id),
        "target": {"path": path_or_id, "trust_remote_code": target.trust_remote_code},
        "prompts": {"sources": [{"path": prompts}], "heldout": heldout},
        "capture": {"aux_layers": list(target.default_aux_layers())},
        "vocab": {"size": vocab},
        "engine": {"max_model_len": min(target.max_position_embeddings, 8192)},
    }


def _comment(text: str, indent: str) -> str:
    wrapper = textwrap.TextWrapper(width=96, initial_indent=f"{indent}# ")
    wrapper.subsequent_indent = f"{indent}# "
    return wrapper.fill(" ".join(text.split()))


def _scalar(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, list):
        value = [
            v.model_dump(exclude_defaults=True) if isinstance(v, BaseModel) else v for v in value
        ]
    dumped = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return dumped.removesuffix("...\n").strip()


def render(recipe: Recipe) -> str:
    """The recipe as YAML: every field, each with its meaning and reason above it."""
    lines = []
    for name, field in Recipe.model_fields.items():
        value = getattr(recipe, name)
        if not isinstance(value, BaseModel):
            lines += [_comment(field.description or "", ""), f"{name}: {_scalar(value)}", ""]
            continue
        lines += [_comment(type(value).__doc__ or "", ""), f"{name}:"]
        for key, inner in type(value).model_fields.items():
            lines += [
                _comment(inner.description or "", "  "),
                f"  {key}: {_scalar(getattr(value, key))}",
            ]
        lines.append("")
    return "\n".join(lines)


def write_recipe(
    path_or_id: str, prompts: str, out: Path, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Look at a target and write a recipe for it.

    Args:
        path_or_id: target folder or hub id.
        prompts: the user's file of prompts, which need not be there yet.
        out: the recipe to write; an existing one is never replaced.
        trust_remote_code: run Python code that comes with the target, now and in the run.

    Returns:
        What was found out about the target, JSON-able.

    Raises:
        DraftheadError: target or prompts cannot be read, or ``out`` exists.
    """
    if out.exists():
        raise DraftheadError(f"{out}: exists already; choose another name with --out")
    target = load_target(path_or_id, trust_remote_code=trust_remote_code)
    conversations, heldout = None, PromptsSection.model_fields["heldout"].default
    if Path(prompts).is_file():
        conversations = len(read_chats([Source(path=prompts)])[0])
        heldout = max(1, min(heldout, conversations // _HELDOUT_SHARE))
    recipe = parse_recipe(fit_recipe(target, path_or_id, prompts, heldout), str(out))
    write_bytes(out, render(recipe).encode())
    kinds = {kind: target.layer_types.count(kind) for kind in sorted(set(target.layer_types))}
    return {
        "recipe": str(out),
        "architectures": list(target.architectures),
        "layers": target.num_layers,
        "layer_kinds": kinds,
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "quantization": (target.quantization or {}).get("quant_method"),
        "aux_layers": list(target.default_aux_layers()),
        "draft_vocab_size": recipe.vocab.size,
        "chat_template": target.chat_template is not None,
        "conversations": conversations,
        "heldout": heldout,
    }
