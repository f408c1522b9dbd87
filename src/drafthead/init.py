"""A short recipe with a reason for each key, fitted to a target, its prompts and this machine."""

import re
import textwrap
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from drafthead.data.chats import load_chats
from drafthead.data.estimate import Estimate, estimate
from drafthead.data.template import recipe_template
from drafthead.errors import DraftheadError
from drafthead.fsio import write_bytes
from drafthead.machine import Machine, this_machine
from drafthead.recipe import PromptsSection, Recipe, TrainSection, parse_recipe
from drafthead.targets import Target, load_target

# Share of the vocabulary that a head drafts from: 32,000 of 128,000 covered 99.8 % of tokens.
_DRAFT_SHARE = 4
# Of few prompts at most a fifth is held out; the rest is little enough to train on.
_HELDOUT_SHARE = 5
# A head takes hundreds of steps to learn; the longest row that leaves this many is the fastest.
_ENOUGH_STEPS = 400
_ROWS = (512, 1024, 2048, 4096, 8192)
_CPU_ANSWER, _GPU_ANSWER = 128, 512
_USUAL_LEN = 8192


def _run_name(path_or_id: str) -> str:
    """The target's name, without characters that a run's name may not have."""
    name = Path(path_or_id).name or Path(path_or_id).resolve().name  # "." has a name there
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "run"


def _longest_row(machine: Machine) -> int:
    """Tokens of the longest row that this machine's memory holds and that is fast on it."""
    memory = min((gpu.memory_bytes >> 30 for gpu in machine.gpus), default=0)  # GiB
    return 8192 if memory >= 40 else 4096 if memory >= 20 else 2048


def better_kind(tokens: int | None) -> tuple[str, str]:
    """The kind of head that measurements say is better, and the reason.

    The one place that a later measurement changes: docs/dspark.md and the records of
    benchmarks/quality.py say where the two kinds cross, if they do.

    Args:
        tokens: that the prompts come to with their answers; None if they are not there yet.
    """
    amount = "" if tokens is None else f" These prompts come to about {tokens:,}."
    return "eagle3", (
        "eagle3 was better with up to 550,000 tokens of data, level with dspark at 2 million "
        f"(docs/dspark.md).{amount} [eagle3, dspark] makes both of one capture and serves the "
        "faster."
    )


