"""All patches of vLLM in one table: for whom each is, which vLLM needs it, and how it stands.

A patch is a module of this package with

- ``REPLACEMENTS``: the functions of vLLM that it replaces (``patch.py``), or an ``apply()`` of its
  own where it does something else;
- ``needed()``, where its fault can be provoked without an engine: whether this vLLM has it. It
  tries, it does not read vLLM's source.

Where a fault cannot be provoked, the versions in the table decide. Under a version that the table
does not know, a patch for correctness is applied as long as it fits, and said to be unproved; one
that only saves time is left out.

Nothing here imports vLLM: ``drafthead doctor`` reads the table without it.
"""

import importlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from types import ModuleType
from typing import Literal

from packaging.version import InvalidVersion, Version

from .patch import Replacement

log = logging.getLogger("vllm.plugins.drafthead")

VERSIONS = ((0, 32), (0, 33))
"""Releases of vLLM that the patches were written for or read against (docs/upstream/README.md)."""
SKIP = "DRAFTHEAD_SKIP_PATCHES"
"""Environment variable: names of patches to leave out, with commas between them, or ``all``."""


class State(StrEnum):
    """How a patch stands in this process."""

    applied = "applied"
    needed = "needed"
    """Will be applied as soon as a model or head that it is for is loaded."""
    stepped_aside = "stepped aside"
    """This vLLM does not have the fault."""
    unknown = "unknown"
    """Whether this vLLM has the fault is not known. One for correctness is applied all the same."""
    off = "off"
    """It does not fit this vLLM."""
    left_out = "left out"
    """The environment says so."""
    elsewhere = "not here"
    """It is for another device."""


@dataclass(frozen=True)
class Patch:
    """A row of the table."""

    name: str
    """Of the patch and of its module."""
    concerns: str
    """For whom it is."""
    without: str
    """What is wrong without it."""
    purpose: Literal["correctness", "cost"] = "correctness"
    device: Literal["any", "cpu", "gpu"] = "any"
    loaded_with: tuple[Literal["lfm2", "eagle3", "dspark"], ...] = ()
    """Applied when an LFM2 class or a head's is imported, so that no other model sees it; empty: in
    every process at start. The scheduler and the cache planner run in processes that may
    never import the model."""
    versions: tuple[tuple[int, int], ...] = VERSIONS
    """Releases of vLLM that have the fault."""
    when_served: bool = False
    """Stands in for a class or a loader of vLLM and asks there, when such a model is served,
    whether it is needed: importing the class to ask would cost every process seconds."""

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"{__package__}.{self.name}")

    @property
    def replacements(self) -> tuple[Replacement, ...]:
        """The functions of vLLM that it replaces."""
        return getattr(self.module, "REPLACEMENTS", ())


