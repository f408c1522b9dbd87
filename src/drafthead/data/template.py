"""The target's chat template: prompts as token ids, and which tokens the target wrote."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from drafthead.errors import DraftheadError

Message = dict[str, str]


class Template:
    """A tokenizer's chat template.

    Args:
        tokenizer: a fast transformers tokenizer.
        eos_token_ids: tokens that end an answer of the target; the tokenizer's own, at which vLLM
            stops too, is one of them whether named or not.
        where: the target's path, for errors.

    Raises:
        DraftheadError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: Sequence[int], where: str):
        self.tokenizer, self.where = tokenizer, where
        self.eos = {*eos_token_ids, tokenizer.eos_token_id} - {None}
        if not tokenizer.chat_template:
            raise DraftheadError(
                f"{where}: the target has no chat template, so nobody knows how its prompts look. "
                "Mend: put the model's chat_template.jinja into that folder"
            )
        templates = tokenizer.chat_template
        text = templates if isinstance(templates, str) else " ".join(templates.values())
        self.marks_generation = re.search(r"{%-?\s*generation\s*-?%}", text) is not None

    def render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """The conversation as text; with ``prompt``, ready for the target to answer.

        Raises:
            DraftheadError: the template refuses these messages.
        """
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # templates raise through jinja, whatever they like
            raise DraftheadError(
                f"{self.where}: the chat template refuses a conversation of "
                f"{[m['role'] for m in messages]}: {error}"
            ) from None

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], np.ndarray]:
        """A prompt whose last message is the user's.

        Returns:
            Its token ids, and bool [n]: True where the target wrote the token, in earlier turns.
            From the template's generation markers where it has them, else found in the text.

        Raises:
            DraftheadError: the template or the tokenizer does not let them be told.
        """
        text = self.render(messages, prompt=True)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        mask = np.zeros(len(ids), bool)
        if any(message["role"] == "assistant" for message in messages):
            if "offset_mapping" not in encoded:
                raise DraftheadError(
                    f"{self.where}: the target's tokenizer is written in Python and does not say "
                    "which characters a token stands for, so which of earlier turns' tokens the "
                    "target wrote cannot be told. Mend: prompts of a single turn"
                )
            begins = np.array(encoded["offset_mapping"])[:, 0]
            if self.marks_generation:
                mask = self._marked(messages, ids)
                for i in np.flatnonzero(np.diff(begins) == 0):
                    mask[i + 1] |= mask[i]  # of several tokens of a character only the first is
            else:
                for start, stop in self._found(messages, text):
                    mask |= (begins >= start) & (begins < stop)
            self._with_end_tokens(ids, mask)
        return ids, mask

    def answer_text(self, ids: Sequence[int]) -> str:
        """An answer as a later turn's history shows it to the template: thinking and all, without
        the end token."""
        kept = list(ids)
        while kept and kept[-1] in self.eos:
            kept.pop()
        return self.tokenizer.decode(kept, skip_special_tokens=False)

    def _with_end_tokens(self, ids: list[int], mask: np.ndarray) -> None:
        """Mark the end token right after each answer: the target wrote that too, whether or not
        the template's markers include it."""
        for i in range(1, len(ids)):
            if mask[i - 1] and ids[i] in self.eos and ids[i - 1] not in self.eos:
                mask[i] = True

    def _marked(self, messages: Sequence[Message], ids: list[int]) -> np.ndarray:
        """bool [n]: the tokens between the template's generation markers."""
        encoded = self.tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert encoded["input_ids"] == ids
        return np.array(encoded["assistant_masks"], bool)

    def _found(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Character spans of the answers in ``text``, for templates without markers.

        The conversation is rendered once more with a stand-in for each answer: what stands between
        the stand-ins is the template's own. The answers are what stands there in ``text``, whole,
        trimmed, or with the thinking of past turns stripped.

        Raises:
            DraftheadError: the template rewrites answers in a way that this cannot follow.
        """
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        stand_ins = {i: f"\u2983{i}\u2984" for i in answers}
        shown = [{**m, "content": stand_ins.get(i, m["content"])} for i, m in enumerate(messages)]
        rest, glue = self.render(shown, prompt=True), []
        for i in answers:
            before, found, rest = rest.partition(stand_ins[i])
            if not found:
                raise DraftheadError(f"{self.where}: the chat template drops an earlier answer")
            glue.append(before)
        glue.append(rest)
        spans = _match(text, glue, [messages[i]["content"] for i in answers])
        if spans is None:
            raise DraftheadError(
                f"{self.where}: the chat template rewrites earlier answers; which tokens the "
                "target wrote cannot be told. Mend: add {% generation %} markers to the template"
            )
        return spans


def _match(text: str, glue: list[str], answers: list[str]) -> list[tuple[int, int]] | None:
    """Spans such that ``text`` is glue[0] + span + glue[1] + … + glue[n], each span a part of its
    answer; the first such reading, or None."""

    def rest(number: int, at: int) -> list[tuple[int, int]] | None:
        if not text.startswith(glue[number], at):
            return None
        start = at + len(glue[number])
        if number == len(answers):
            return [] if start == len(text) else None
        stop = text.find(glue[number + 1], start)
        while stop >= 0:
            # The shortest reading may end inside the answer, if that quotes the template.
            if text[start:stop] in answers[number]:
                later = rest(number + 1, stop)
                if later is not None:
                    return [(start, stop), *later]
            stop = text.find(glue[number + 1], stop + 1)
        return None

    return rest(0, 0)
