"""The signed proof: which files were proved, on which machine, with which outcome.

``proof.json`` carries the SHA-256 of every file of target and head, and a seal over itself, so
that card and report can quote it and anyone can see whether the head in hand is the head proved.
"""

import datetime
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drafthead import __version__
from drafthead.errors import DraftheadError
from drafthead.fsio import file_hash, read_json, visible_files, write_json
from drafthead.prove.prompts import Prompt
from drafthead.prove.records import VERIFY_AGAIN, Proof
from drafthead.recipe import without_paths
from drafthead.rundir import RunDir
from drafthead.targets import Target

# Written next to the head after the proof, hence never part of what was proved.
_NOT_PROVED = ("README.md", "LICENSE")


def command_line() -> str:
    """The command that is running, as one would type it, for records: local paths are their last
    names, and `?` stands for what is not UTF-8, which no record could be written with."""
    words = [without_paths(word) for word in sys.argv[1:]]
    return shlex.join(["drafthead", *words]).encode(errors="replace").decode()


def now() -> str:
    """The time, in UTC, for records."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def hash_folder(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a model's folder, by its relative name."""
    return {
        name: file_hash(path)
        for name, path in visible_files(folder).items()
        if not path.name.startswith(_NOT_PROVED)
    }


def seal(record: dict[str, Any]) -> str:
    """SHA-256 over a proof's content in any order of its keys; ``seal`` itself is left out."""
    content = {key: value for key, value in record.items() if key != "seal"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_proof(
    run: RunDir,
    name: str,
    target: Target,
    outcome: dict,
    served: dict[int, dict],
    prompts: Sequence[Prompt],
) -> dict:
    """Write ``proof.json`` of a run and return it.

    Args:
        run: the run; its head is the one proved.
        name: what the recipe calls the target.
        target: the target that it was proved on.
        outcome: verify's result, the claim held or not.
        served: for each k, how the engine was run.
        prompts: what was asked.
    """
    asked = json.dumps([prompt.ids for prompt in prompts])
    sampled = outcome.get("sampled") or {}
    record: dict[str, Any] = {
        "format": "drafthead-proof",
        "version": 1,
        "date": now(),
        "drafthead": __version__,
        "lossless": outcome["lossless"],
        "claim": "greedy output with the head equals greedy output without, token for token, "
        "except where the target's own choice is a tie within its numeric noise"
        # Of a few samples only if they could have shown another.
        + ("; sampled output has the same distribution" if sampled.get("detectable_shift") else ""),
        "outcome": {k: v for k, v in outcome.items() if k not in ("machine", "command")},
        "target": {"name": without_paths(name), "sha256": hash_folder(target.path)},
        "head": {"sha256": hash_folder(run.head)},
        "prompts_sha256": hashlib.sha256(asked.encode()).hexdigest(),
        "served": {str(k): how for k, how in served.items()},
        "machine": outcome["machine"],
        "command": outcome["command"],
    }
    record["seal"] = seal(record)
    write_json(proof_path(run), record)
    return record


def proof_path(run: RunDir) -> Path:
    return run.root / "proof.json"


def read_proof(run: RunDir) -> dict:
    """The proof of a run, after checking that it is intact and of the current head.

    Raises:
        DraftheadError: missing, altered after it was signed off, or of another head.
    """
    path = proof_path(run)
    if not path.exists():
        raise DraftheadError(
            f"{path}: not found: nothing was proved; run `drafthead verify RECIPE`"
        )
    record = read_json(path, "the proof that verify signs off", Proof, VERIFY_AGAIN)
    if record["seal"] != seal(record):
        raise DraftheadError(f"{path}: changed after it was signed; run verify again", field="seal")
    hashes = hash_folder(run.head)
    if record["head"]["sha256"] != hashes:
        proved = record["head"]["sha256"]
        names = sorted(n for n in {*hashes, *proved} if hashes.get(n) != proved.get(n))
        raise DraftheadError(
            f"{path}: signed for another head ({', '.join(names)} differ); run verify again",
            field="head",
        )
    return record


def why_unproved(
    run: RunDir,
    k: int,
    method: str = "greedy",
    target: Target | None = None,
    by_load: list[list[int]] | None = None,
) -> str | None:
    """Why it is not proved that a run's head is lossless at ``k`` drafts a step, drawn by vLLM's
    ``draft_sample_method``; None if it is. target: if given, it has to be the one of the proof.
    by_load: vLLM's ``num_speculative_tokens_per_batch_size``."""
    if not proof_path(run).exists():
        return f"k = {k} was not proved, nor was any other: `drafthead verify RECIPE` would do it."
    try:
        proof = read_proof(run)
    except DraftheadError as error:
        return str(error)
    if not proof["lossless"]:
        return f"{proof_path(run)}: verify found that the head is not lossless."
    if target is not None and hash_folder(target.path) != proof["target"]["sha256"]:
        return (
            f"{target.path}: not the target of the proof any more, and the head drafts for the "
            "old one: `drafthead run RECIPE` makes one for this."
        )
    if str(k) not in proof["served"]:
        proved = ", ".join(sorted(proof["served"], key=int))
        return (
            f"k = {k} was not proved (k = {proved} was): `drafthead verify RECIPE --k {k}` would "
            "do it."
        )
    given = proof["served"][str(k)].get("engine_args", {}).get("speculative_config", {})
    if given.get("num_speculative_tokens_per_batch_size") != by_load:
        return (
            f"k = {k} was proved with other drafts by load than `serve.drafts_by_load` asks for: "
            "`drafthead verify RECIPE` would prove these."
        )
    methods = {m for how in proof["served"].values() for m in how.get("draft_sample_methods", [])}
    if method not in (methods or {"greedy"}):
        return (
            f"{method} drafts were not proved: verify with `serve.draft_sample_method: {method}` "
            "and `--samples 500` would do it."
        )
    return None