TABLE = (
    Patch(
        "aux_states",
        "LFM2, LFM2-MoE",
        "no EAGLE-3 at all",
        when_served=True,
    ),
    Patch(
        "any_target",
        "targets whose class in vLLM has no hook for EAGLE-3",
        "no EAGLE-3 at all",
        when_served=True,
    ),
    Patch(
        "aux_copies",
        "targets that vLLM gives the hook, in eager mode on a GPU",
        "a wrong state of layer 0, where the head reads that",
    ),
    Patch(
        "placeholder_drafts",
        "hybrid targets, any drafter",
        "prompts of one token are answered wrongly under load",
    ),
    Patch(
        "draft_kv_group",
        "hybrid targets, heads",
        "prefix-cache hits and memory are lost",
        versions=((0, 32),),
    ),
    Patch(
        "logprob_ids",
        "any target and drafter, older model runner",
        "some requests end the engine",
    ),
    Patch(
        "cpu_kernel_registry",
        "any target, after numba was imported (n-gram drafts do)",
        "the next engine does not start",
        device="cpu",
    ),
    Patch(
        "cpu_expand",
        "any target and drafter, sampling",
        "sampled answers come from another distribution",
        device="cpu",
    ),
    Patch(
        "cpu_top_k",
        "any target and drafter",
        "some requests end the engine",
        device="cpu",
    ),
    Patch(
        "cpu_seeds",
        "any target and drafter, requests with a seed",
        "a prompt that is read in chunks ends the engine",
        device="cpu",
    ),
    Patch(
        "cpu_rms_norm",
        "block drafters of two or more layers (DFlash, DSpark)",
        "later layers use the first one's norm: poor drafts",
        device="cpu",
    ),
    Patch(
        "cpu_dspark",
        "DSpark heads",
        "the CPU build refuses them",
        device="cpu",
    ),
    Patch(
        "nvfp4",
        "NVFP4 checkpoints, LFM2's above all",
        "the checkpoint may not load",
        device="gpu",
        when_served=True,
    ),
    Patch(
        "nvfp4_cpu",
        "NVFP4 checkpoints",
        "the checkpoint is refused",
        device="cpu",
        when_served=True,
    ),
    Patch(
        "state_shape",
        "LFM2, any drafter",
        "the engine may not start when many tokens are drafted",
        loaded_with=("lfm2",),
    ),
    Patch(
        "accepted_counts",
        "LFM2, any drafter, older model runner",
        "requests that sit out a step lose accepted tokens",
        loaded_with=("lfm2",),
    ),
    Patch(
        "batch_order",
        "LFM2, any drafter, newer model runner",
        "requests without drafts lose accepted tokens",
        loaded_with=("lfm2",),
    ),
    Patch(
        "prefill_graphs",
        "LFM2, any drafter, older model runner with CUDA graphs",
        "prompt chunks as wide as a verify step run as decodes",
        loaded_with=("lfm2",),
    ),
    Patch(
        "resumed_prefills",
        "LFM2, any drafter, older model runner",
        "preempted requests may go on wrongly",
        loaded_with=("lfm2",),
    ),
    Patch(
        "narrow_graphs",
        "LFM2, drafts by load, newer model runner with CUDA graphs",
        "the engine does not start",
        device="gpu",
        loaded_with=("lfm2",),
    ),
    Patch(
        "cpu_rope",
        "LFM2",
        "wrong answers",
        device="cpu",
        loaded_with=("lfm2",),
    ),
    Patch(
        "cpu_short_conv",
        "LFM2, any drafter",
        "wrong answers",
        device="cpu",
        loaded_with=("lfm2",),
    ),
    Patch(
        "cpu_state_copies",
        "LFM2, any drafter, prefix caching",
        "the engine ends at the first step",
        device="cpu",
        loaded_with=("lfm2",),
    ),
    Patch(
        "conv_metadata",
        "LFM2, any drafter, newer model runner",
        "steps cost more",
        purpose="cost",
        loaded_with=("lfm2",),
    ),
    Patch(
        "greedy_verify",
        "LFM2 with any drafter, heads on any target, newer model runner",
        "checking greedy drafts takes six kernels instead of two",
        purpose="cost",
        loaded_with=("lfm2", "eagle3", "dspark"),
    ),
    Patch(
        "draft_argmax",
        "EAGLE-3 heads, newer model runner",
        "drafts cost more, unless `use_local_argmax_reduction` is set, as `drafthead serve` does",
        purpose="cost",
        loaded_with=("eagle3",),
    ),
    Patch(
        "aux_norm",
        "EAGLE-3 heads",
        "a head's norms cost eight launches each",
        purpose="cost",
        loaded_with=("eagle3",),
    ),
    Patch(
        "resting_drafter",
        "DSpark heads, drafts by load, newer model runner",
        "steps with no drafts pay for a whole block of them",
        purpose="cost",
        loaded_with=("dspark",),
    ),
    Patch(
        "markov_chain",
        "DSpark heads, greedy drafts, newer model runner",
        "each draft takes nine kernels instead of one",
        purpose="cost",
        loaded_with=("dspark",),
    ),
)


@dataclass(frozen=True)
class Status:
    """How one patch stands, and why where that is not plain."""

    patch: Patch
    state: State
    why: str = ""

    @property
    def unprotected(self) -> bool:
        """A fault of vLLM that this patch is for may be there."""
        bad = (State.unknown, State.off, State.left_out)
        return self.patch.purpose == "correctness" and self.state in bad

    @property
    def advice(self) -> str:
        """What may go wrong and what to do, where :attr:`unprotected`."""
        state = "applied unproved" if self.state == State.unknown else self.state
        words = f"patch {self.patch.name} is {state}: {self.why}. It is for {self.patch.concerns}. "
        words += f"Without it: {self.patch.without}. "
        if self.state == State.left_out:
            return words + f"Unset {SKIP}"
        releases = " or ".join(f"{major}.{minor}" for major, minor in VERSIONS)
        return words + f"Install vLLM {releases}, or trust only what `drafthead verify` proves"


_statuses: dict[str, Status] = {}
"""Of the patches that this process has applied, or tried to, by name."""


def named(name: str) -> Patch:
    """The patch ``name``."""
    return next(patch for patch in TABLE if patch.name == name)


