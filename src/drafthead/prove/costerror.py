"""How much of the cost model's error is noise: the same grid from resampled pairs.

A point is predicted from other points, and each of them was timed in a few pairs. Pairs drawn
again from those that were timed, one fewer than there are, for the few differ too little by just so
much, move a point's error about as much as timing anew would. What they move it by is what noise
alone does: a model that is exact would show errors of that size. Simulated, its errors are a sixth
larger than this says from 8 or 16 pairs, and 4 % from 32.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from drafthead.prove.costmodel import Curves, analyse, load
from drafthead.prove.pairing import typical_steps

ERRORS = {"decoding": "relative_error", "answers": "answer_relative_error"}


def resampled(cell: dict, draw: np.ndarray) -> dict:
    """A measured point as it would be from pairs with these indices [n]; what the cost model reads
    of it."""
    pairs = [cell["pairs"][i] for i in draw]
    base_tokens, base_s, drafted_tokens, drafted_s, drafts, accepted = (
        sum(np.sum(pair[name]) for pair in pairs)
        for name in (
            "base_tokens",
            "base_s",
            "drafted_tokens",
            "drafted_s",
            "drafts",
            "accepted_by_position",
        )
    )
    return {
        **cell,
        "pairs": pairs,
        "step_s": typical_steps(pairs),
        "accepted_length": float(1 + accepted / drafts),
        "speedup": float(drafted_tokens / drafted_s / (base_tokens / base_s)),
    }


def with_intervals(
    cells: Sequence[dict],
    fits: list[dict],
    curves: Mapping[int, Curves],
    *,
    resamples: int = 200,
) -> tuple[list[dict], dict[str, dict]]:
    """Hold a grid's errors against noise.

    Args:
        cells: as :func:`drafthead.prove.costmodel.analyse` got them.
        fits: what it made of them.
        curves: acceptance, as it got them.
        resamples: times that pairs are drawn anew. Points of different k take the same draws: they
            were timed beside the same runs of the target alone.

    Returns:
        The fits with a 95 % interval beside each error, and for decoding and for whole answers the
        median error with that of an exact model under the same noise: 2.5 %, half and 97.5 % of
        resamples are below. Empty where no point could be predicted from others.
    """
    if not any(p["relative_error"] is not None for fit in fits for p in fit["points"]):
        return fits, {}
    timed = [  # a pair of answers of one token has no step
        (cell, [i for i, p in enumerate(cell["pairs"]) if p["base_step_s"] and p["drafted_step_s"]])
        for cell in cells
    ]
    drawn = []
    for seed in range(resamples):
        anew = [
            resampled(
                cell,
                np.random.default_rng([seed, *load(cell)]).choice(own, max(1, len(own) - 1)),
            )
            for cell, own in timed
            if own
        ]
        drawn.append(analyse(anew, curves))
    summary = {}
    fits = [{**fit, "points": [dict(point) for point in fit["points"]]} for fit in fits]
    for name, field in ERRORS.items():
        points = [p for fit in fits for p in fit["points"] if p[field] is not None]
        errors = np.array([p[field] for p in points])  # [points]
        again = np.array(
            [[p[field] for f in one for p in f["points"] if p[field] is not None] for one in drawn]
        )  # [resamples, points]
        for point, low, high in zip(
            points, *np.percentile(again, [2.5, 97.5], axis=0), strict=True
        ):
            point[f"{field}_ci95"] = [float(low), float(high)]
        noise = np.median(np.abs(again - errors), axis=1)
        low, middle, high = np.percentile(noise, [2.5, 50, 97.5])
        summary[name] = {
            "median_error": float(np.median(np.abs(errors))),
            "of_noise_alone": [float(low), float(middle), float(high)],
        }
    return fits, summary
