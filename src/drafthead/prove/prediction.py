"""Acceptance that the bench should meet, from the states that training held out."""

from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from drafthead.drafters import drafter_of
from drafthead.drafters.base import TargetSide
from drafthead.fsio import read_json
from drafthead.head.prune import keep_tokens
from drafthead.prove.costmodel import thinned
from drafthead.prove.pairing import Point
from drafthead.prove.prompts import heldout_prompts
from drafthead.prove.records import Coverage, Heldout
from drafthead.recipe import Recipe
from drafthead.rundir import RunDir
from drafthead.serve import existing_head
from drafthead.states import Sample
from drafthead.states.reader import StateReader
from drafthead.targets import Target
from drafthead.train.evaluate import evaluate
from drafthead.vocab import choose

# Draft vocabularies to judge, as shares of the one at hand: the smaller are tried out on the
# held-out states, the larger are estimated.
_SHARES = (0.25, 0.5, 1, 2, 4)


def predicted_acceptance(run: RunDir, k: int | None = None) -> list[float] | None:
    """Acceptance by position that training's held-out evaluation predicts.

    Args:
        run: a run.
        k: tokens drafted a step; None is the most that was evaluated. A larger k than that is
            predicted as far as the evaluation goes.

    Returns:
        At most k rates; None for a head that was not trained in this run.
    """
    path = run.train / "best.json"
    if not path.exists():
        return None
    heldout = read_json(path, "the held-out evaluation that train writes", Heldout)["heldout"]
    by_k = {entry["k"]: entry["acceptance_by_position"] for entry in heldout}
    # Where a step ends decides where the next one begins, so each k has rates of its own.
    rates = by_k.get(k) or by_k[max(by_k)]
    return [float(rate) for rate in rates[:k]]


class Rehearsal:
    """The head drafting over exactly what the bench serves, on the states held out: its prompts,
    each answer cut at its length. Over other text a prediction differs by more than noise.

    Args:
        recipe: the run's recipe.
        run: a run with an exported head.
        target: the recipe's target.
        point: what is served.
    """

    def __init__(self, recipe: Recipe, run: RunDir, target: Target, point: Point):
        self.recipe, self.run, self.target, self.point = recipe, run, target, point

    def of_answers(self, max_new_tokens: int) -> "Rehearsal":
        """The same for answers of another length."""
        point = replace(self.point, max_new_tokens=max_new_tokens)
        return Rehearsal(self.recipe, self.run, self.target, point)

    @property
    def possible(self) -> bool:
        """Whether the answers at hand are those that will be served, and their states are there."""
        other_text = self.recipe.generate.temperature > 0 or self.point.temperature > 0
        other_text |= self.other_prompts
        longer = self.recipe.generate.max_new_tokens < self.point.max_new_tokens
        return not other_text and not longer and (self.run.states / "meta.json").exists()

    @property
    def other_prompts(self) -> bool:
        """Whether the bench asks prompts of its own: nothing held out tells of those."""
        return self.recipe.bench.sources is not None

    def head(self) -> Any:
        folder = Path(existing_head(self.run.head))
        head, _ = drafter_of(folder).load(folder, self.target)
        return head.float()

    def samples(self) -> list[Sample]:
        prompts = heldout_prompts(self.run, self.recipe.bench.prompts)
        served = {prompt.conversation for prompt in prompts}
        reader = StateReader(self.run.states, aux_layers=self.recipe.head.aux_layers)
        samples = []
        for index in reader.indices("heldout"):
            sample = reader[int(index)]
            end = sample.prompt_len + self.point.max_new_tokens
            if sample.conversation in served:
                samples.append(
                    replace(
                        sample.map(itemgetter(slice(end - 1))),
                        ids=sample.ids[:end],
                        loss_mask=sample.loss_mask[:end],
                    )
                )
        return samples

    def acceptance(self, head: Any, ks: Sequence[int]) -> list[list[float]]:
        """Acceptance by position with each number of drafts a step."""
        lm_head = None if head.lm_head is not None else self.target.lm_head().float()
        target = TargetSide(self.target.embedding().float(), lm_head=lm_head)
        drafter = drafter_of(self.run.head)
        totals = evaluate(drafter, head, target, self.samples(), ks)
        return [total.by_position for total in totals]


def predicted_curves(rehearsal: Rehearsal, most: int) -> list[list[float]] | None:
    """Acceptance by position with 1, 2, … drafts a step, for the cost model: over what the bench
    serves where that can be told, up to ``most`` drafts; else as far as training evaluated. None
    without either, and for prompts of the bench's own."""
    if rehearsal.possible:
        return rehearsal.acceptance(rehearsal.head(), range(1, most + 1))
    if rehearsal.other_prompts:
        return None
    longest = predicted_acceptance(rehearsal.run)
    if longest is None:
        return None
    ks = range(1, len(longest) + 1)
    return [predicted_acceptance(rehearsal.run, k) or [] for k in ks]


def predicted_over_served(rehearsal: Rehearsal) -> list[float] | None:
    """Acceptance by position predicted over exactly what the bench serves; None where that
    cannot be told."""
    if not rehearsal.possible:
        return None
    return rehearsal.acceptance(rehearsal.head(), [rehearsal.point.num_speculative_tokens])[0]


def expected_acceptance(rehearsal: Rehearsal) -> list[float] | None:
    """Acceptance by position to put beside the served one: over exactly what is served, else what
    training evaluated. None of sampled answers, and of prompts of the bench's own: what is so far
    from the prediction would be taken for a head that is served wrongly."""
    if rehearsal.possible:
        return predicted_over_served(rehearsal)
    if rehearsal.other_prompts or rehearsal.point.temperature:
        return None
    return predicted_acceptance(rehearsal.run, rehearsal.point.num_speculative_tokens)


def by_vocabulary(
    rehearsal: Rehearsal, curves: list[list[float]] | None
) -> dict[int, list[list[float]]] | None:
    """Acceptance with 1, 2, … drafts a step and other draft vocabularies, by their size.

    A smaller one is tried out: the head drafts over the held-out states with the rows that would
    be left. A larger one is an estimate: the head's own acceptance, grown as the share of what
    the target writes that it could draft. So is a smaller one where nothing can be tried out.

    Args:
        rehearsal: the head, and what it would be served with.
        curves: acceptance with its own vocabulary.

    Returns:
        None without these, or for a head whose draft vocabulary was not chosen in this run.
    """
    run = rehearsal.run
    if curves is None or not (run.vocab / "coverage.json").exists():
        return None
    if rehearsal.recipe.train.start_from:  # such a head brings its vocabulary
        return None
    about = read_json(run.vocab / "coverage.json", "the draft vocabulary's coverage", Coverage)
    counts = load_file(run.vocab / "vocab.safetensors")["counts"].numpy()
    own, found = about["size"], {}
    total = max(1, counts.sum())
    for size in sorted({min(round(own * share), len(counts)) for share in _SHARES}):
        if size < len(about["always_in"]):
            continue
        kept = choose(counts, size, about["always_in"])
        if size < own and rehearsal.possible:
            head = keep_tokens(rehearsal.head(), torch.from_numpy(kept))
            found[size] = rehearsal.acceptance(head, range(1, len(curves) + 1))
        else:
            share = counts[kept].sum() / total / max(about["coverage"], 1e-9)
            found[size] = [[min(1.0, p) for p in thinned(curve, float(share))] for curve in curves]
    return found
