"""Which k is served: what the recipe names, else the fastest that was proved and measured."""

from collections.abc import Collection, Sequence
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from drafthead.drafters import DRAFTERS
from drafthead.errors import DraftheadError
from drafthead.fsio import Amount, Natural, read_json
from drafthead.prove.paired_timing import load
from drafthead.prove.proof import proof_path, read_proof
from drafthead.prove.records import BENCH_AGAIN, ProvedHead
from drafthead.recipe import Recipe, with_options
from drafthead.rundir import RunDir


class _Cell(TypedDict):
    num_speculative_tokens: Natural
    concurrency: Natural
    temperature: Amount
    max_new_tokens: Natural
    tensor_parallel_size: Natural
    compared_speedup: Amount
    draft_sample_method: NotRequired[str]


class _Benched(TypedDict):
    """What of ``bench.json`` decides k."""

    grid: Annotated[list[_Cell], Field(min_length=1)]
    head: ProvedHead


def default_ks(recipe: Recipe) -> list[int]:
    """Each k to prove and measure where verify and bench name none: the one that serve names, else
    those that this kind of head is worth trying with."""
    named = recipe.serve.num_speculative_tokens
    return [named] if named else list(DRAFTERS[recipe.head.only_kind].default_k(recipe))


def candidates(recipe: Recipe) -> list[int]:
    """Each k that bench measures."""
    return recipe.bench.num_speculative_tokens or default_ks(recipe)


def fastest(cells: Sequence[dict], ks: Collection[int]) -> dict | None:
    """The cell of the k in ``ks`` that was fastest at the load of the first cell, over the pairs
    that all k share; None if none of them was measured there."""
    rivals = [
        cell
        for cell in cells
        if load(cell) == load(cells[0]) and cell["num_speculative_tokens"] in ks
    ]
    return max(rivals, key=lambda cell: cell["compared_speedup"], default=None)


def drafts_by_load(cells: Sequence[dict], ks: Collection[int]) -> list[list[int]]:
    """`serve.drafts_by_load` as it was measured: from so many requests at once the k in ``ks`` that
    was fastest, 0 where none was faster than the target alone. Loads between two that were measured
    get what the busier one gets. Empty if the load changes nothing, or only one was measured.

    cells: the points of ``bench.json``; those unlike the first in anything but load and k are left
    out.
    """
    alike = ("temperature", "max_new_tokens", "tensor_parallel_size")
    best: dict[int, dict] = {}
    for cell in cells:
        if cell["num_speculative_tokens"] not in ks or method_of(cell) != method_of(cells[0]):
            continue
        if all(cell[name] == cells[0][name] for name in alike):
            rival = best.setdefault(cell["concurrency"], cell)
            if cell["compared_speedup"] > rival["compared_speedup"]:
                best[cell["concurrency"]] = cell
    found: list[list[int]] = []
    start = 1
    for requests, cell in sorted(best.items()):
        drafts = cell["num_speculative_tokens"] if cell["compared_speedup"] > 1 else 0
        if not found or found[-1][1] != drafts:
            found.append([start, drafts])
        start = requests + 1
    return found if len(found) > 1 else []


def top_level(cell: dict) -> dict:
    """A measured point as the headline of ``bench.json``."""
    return {name: value for name, value in cell.items() if name not in ("pairs", "by_source")}


def with_headline(bench: dict, k: int) -> dict:
    """``bench.json`` with another k as its headline, if that was measured at the first load."""
    cell = fastest(bench["grid"], {k})
    if cell is None or cell is bench["grid"][0]:
        return bench
    others = [other for other in bench["grid"] if other is not cell]
    nothing: dict[str, Any] = {
        "predicted_acceptance_by_position": None,
        "predicted_accepted_length": None,
        "predicted_sampling": [],
    }
    return {**bench, **top_level(cell), **nothing, "grid": [cell, *others]}


def lossless_proof(run: RunDir) -> dict | None:
    """The proof that the run's current head is lossless; None without one."""
    if not proof_path(run).exists():
        return None
    try:
        proof = read_proof(run)
    except DraftheadError:  # of another head, or altered
        return None
    return proof if proof["lossless"] else None


def proved_ks(proof: dict | None) -> set[int]:
    """Each k that a proof is of."""
    return {int(k) for k in proof["served"]} if proof else set()


def recommended(recipe: Recipe, run: RunDir) -> dict | None:
    """The fastest of the recipe's ways to draft that were proved *and* measured on the run's head,
    as the point of ``bench.json``; None if there is none.

    Raises:
        DraftheadError: ``bench.json`` is not what this version writes.
    """
    proof = lossless_proof(run)
    if proof is None or not run.bench_json.exists():
        return None
    what = "the figures of `drafthead bench`"
    bench = read_json(run.bench_json, what, _Benched, BENCH_AGAIN)
    if bench["head"]["sha256"] != proof["head"]["sha256"]:
        return None
    of_recipe = [c for c in bench["grid"] if method_of(c) in recipe.draft_methods]
    return fastest(of_recipe, proved_ks(proof) & set(candidates(recipe)))


def recommended_k(recipe: Recipe, run: RunDir) -> int | None:
    """The k of :func:`recommended`."""
    best = recommended(recipe, run)
    return None if best is None else best["num_speculative_tokens"]


def method_of(cell: dict) -> str:
    """``draft_sample_method`` of a measured point."""
    return cell.get("draft_sample_method", "greedy")


def as_served(recipe: Recipe, run: RunDir) -> Recipe:
    """The recipe with ``serve.draft_sample_method`` as it is to be served: what the recipe names,
    else what was measured fastest at the headline's temperature, else vLLM's default.

    Raises:
        DraftheadError: ``bench.json`` is not what this version writes.
    """
    best = recommended(recipe, run) if len(recipe.draft_methods) > 1 else None
    method = recipe.serve.named_method if best is None else method_of(best)
    return with_options(recipe, "serve", {"draft_sample_method": method})


def served_k(recipe: Recipe, run: RunDir) -> int:
    """Tokens to draft a step: what the recipe names, else what is recommended, else of what was
    proved the nearest to the default.

    Raises:
        DraftheadError: ``bench.json`` is not what this version writes.
    """
    if recipe.serve.num_speculative_tokens is not None:
        return recipe.serve.num_speculative_tokens
    if (best := recommended_k(recipe, run)) is not None:
        return best
    ks = proved_ks(lossless_proof(run)) or default_ks(recipe)
    return min(ks, key=lambda k: (abs(k - recipe.serve.k), k))