def rows(loaded: str | None) -> tuple[Patch, ...]:
    """The patches to apply at start (None), or when a class of ``loaded`` is imported."""
    return tuple(p for p in TABLE if (loaded in p.loaded_with if loaded else not p.loaded_with))


def release(version: str) -> tuple[int, ...]:
    """``(0, 32)`` of 0.32.1, 0.32.0rc1 and 0.32.1.dev3+g1a2b; empty for what is no version."""
    try:
        return Version(version).release[:2]
    except InvalidVersion:
        return ()


def skipped(name: str) -> bool:
    """Whether the environment leaves the patch ``name`` out."""
    names = os.environ.get(SKIP, "").split(",")
    return name in names or "all" in names


def apply(patches: Iterable[Patch]) -> None:
    """Apply those of ``patches`` that this process has not applied yet, and say how they stand."""
    fresh = [patch for patch in patches if patch.name not in _statuses]
    for patch in fresh:
        record(_apply(patch))
    names: dict[State, list[str]] = {}
    for patch in fresh:
        names.setdefault(_statuses[patch.name].state, []).append(patch.name)
    if names:
        told = "; ".join(f"{state}: {', '.join(names[state])}" for state in names)
        log.info("drafthead's patches: %s", told)


def record(status: Status) -> None:
    """Keep how a patch stands, and warn of a fault that may be there."""
    _statuses[status.patch.name] = status
    if status.unprotected and status.state != State.left_out:
        log.warning("drafthead: %s.", status.advice)


def step_aside(name: str) -> None:
    """A patch that asks when a model is served: this vLLM does without."""
    record(Status(named(name), State.stepped_aside))


def status(name: str) -> Status:
    """How the patch ``name`` stands in this process; if it is not applied here, it is looked at."""
    return _statuses.get(name) or look(named(name))


def statuses() -> list[Status]:
    """How every patch stands in this process."""
    return [status(patch.name) for patch in TABLE]


def unprotected(model_type: str) -> list[str]:
    """What may be wrong in this process's engine for a target of a ``model_type``: faults of vLLM
    whose patches are off, left out or unproved."""
    if not _statuses:
        return ["drafthead's plugin was not loaded by vLLM; `drafthead doctor` says why"]
    return [
        status.advice
        for status in statuses()
        if status.unprotected
        and (not status.patch.loaded_with or model_type.startswith(status.patch.loaded_with))
    ]


def look(patch: Patch) -> Status:
    """Whether a patch is needed here and fits, without applying it."""
    from vllm import __version__ as version
    from vllm.platforms import current_platform

    if skipped(patch.name):
        return Status(patch, State.left_out, f"{SKIP} names it")
    if patch.device not in ("any", "cpu" if current_platform.is_cpu() else "gpu"):
        return Status(patch, State.elsewhere)
    try:
        replacements = patch.replacements
    except Exception as error:  # whatever a future vLLM no longer has
        return Status(patch, State.off, f"it does not fit vLLM {version} ({error})")
    faulty, why = _faulty(patch, version)
    if faulty is False:
        return Status(patch, State.stepped_aside)
    changed = "; ".join(filter(None, (r.changed() for r in replacements)))
    if changed:
        return Status(patch, State.off, f"in vLLM {version} {changed}")
    return Status(patch, State.unknown if faulty is None else State.needed, why)


def _faulty(patch: Patch, version: str) -> tuple[bool | None, str]:
    """Whether vLLM has the fault, None if that is not known, and then why not."""
    if patch.when_served:
        return True, ""
    why = "the fault cannot be tried out"
    try:
        needed = getattr(patch.module, "needed", lambda: None)()
    except Exception as error:
        needed, why = None, f"trying its fault out failed ({type(error).__name__}: {error})"
    if needed is None and release(version) in VERSIONS:
        needed = release(version) in patch.versions
    return needed, "" if needed is not None else f"vLLM {version} is not known to it, and {why}"


def _apply(patch: Patch) -> Status:
    """Apply a patch if it is needed here. Its failure must not keep vLLM from starting."""
    status = look(patch)
    unproved = status.state == State.unknown and patch.purpose == "correctness"
    if status.state != State.needed and not unproved:
        return status
    try:
        for replacement in patch.replacements:
            replacement.apply(patch.name)
        getattr(patch.module, "apply", lambda: None)()
    except Exception as error:
        return Status(patch, State.off, f"it cannot be applied ({type(error).__name__}: {error})")
    return status if unproved else Status(patch, State.applied)
