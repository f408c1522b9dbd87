"""Acceptance that the bench should meet, from the states that training held out."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from drafthead.drafters import drafter_of
from drafthead.drafters.base import Drafter, TargetSide
from drafthead.fsio import read_json
from drafthead.ops.losses import Teacher
from drafthead.prove.expected import Sampling, expected_acceptance
from drafthead.prove.paired_timing import Point
from drafthead.prove.records import Heldout
from drafthead.recipe import Recipe
from drafthead.rundir import RunDir
from drafthead.serve import existing_head, request_defaults
from drafthead.states import Sample
from drafthead.states.reader import StateReader
from drafthead.targets import Target
from drafthead.train.evaluate import evaluate

_EXPECTED = 16
"""Held-out answers whose acceptance is computed over the whole vocabulary: a second or more each of
a large one, on a CPU."""


def predicted_by_training(run: RunDir, k: int) -> list[float] | None:
    """Acceptance by position with ``k`` drafts a step, as training's held-out evaluation has it.

    Returns:
        At most k rates, fewer where fewer drafts were evaluated; None for a head that was not
        trained in this run.
    """
    path = run.train / "best.json"
    if not path.exists():
        return None
    heldout = read_json(path, "the held-out evaluation that train writes", Heldout)["heldout"]
    by_k = {entry["k"]: entry["acceptance_by_position"] for entry in heldout}
    # Where a step ends decides where the next one begins, so each k has rates of its own.
    rates = by_k.get(k) or by_k[max(by_k)]
    return [float(rate) for rate in rates[:k]]


def predicted_acceptance(
    recipe: Recipe,
    run: RunDir,
    target: Target,
    point: Point,
    ks: Sequence[int],
    conversations: Collection[str],
) -> dict[int, list[float] | None]:
    """Predicted acceptance by position for each k, to compare with the served one.

    The head drafts over exactly what is served, on the states held out: over other text a
    prediction differs by more than noise. Where those states are not there, it is what training
    evaluated. None of sampled answers, of answers of one token, and of prompts of the bench's own:
    what is so far from the prediction would be taken for a head that is served wrongly.

    Args:
        recipe: the run's recipe.
        run: a run with an exported head.
        target: the recipe's target.
        point: what is served, whatever its k.
        ks: tokens drafted a step.
        conversations: whose prompts are timed.
    """
    if recipe.bench.sources is not None or point.temperature:
        return dict.fromkeys(ks)
    same_text = (
        recipe.generate.temperature == 0
        and recipe.generate.max_new_tokens >= point.max_new_tokens
        and (run.states / "meta.json").exists()
    )
    if not same_text:
        return {k: predicted_by_training(run, k) for k in ks}
    samples = _samples(recipe, run, point, conversations)
    if not samples:
        return dict.fromkeys(ks)
    drafter, head, side = _head(run, target)
    totals = evaluate(drafter, head, side, samples, ks)
    return {total.k: total.by_position for total in totals}


def predicted_sampling(
    recipe: Recipe,
    run: RunDir,
    target: Target,
    point: Point,
    k: int,
    conversations: Collection[str],
) -> list[dict[str, Any]]:
    """Acceptance to be expected at temperatures 0, 0.7, 1 and the recipe's, with each way to draw
    drafts, for requests that are else as the target's generation_config.json says; empty without
    held-out states. See :mod:`drafthead.prove.expected`.

    Args:
        recipe: the run's recipe.
        run: a run with an exported head.
        target: the recipe's target.
        point: how long answers are.
        k: tokens drafted a step.
        conversations: whose held-out answers are walked.
    """
    if not (run.states / "meta.json").exists():
        return []
    samples = _samples(recipe, run, point, conversations)[:_EXPECTED]
    if not samples:
        return []
    drafter, head, side = _head(run, target)
    weight, eps = target.final_norm()
    every = Teacher(weight.float(), eps, target.lm_head().float(), target.logits)
    defaults, made = request_defaults(target, recipe.engine.extra), recipe.generate
    cut = {"top_p": defaults.get("top_p") or 1.0, "top_k": max(0, defaults.get("top_k") or 0)}

    def sampling(heat: float, **cut: Any) -> Sampling:
        return Sampling(heat, **cut) if heat else Sampling(0.0)

    heats = sorted({0.0, 0.7, 1.0, *recipe.bench.temperature})
    return expected_acceptance(
        drafter,
        head,
        replace(side, teacher=every),
        samples,
        k,
        [sampling(heat, **cut) for heat in heats],
        drawn_with=sampling(made.temperature, top_p=made.top_p),
    )


def _head(run: RunDir, target: Target) -> tuple[Drafter, Any, TargetSide]:
    """The run's head in float32, and the target's side of it."""
    folder = Path(existing_head(run.head))
    drafter = drafter_of(folder)
    head, _ = drafter.load(folder, target)
    lm_head = None if head.lm_head is not None else target.lm_head().float()
    return drafter, head.float(), TargetSide(target.embedding().float(), lm_head=lm_head)


def _samples(
    recipe: Recipe, run: RunDir, point: Point, conversations: Collection[str]
) -> list[Sample]:
    """The held-out samples of these conversations that have a draft, each answer cut at the point's
    length."""
    reader = StateReader(run.states, aux_layers=recipe.head.aux_layers)
    samples = []
    for index in reader.indices("heldout"):
        sample = reader[int(index)]
        end = sample.prompt_len + point.max_new_tokens
        ids = sample.ids[:end]
        if sample.conversation in conversations and len(ids) - sample.prompt_len > 1:
            cut = sample.map(itemgetter(slice(end - 1)))
            samples.append(replace(cut, ids=ids, loss_mask=sample.loss_mask[:end]))
    return samples
