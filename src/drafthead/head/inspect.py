"""Inspect an EAGLE-3 head, and find the faults of a broken one."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from drafthead.errors import DraftheadError, UnsupportedHead
from drafthead.head.checkpoint import (
    EMBEDDING,
    LM_HEAD,
    HeadFiles,
    expected_shapes,
    read_folder,
    some,
)
from drafthead.head.config import HeadConfig, estimate_cost
from drafthead.head.formats import ReadConfig
from drafthead.head.model import ABSOLUTE
from drafthead.targets import Target

SIZES = {"BF16": 2, "F16": 2, "F32": 4}


def inspect_head(
    path: Path | str, target: Target | None = None, *, deep: bool = True
) -> dict[str, Any]:
    """Look at a head without running it; broken files give `problems`, never an exception.

    Returns a JSON-able dict: `ok` (neither of the next two), `problems` (it cannot be served, or
    would draft nonsense), `unsupported` (vLLM may serve it, drafthead cannot compute it), `notes`
    (assumptions and suspicions), and as much as could be read of `format`, `config`, `parameters`,
    `bytes`, `own_embedding`, `cost` (see `DraftCost`), `provenance`. With `target` it is also
    compared with the model that it is meant for. Without `deep` only configurations, file headers
    and the draft vocabulary are read: no weights, no hashes of the target's files.
    """
    folder = Path(path)
    problems: list[str] = []
    unsupported: list[str] = []
    notes: list[str] = []
    result: dict[str, Any] = {
        "path": str(folder),
        "problems": problems,
        "unsupported": unsupported,
        "notes": notes,
    }
    files: HeadFiles | None = None
    read: ReadConfig | None = None
    try:
        files = HeadFiles(folder)
    except DraftheadError as error:
        problems.append(str(error))
    if folder.is_dir():
        try:
            read = read_folder(folder, target)
        except UnsupportedHead as error:
            unsupported.append(str(error))
        except DraftheadError as error:
            problems.append(str(error))
    if files is not None:
        result |= _weights(files)
        problems += files.refusals()
        if "fc.weight" not in files.shapes and read is None:
            problems.append("no fc.weight among the tensors: this is no EAGLE-3 head")
    if read is not None:
        notes += read.notes
        problems += read.problems
        cost = estimate_cost(read.config, weight_bytes=_weight_bytes(files))
        result |= {
            "format": read.format,
            "config": {**asdict(read.config), "aux_layer_ids": list(read.config.aux_layer_ids)},
            "cost": asdict(cost),
            "provenance": _provenance(read),
        }
    if files is not None and read is not None:
        wrong = files.problems(read.config)
        problems += wrong
        if not wrong:
            problems += _values(files, read.config) if deep else []
            _vocabulary(files, read.config, target, problems, notes)
            if files.shares_lm_head(read.config):
                _lm_head(files, read, target if deep else None, problems, notes)
    if read is not None and target is not None:
        _compare(read, target, problems, notes)
        if deep:
            notes += _other_files(read, target)
    result["ok"] = not problems and not unsupported
    return result


def _weights(files: HeadFiles) -> dict[str, Any]:
    sizes = {name: torch.Size(shape).numel() for name, shape in files.shapes.items()}
    return {
        "tensors": len(sizes),
        "parameters": sum(n for name, n in sizes.items() if name not in ("d2t", "t2d", EMBEDDING)),
        "bytes": sum(file.stat().st_size for file in files.files.files),
        "dtypes": sorted(set(files.dtypes.values())),
        "own_embedding": EMBEDDING in sizes,
    }


def _weight_bytes(files: HeadFiles | None) -> int:
    return SIZES.get(files.dtypes.get(LM_HEAD, ""), 2) if files else 2


def _provenance(read: ReadConfig) -> dict[str, Any]:
    """What the head says about itself: plain strings cut short and safe to print, and figures."""
    keys = ("drafthead_version", "target", "target_fingerprint")
    about = read.provenance or {}
    provenance: dict[str, Any] = {
        key: about[key][:200].encode("ascii", "backslashreplace").decode()
        for key in keys
        if isinstance(about.get(key), str)
    }
    trained = about.get("trained")
    for key in ("step", "k", "accepted_length"):
        value = trained.get(key) if isinstance(trained, dict) else None
        if isinstance(value, int | float) and abs(value) < 1e15:
            provenance[key] = value
    return provenance


def _values(files: HeadFiles, config: HeadConfig) -> list[str]:
    """Weights that no training leaves behind."""
    problems, not_finite, zero = [], [], []
    for name in (name for name in expected_shapes(config) if name in files.shapes):
        try:
            tensor = files.tensor(name)
        except DraftheadError as error:
            problems.append(str(error))
            continue
        if not bool(torch.isfinite(tensor).all()):
            not_finite.append(name)
        elif not bool(tensor.any()) and not name.endswith(".bias"):
            zero.append(name)
    if not_finite:
        problems.append(f"NaN or infinity in {some(not_finite)}")
    if zero:
        problems.append(f"all zero: {some(zero)}")
    return problems


def _vocabulary(
    files: HeadFiles,
    config: HeadConfig,
    target: Target | None,
    problems: list[str],
    notes: list[str],
) -> None:
    if "d2t" in files.shapes and config.draft_vocab_size == config.vocab_size:
        problems.append("d2t: the head drafts the whole vocabulary, and vLLM then refuses a d2t")
    try:
        d2t = files.d2t(config)
        ids = torch.arange(config.draft_vocab_size) + d2t
        if "t2d" in files.shapes:
            if not torch.equal(files.marked(), ids):
                notes.append("t2d marks other ids than d2t leads to (vLLM reads only d2t)")
        elif len(d2t) > 1 and bool((d2t[1:] > d2t[:-1]).all()):
            notes.append(f"d2t leads to no two neighbouring ids: perhaps it {ABSOLUTE}")
    except DraftheadError as error:
        problems.append(str(error))
        return
    if target is not None and target.vocab_size == config.vocab_size:
        missing = sorted(set(target.eos_token_ids) - set(ids.tolist()))
        if missing:
            notes.append(
                f"end tokens {missing} are not in the draft vocabulary: the last token of an "
                "answer is always a miss"
            )


def _lm_head(
    files: HeadFiles,
    read: ReadConfig,
    target: Target | None,
    problems: list[str],
    notes: list[str],
) -> None:
    """A head that leaves its LM head out: vLLM takes the target's, never the head's embedding."""
    notes.append(f"{LM_HEAD} is missing: vLLM takes the target's")
    if read.tied and EMBEDDING in files.shapes:
        own = files.tensor(EMBEDDING)
        if target is None or not torch.equal(own, target.lm_head().to(own.dtype)):
            problems.append(
                f"{LM_HEAD} is missing, and tie_word_embeddings is true, which vLLM ignores: it "
                f"takes the target's LM head. Save {EMBEDDING} as {LM_HEAD}, too"
            )


def _compare(read: ReadConfig, target: Target, problems: list[str], notes: list[str]) -> None:
    """Does the head fit the target?"""
    config = read.config
    other = "; this is the head of another target"
    if config.target_hidden_size != target.hidden_size:
        problems.append(
            f"target_hidden_size is {config.target_hidden_size}, {target.path} has "
            f"{target.hidden_size}{other}"
        )
    if config.vocab_size != target.vocab_size:
        problems.append(
            f"vocab_size is {config.vocab_size}, {target.path} has {target.vocab_size}{other}"
        )
    ids = list(config.aux_layer_ids)
    if ids[-1] > target.num_layers:
        problems.append(
            f"aux layer ids {ids}: {target.path} has {target.num_layers} layers, ids run from 0 "
            f"to {target.num_layers}{other}"
        )
    default = list(target.default_aux_layers())
    for step, who in ((1, "SpecForge and ModelOpt count outputs, one lower"), (-1, "one too high")):
        if ids != default and [i + step for i in ids] == default:
            notes.append(
                f"aux layer ids {ids} are vLLM's default {default} for this target moved by one "
                f"({who}): if acceptance is poor, try {default}"
            )


def _other_files(read: ReadConfig, target: Target) -> list[str]:
    made_for = _provenance(read).get("target_fingerprint")
    if not made_for or made_for == target.fingerprint:
        return []
    return [
        f"made for a target with fingerprint {made_for}, this one's is {target.fingerprint}: "
        "other files (another quantization?); acceptance may be lower than reported"
    ]