def fit_recipe(
    target: Target, sources: list[dict], prompts: Estimate | None, machine: Machine
) -> dict[str, dict[str, tuple[Any, str]]]:
    """The values that follow from target, prompts and machine.

    Args:
        target: the target.
        sources: of the prompts.
        prompts: what they come to; None if they are not there yet.
        machine: where the run will be.

    Returns:
        By section and key: the value and the reason for it.
    """
    heldout = PromptsSection.model_fields["heldout"].default
    held_words = f"{heldout} tell acceptance to a point; of few prompts a fifth is enough"
    row, reach = _longest_row(machine), target.max_position_embeddings
    row_words = "The longest that is fast on this machine"
    max_len = min(reach, _USUAL_LEN)
    if prompts is not None:
        held_words = f"of {prompts.conversations:,} a fifth, at most {heldout}"
        heldout = max(1, min(heldout, prompts.conversations // _HELDOUT_SHARE))
        share = 1 - heldout / prompts.conversations
        tokens = int(TrainSection().epochs * share * prompts.expected)
        rows = [size for size in _ROWS if size <= row and tokens >= _ENOUGH_STEPS * size]
        row = max(rows, default=_ROWS[0])
        row_words = f"These come to about {tokens // row:,} steps"
        max_len = min(reach, max(max_len, prompts.longest))
    answer = _GPU_ANSWER if machine.gpus else _CPU_ANSWER
    vocab = min(32000, max(target.vocab_size // _DRAFT_SHARE, min(target.vocab_size, 4096)))
    return {
        "prompts": {
            "sources": (
                sources,
                "What your users ask; answers in it are not used. A relative path starts at the "
                "folder that drafthead runs in.",
            ),
            "heldout": (
                heldout,
                f"Conversations kept out of training, to measure on: {held_words}.",
            ),
        },
        "generate": {
            "max_new_tokens": (
                answer,
                "Longest answer in tokens, about your users' usual one. More costs time and disk"
                + ("." if machine.gpus else ": short, for want of a GPU."),
            )
        },
        "vocab": {
            "size": (
                vocab,
                f"Tokens that the head may draft, of {target.vocab_size:,}. Fewer draft faster and "
                "miss more.",
            )
        },
        "head": {"kind": better_kind(None if prompts is None else prompts.expected)},
        "train": {
            "row_tokens": (
                row,
                f"Tokens of a training step. {row_words}; heads take hundreds to learn, and "
                "shorter rows give more.",
            )
        },
        "engine": {
            "max_model_len": (
                max_len,
                "Longest sequence, prompt and answer, in this run and when the head is served. The "
                f"target reaches {reach:,}.",
            )
        },
    }


def _comment(text: str, indent: str) -> str:
    wrapper = textwrap.TextWrapper(width=96, initial_indent=f"{indent}# ", break_on_hyphens=False)
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


def render(recipe: Recipe, reasons: dict[str, str], every_key: bool) -> str:
    """The recipe as YAML, each key with its reason above it.

    Args:
        recipe: the recipe.
        reasons: by ``section.key``, of the keys to write.
        every_key: write the others too, with what the reference says of them.
    """
    lines = []
    for name, field in Recipe.model_fields.items():
        section = getattr(recipe, name)
        if not isinstance(section, BaseModel):
            if every_key or field.is_required():
                lines += [_comment(field.description or "", ""), f"{name}: {_scalar(section)}", ""]
            continue
        keys = type(section).model_fields.items()
        written = [item for item in keys if every_key or f"{name}.{item[0]}" in reasons]
        if not written:
            continue
        if every_key:
            lines.append(_comment(type(section).__doc__ or "", ""))
        lines.append(f"{name}:")
        for key, inner in written:
            words = reasons.get(f"{name}.{key}") or inner.description or ""
            lines += [_comment(words, "  "), f"  {key}: {_scalar(getattr(section, key))}"]
        lines.append("")
    return "\n".join(lines)


def write_recipe(
    path_or_id: str,
    prompts: str,
    out: Path,
    *,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    every_key: bool = False,
) -> dict[str, Any]:
    """Look at a target, its prompts and this machine, and write a recipe for them.

    Args:
        path_or_id: target folder or hub id.
        prompts: the user's file of prompts, which need not be there yet.
        out: the recipe to write; an existing one is never replaced.
        chat_template: Jinja file, for a target that has none or is served with another one.
        trust_remote_code: run Python code that comes with the target, now and in the run.
        every_key: write every key, not only those that matter.

    Returns:
        What was found out about the target and the prompts, JSON-able.

    Raises:
        DraftheadError: target, chat template or prompts cannot be used, or ``out`` exists.
    """
    if out.exists():
        raise DraftheadError(f"{out}: exists already; choose another name with --out")
    target = load_target(path_or_id, trust_remote_code=trust_remote_code)
    if chat_template is None and target.chat_template is None:
        raise DraftheadError(
            f"{target.path}: no chat template (base models have none), so prompts cannot be "
            "rendered; pass --chat-template FILE, or put the model's chat_template.jinja there"
        )
    sources = [{"path": prompts}]
    data: dict[str, Any] = {
        "name": _run_name(path_or_id),
        "target": {"path": path_or_id},
        "prompts": {"sources": sources, "heldout": 1},
    }
    reasons = {"target.path": "The model exactly as you serve it, quantized if you serve it so."}
    for key, value in (("chat_template", chat_template), ("trust_remote_code", trust_remote_code)):
        if value:
            data["target"][key] = value
            reasons[f"target.{key}"] = ""  # the reference's words will do
    machine = this_machine()
    tokens, left_out = None, []
    template = recipe_template(parse_recipe(data, str(out)), target)
    if Path(prompts).exists():
        chats = load_chats(PromptsSection.model_validate(data["prompts"]), template)
        left_out = [note for source in chats.sources for note in source.notes()]
        answer = _GPU_ANSWER if machine.gpus else _CPU_ANSWER
        tokens = estimate(chats, template, answer, target.max_position_embeddings)
    fitted = fit_recipe(target, sources, tokens, machine)
    for section, keys in fitted.items():
        data[section] = {key: value for key, (value, _) in keys.items()}
        reasons |= {f"{section}.{key}": reason for key, (_, reason) in keys.items()}
    recipe = parse_recipe(data, str(out))
    text = render(recipe, reasons, every_key)
    if not every_key:
        rest = "Every other key has a default: `drafthead init --all` writes them too."
        text = f"{_comment(rest, '')}\n{text}"
    write_bytes(out, text.encode())
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
        "kind": recipe.head.kind,
        "conversations": tokens and tokens.conversations,
        "expected_tokens": tokens and tokens.expected,
        "left_out": left_out,
        "heldout": recipe.prompts.heldout,
        "row_tokens": recipe.train.row_tokens,
    }


def describe(about: dict[str, Any]) -> str:
    """What :func:`write_recipe` found out, for people."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in about["layer_kinds"].items())
    quantized = f", {about['quantization']}" if about["quantization"] else ""
    lines = [
        f"target: {', '.join(about['architectures'])}{quantized}, {about['layers']} layers "
        f"({kinds}), {about['vocab_size']:,} tokens in its vocabulary"
    ]
    if about["conversations"] is not None:
        lines.append(
            f"prompts: {about['conversations']:,} conversations, about "
            f"{about['expected_tokens']:,} tokens with answers"
        )
    return "\n".join([*lines, *about["left_out"]])
