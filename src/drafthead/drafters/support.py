"""What the table of engines says of one head, on the command line, and in the documentation."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drafthead.drafters.engines import ENGINES, KINDS, LIMITS, Head
from drafthead.errors import DraftheadError
from drafthead.fsio import read_json
from drafthead.head.formats import Format
from drafthead.targets import Target
from drafthead.targets.safetensors_folder import SafetensorsFolder

UNHOOKED = "if it has a hook for the target, which --target tells"


def support(about: dict[str, Any], folder: Path, target: Target | None) -> dict[str, Any]:
    """Which engines serve a head, as far as its files and the target (if given) tell.

    Args:
        about: what the drafter's `inspect` found.
        folder: the head.
        target: the model that it is to be served with.

    Returns:
        By engine: `serves` (None: not known), `why` (what keeps it from it), `convert` (whether
        `drafthead convert` corrects all of that), `foreign` (what of it that corrects), `notes`.
    """
    kind, config = about.get("kind", "eagle3"), about.get("config")
    readable = config is not None and not about["unsupported"]
    raw: Any = read_json(folder / "config.json", "a head's configuration") if readable else {}
    try:
        names = frozenset(SafetensorsFolder(folder).where)
    except DraftheadError:  # told among the problems
        names = frozenset()
    head = Head(kind, config or {}, raw, names, bool(about.get("own_embedding")), target)
    found = {}
    for name, engine in ENGINES.items():
        limits = [x for x in LIMITS if x.engine == name and kind in x.kinds and readable]
        limits = [limit for limit in limits if limit.applies(head)]
        # What is broken is broken for all; what drafthead cannot compute, vLLM may serve.
        why = about["problems"] + about["unsupported"]
        found[name] = {
            "serves": not (why or limits) if readable or about["problems"] else None,
            "why": why + [limit.words for limit in limits],
            "convert": not why and bool(limits) and all(limit.layout for limit in limits),
            "foreign": [limit.words for limit in limits if limit.layout],
            "notes": [*engine.notes, *([UNHOOKED] if engine.hooks and target is None else [])],
        }
    return found


def check_engines(names: Sequence[str]) -> Sequence[str]:
    """The names of engines, if there are such.

    Raises:
        DraftheadError: one is not known.
    """
    if unknown := [name for name in names if name not in ENGINES]:
        raise DraftheadError(
            f"no engine {', '.join(unknown)} is known; these are: {', '.join(ENGINES)}", field="for"
        )
    return names


def layout(engine: str, about: dict[str, Any]) -> Format:
    """The format that an engine reads a head in: vLLM's own, as drafthead writes it, wherever that
    will do."""
    eagle3 = about.get("kind", "eagle3") == "eagle3"
    return "speculators" if engine == "mlx" and eagle3 else "vllm"


def commands(engine: str, about: dict[str, Any], target: str, head: str, k: int) -> list[str]:
    """The shell commands that serve a head in another engine than vLLM.

    Args:
        engine: a name of `ENGINES`.
        about: what `inspect_head` found.
        target: folder or hub id.
        head: folder or hub id.
        k: drafts a step.
    """
    dspark = about.get("kind") == "dspark"
    target, head = shlex.quote(target), shlex.quote(head)
    if engine == "sglang":
        command = f"python -m sglang.launch_server --model-path {target} "
        draft = f"--speculative-draft-model-path {head} "
        if dspark:
            blocks = f"--speculative-dspark-block-size {k}"
            return [f"{command}--speculative-algorithm DSPARK {draft}{blocks}"]
        window = about["config"].get("sliding_window")
        return [
            f"{command}--speculative-algorithm EAGLE3 {draft}--speculative-num-steps {k} "
            f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {k + 1}"
            + (f" --speculative-draft-window-size {window}" if window else "")
        ]
    if engine == "llama.cpp":
        kind = "draft-dspark" if dspark else "draft-eagle3"
        return [
            f"python convert_hf_to_gguf.py {target} --outfile target.gguf",
            f"python convert_hf_to_gguf.py {head} --target-model-dir {target} --outfile head.gguf",
            f"llama-server -m target.gguf -md head.gguf --spec-type {kind} --spec-draft-n-max {k}",
        ]
    if engine == "mlx":
        kind = "dflash" if dspark else "eagle3"
        return [
            f"python -m mlx_vlm.server --model {target} --draft-model {head} --draft-kind {kind} "
            f"--draft-block-size {k + 1}"
        ]
    if engine == "tensorrt-llm":
        layers = [i - 1 for i in about["config"]["aux_layer_ids"]]
        options = (
            f"{{decoding_type: Eagle3, max_draft_len: {k}, speculative_model: {head}, "
            f"eagle3_layers_to_capture: {layers}}}"
        )
        return [
            f"echo 'speculative_config: {options}' > speculative.yaml",
            f"trtllm-serve {target} --extra_llm_api_options speculative.yaml",
        ]
    raise ValueError(f"no command for {engine}")


def tables() -> str:
    """The tables of docs/engines.md."""
    lines = ["| engine | version | known from |", "|---|---|---|"]
    lines += [f"| {e.title} | {e.versions} | {e.source} |" for e in ENGINES.values()]
    for kind, title in KINDS.items():
        lines += [
            "",
            f"### {title}",
            "",
            "| engine | does not serve | what happens | fix | source |",
        ]
        lines.append("|---|---|---|---|---|")
        for limit in LIMITS:
            if kind in limit.kinds:
                happens = "drafts wrong tokens" if limit.silent else "refuses it"
                fix = f"`drafthead convert --for {limit.engine}`" if limit.layout else ""
                fix = fix or (f"`{limit.fix}`" if limit.fix else "none")
                title = ENGINES[limit.engine].title
                lines.append(f"| {title} | {limit.says} | {happens} | {fix} | {limit.source} |")
    return "\n".join(lines) + "\n"
