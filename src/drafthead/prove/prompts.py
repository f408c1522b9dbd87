"""The prompts that verify and bench put to both engines."""

from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from drafthead.data.answers import read_answers
from drafthead.data.chats import SourceCounts, read_chats
from drafthead.data.template import Template, recipe_template
from drafthead.errors import DraftheadError
from drafthead.recipe import Recipe
from drafthead.rundir import RunDir
from drafthead.serve import longest_sequence
from drafthead.targets import Target


@dataclass(frozen=True)
class Prompt:
    """One prompt, as the target meets it."""

    ids: list[int]
    """Token ids, chat template and generation prompt included."""
    conversation: str
    source: str
    """What the recipe calls the source it comes from (chat, code, …)."""


def spread(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    """At most ``limit`` of them, spread evenly over all; None is all."""
    if limit is None or limit >= len(prompts):
        return prompts
    return [prompts[i * len(prompts) // limit] for i in range(limit)]


def _answered(run: RunDir, split: str) -> list[Prompt]:
    return [
        Prompt(answer.prompt_ids.tolist(), answer.conversation, answer.source)
        for answer in read_answers(run.answers, split)
    ]


def heldout_prompts(run: RunDir, limit: int | None) -> list[Prompt]:
    """The held-out prompts of a run, in their order.

    Args:
        run: a run whose target has written its answers.
        limit: at most this many, spread evenly over all; None is all.

    Raises:
        DraftheadError: no answers, or none held out.
    """
    prompts = _answered(run, "heldout")
    if not prompts:
        raise DraftheadError(f"{run.answers}: no held-out answers; raise prompts.heldout")
    return spread(prompts, limit)


def many_prompts(run: RunDir, limit: int | None) -> list[Prompt]:
    """The held-out prompts of a run, and training prompts after them if ``limit`` asks for more.

    Raises:
        DraftheadError: no answers, or none held out.
    """
    heldout = heldout_prompts(run, limit)
    if limit is None or len(heldout) >= limit:
        return heldout
    return heldout + spread(_answered(run, "train"), limit - len(heldout))


def timed_prompts(recipe: Recipe, run: RunDir, target: Target, console: Console) -> list[Prompt]:
    """What bench times: the recipe's own sets, as many prompts of each, else the held-out ones.

    Raises:
        DraftheadError: as ``own_prompts``, or a held-out prompt leaves no room for a token.
    """
    section = recipe.bench
    if section.sources is not None:
        template = recipe_template(recipe, target, run.began("generate"))
        prompts, counts = own_prompts(recipe, target, template)
        for note in [note for source in counts for note in source.notes()]:
            console.print(f"[yellow]{escape(note)}[/yellow]", soft_wrap=True)
        return prompts
    longest = longest_sequence(recipe, target)
    heldout = heldout_prompts(run, section.prompts)
    for prompt in heldout:
        if len(prompt.ids) >= longest:
            raise DraftheadError(
                f"engine.max_model_len: {longest}, but the held-out prompt of "
                f"{prompt.conversation} has {len(prompt.ids)} tokens; set it to the value that "
                "the answers were generated with"
            )
    return heldout


def own_prompts(
    recipe: Recipe, target: Target, template: Template
) -> tuple[list[Prompt], list[SourceCounts]]:
    """The prompts of ``bench.sources``, as many of each, and what each source gave.

    Of a conversation of several turns the first is asked.

    Raises:
        DraftheadError: a source cannot be read, or none of its prompts leaves room for an answer.
    """
    section = recipe.bench
    sources = section.sources or []
    longest = longest_sequence(recipe, target)
    answer = max(section.max_new_tokens)
    prompts, counts = [], []
    for source in sources:
        # Each by itself: a prompt that two sources share is timed in both.
        chats, given = read_chats([source], template)
        counts += given
        fitting = []
        for chat in chats:
            ids, _ = template.encode(chat.opening)
            if len(ids) + answer <= longest:
                fitting.append(Prompt(list(ids), chat.id, chat.source))
            else:
                given[0].leave_out(f"no room for {answer} tokens within {longest}", chat.where)
        if not fitting:
            raise DraftheadError(
                f"bench.sources: {source.path or source.dataset}: none of its prompts leaves room "
                f"for {answer} tokens within {longest}"
            )
        prompts += spread(fitting, -(-section.prompts // len(sources)))
    return prompts, counts
