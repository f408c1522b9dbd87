"""The held-out prompts that verify and bench put to both engines."""

from dataclasses import dataclass

from drafthead.data.answers import read_answers
from drafthead.errors import DraftheadError
from drafthead.rundir import RunDir


@dataclass(frozen=True)
class Prompt:
    """One held-out prompt, as the target met it when it wrote its answer."""

    ids: list[int]
    """Token ids, chat template and generation prompt included."""
    conversation: str
    source: str
    """What the recipe calls the source it comes from (chat, code, …)."""


def heldout_prompts(run: RunDir, limit: int | None) -> list[Prompt]:
    """The held-out prompts of a run, in their order.

    Args:
        run: a run whose target has written its answers.
        limit: at most this many, spread evenly over all; None is all.

    Raises:
        DraftheadError: no answers, or none held out.
    """
    prompts = [
        Prompt(answer.prompt_ids.tolist(), answer.conversation, answer.source)
        for answer in read_answers(run.answers, "heldout")
    ]
    if not prompts:
        raise DraftheadError(f"{run.answers}: no held-out answers; raise prompts.heldout")
    if limit is None or limit >= len(prompts):
        return prompts
    return [prompts[i * len(prompts) // limit] for i in range(limit)]
