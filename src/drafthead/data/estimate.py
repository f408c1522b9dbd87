"""How many tokens a recipe's conversations will have, estimated from a sample of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from drafthead.data.chats import Chat, Chats
from drafthead.data.template import Template

_SAMPLE = 64


@dataclass(frozen=True)
class Estimate:
    """Tokens of all conversations together."""

    conversations: int
    prompts: int
    """Without answers."""
    expected: int
    """With answers half as long as they may be."""
    most: int
    """With answers as long as they may be."""
    longest: int
    """Of the longest conversation that was looked at, with its answers as long as they may be."""


def opening_lengths(chats: Sequence[Chat], template: Template) -> list[int]:
    """Tokens before the first answer, of the first chats."""
    return [len(template.encode(chat.opening)[0]) for chat in chats[:_SAMPLE]]


def estimate(chats: Chats, template: Template, max_new_tokens: int, max_len: int) -> Estimate:
    """Estimate the tokens of a run.

    Args:
        chats: the conversations.
        template: the target's.
        max_new_tokens: longest answer.
        max_len: longest sequence, prompt and answer.
    """
    everyone = [chat for chat, _ in chats.all()]  # in an order that mixes the sources
    sample = everyone[:_SAMPLE]
    prompts = [
        opening + _later_turns(chat, opening, template)
        for chat, opening in zip(sample, opening_lengths(sample, template), strict=True)
    ]

    def lengths(answer: int) -> list[int]:
        return [
            min(max_len, prompt + answer * len(chat.turns))
            for chat, prompt in zip(sample, prompts, strict=True)
        ]

    def total(answer: int) -> int:
        return round(len(everyone) * sum(lengths(answer)) / len(sample))

    return Estimate(
        conversations=len(everyone),
        prompts=total(0),
        expected=total(max_new_tokens // 2),
        most=total(max_new_tokens),
        longest=max(lengths(max_new_tokens)),
    )


def _later_turns(chat: Chat, opening: int, template: Template) -> int:
    """Tokens of the user's messages after the first answer. ``opening``: those before it."""

    def count(text: str) -> int:
        return len(template.tokenizer(text, add_special_tokens=False)["input_ids"])

    texts = ["".join(turn) for turn in chat.turns]
    around = max(0, opening - count(texts[0]))  # what the template puts around a turn
    return sum(count(text) + around for text in texts[1:])
