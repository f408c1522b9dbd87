"""Acceptance that the bench should meet, from the states that training held out."""

from dataclasses import replace

from drafthead.fsio import read_json
from drafthead.head.checkpoint import load_head
from drafthead.prove.pairing import Point
from drafthead.prove.prompts import heldout_prompts
from drafthead.recipe import Recipe
from drafthead.rundir import RunDir
from drafthead.serve import existing_head
from drafthead.states.reader import StateReader
from drafthead.targets import Target
from drafthead.train.evaluate import evaluate


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
    heldout = read_json(path, "the held-out evaluation that train writes")["heldout"]
    by_k = {entry["k"]: entry["acceptance_by_position"] for entry in heldout}
    # Where a step ends decides where the next one begins, so each k has rates of its own.
    rates = by_k.get(k) or by_k[max(by_k)]
    return [float(rate) for rate in rates[:k]]


def predicted_over_served(
    recipe: Recipe, run: RunDir, target: Target, point: Point
) -> list[float] | None:
    """Acceptance by position predicted over exactly what the bench serves: its prompts, each
    answer cut at its length. A prediction over other text differs by more than the text's noise.

    Args:
        recipe: the run's recipe.
        run: a run with states and an exported head.
        target: the recipe's target.
        point: what is served.

    Returns:
        k rates; None where the answers at hand are not those that will be served (sampled, or
        shorter), or where there are no states.
    """
    length = point.max_new_tokens
    other_text = recipe.generate.temperature > 0 or point.temperature > 0
    if other_text or recipe.generate.max_new_tokens < length:
        return None
    if not (run.states / "meta.json").exists():
        return None
    head = load_head(existing_head(run.head), target).head.float()
    served = {prompt.conversation for prompt in heldout_prompts(run, recipe.bench.prompts)}
    reader = StateReader(run.states, aux_layers=recipe.head.aux_layers)
    samples = []
    for index in reader.indices("heldout"):
        sample = reader[int(index)]
        end = sample.prompt_len + length
        if sample.conversation in served:
            samples.append(
                replace(
                    sample,
                    ids=sample.ids[:end],
                    loss_mask=sample.loss_mask[:end],
                    states=sample.states[: end - 1],
                    scale=None if sample.scale is None else sample.scale[: end - 1],
                )
            )
    embedding = target.embedding().float()
    return list(evaluate(head, embedding, samples, point.num_speculative_tokens)[0].acceptance)
