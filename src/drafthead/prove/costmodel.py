"""What speculation will gain at any k: step times and the acceptance curve, multiplied out.

Without a head a step takes ``plain`` seconds and yields one token. With one it takes
``fixed + k * slope``: the target checks k + 1 tokens instead of one and the head drafts k times.
It yields ``1 + p_1 + … + p_k`` tokens, ``p_i`` being the share of steps whose i-th draft is
accepted. Hence (Leviathan et al. 2023, section 3.3, with measured times in place of a ratio c)

    speedup(k) = (1 + p_1 + … + p_k) * plain / (fixed + k * slope)

Step times depend on the requests at once, so each concurrency has a fit of its own. The gain is
of decoding; prefill is the same with and without.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StepCost:
    """Seconds of a decoding step at one concurrency."""

    concurrency: int
    plain: float
    """Target alone."""
    fixed: float
    """With the head, what does not grow with k."""
    slope: float
    """With the head, what each further draft token costs: drafting it and checking it."""

    def step(self, k: int) -> float:
        """Seconds of a step that drafts ``k`` tokens."""
        return self.fixed + k * self.slope

    def speedup(self, k: int, acceptance: Sequence[float]) -> float:
        """Decoding speed with ``k`` drafts over without.

        Args:
            k: tokens drafted a step.
            acceptance: share of steps whose draft at position 1, 2, … is accepted, k at least.

        Raises:
            ValueError: the curve is shorter than k.
        """
        if len(acceptance) < k:
            raise ValueError(f"acceptance at {len(acceptance)} positions, k={k}")
        return (1 + sum(acceptance[:k])) * self.plain / self.step(k)


def fit(concurrency: int, plain: float, steps: dict[int, float]) -> StepCost:
    """Fit a line through step times, each k's relative error counting the same.

    Args:
        concurrency: requests at once.
        plain: seconds of a step of the target alone.
        steps: seconds of a step for each k; with one k only, half of what it takes beyond a plain
            step cannot be told from the rest, so ``fixed`` is taken to be a plain step.
    """
    ks = np.array(sorted(steps), dtype=float)
    seconds = np.array([steps[int(k)] for k in ks])
    if len(ks) == 1:
        return StepCost(concurrency, plain, plain, float((seconds[0] - plain) / ks[0]))
    weighted = np.stack([1 / seconds, ks / seconds], axis=1)
    (fixed, slope), *_ = np.linalg.lstsq(weighted, np.ones(len(ks)), rcond=None)
    return StepCost(concurrency, plain, float(fixed), float(slope))


def choose(cost: StepCost, acceptance: Sequence[float]) -> dict[int, float]:
    """Predicted decoding speedup for each k that the acceptance curve reaches, best first."""
    gains = {k: cost.speedup(k, acceptance) for k in range(1, len(acceptance) + 1)}
    return dict(sorted(gains.items(), key=lambda item: -item[1]))


def analyse(cells: Sequence[dict], acceptance: Sequence[float] | None) -> list[dict]:
    """Fit every concurrency of a measured grid and hold the model against it.

    The error is out of sample: each k is predicted from a fit without it (where at least two
    others remain), with the acceptance curve given, or that of the largest k served.

    Args:
        cells: greedy points of one grid, as :func:`drafthead.prove.pairing.summarize` gives them.
        acceptance: predicted acceptance by position, if training has one.

    Returns:
        For each concurrency: the fit, predicted and measured decoding speedup for each k, the
        relative errors, and the k to serve.
    """
    found = []
    usable = [c for c in cells if c["step_s"]["base"] and c["step_s"]["drafted"]]
    for concurrency in sorted({c["concurrency"] for c in usable}):
        own = {c["num_speculative_tokens"]: c for c in usable if c["concurrency"] == concurrency}
        plain = float(np.median([c["step_s"]["base"] for c in own.values()]))
        steps = {k: c["step_s"]["drafted"] for k, c in own.items()}
        served = own[max(own)]["acceptance_by_position"]
        curve = list(acceptance if acceptance and len(acceptance) >= max(own) else served)
        cost = fit(concurrency, plain, steps)
        points = []
        for k, cell in sorted(own.items()):
            others = {j: s for j, s in steps.items() if j != k}
            held_out = fit(concurrency, plain, others) if len(others) >= 2 else None
            measured = cell["accepted_length"] * cell["step_s"]["base"] / steps[k]
            predicted = held_out.speedup(k, curve) if held_out else None
            points.append(
                {
                    "num_speculative_tokens": k,
                    "measured": measured,
                    "predicted_without_this_point": predicted,
                    "relative_error": predicted and predicted / measured - 1,
                    "fitted": cost.speedup(k, curve),
                }
            )
        gains = choose(cost, curve)
        errors = [abs(p["relative_error"]) for p in points if p["relative_error"] is not None]
        found.append(
            {
                "concurrency": concurrency,
                "plain_step_s": plain,
                "fixed_s": cost.fixed,
                "per_draft_token_s": cost.slope,
                "acceptance_by_position": curve,
                "points": points,
                "median_relative_error": float(np.median(errors)) if errors else None,
                "predicted_speedup": {str(k): gain for k, gain in sorted(gains.items())},
                "best_num_speculative_tokens": next(iter(gains)),
            }
        )
    return found
