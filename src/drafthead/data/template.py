"""The target's chat template: prompts as the token ids that vLLM's server makes of them, and which
tokens the target wrote."""

import copy
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError, meta

from drafthead.data.content_format import takes_parts
from drafthead.errors import DraftheadError
from drafthead.recipe import Recipe

if TYPE_CHECKING:
    from drafthead.targets import Target

Message = dict[str, str]

_STAND_IN = "\u2983user\u2984"
_SHORT = 16
"""Characters: a shorter message may stand in a prompt by chance (`user` does)."""


class TemplateRefused(DraftheadError):
    """The chat template refuses one conversation, or does not show what its user said."""


class Template:
    """A chat template, rendered as vLLM's server renders it for a request without tools.

    Args:
        tokenizer: a fast transformers tokenizer.
        eos_token_ids: tokens that end an answer of the target; the tokenizer's own, at which vLLM
            stops too, is one of them whether named or not.
        where: the target's path, or the template's, for errors.
        text: the template; None is the tokenizer's own.
        arguments: further variables of the template (``enable_thinking``), as the server gets them
            in ``--default-chat-template-kwargs``.
        now: the time that a template reads that prints a date; None is now.

    Raises:
        DraftheadError: there is no chat template, it is no Jinja, or it does not read an argument.
    """

    def __init__(
        self,
        tokenizer: Any,
        eos_token_ids: Sequence[int],
        where: str,
        *,
        text: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ):
        self.tokenizer, self.where = tokenizer, where
        self.eos = {*eos_token_ids, tokenizer.eos_token_id} - {None}
        text = default_template(tokenizer) if text is None else text
        if text is None:
            raise DraftheadError(
                f"{where}: the target has no chat template (a base model has none), so "
                "prompts cannot be rendered. Fix: name a Jinja file under target.chat_template, or "
                "put the model's chat_template.jinja into that folder"
            )
        self.text = text
        self.arguments = dict(arguments or {})
        self.now = now or datetime.now()
        self.marks_generation = re.search(r"{%-?\s*generation\s*-?%}", text) is not None
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            tree = _compile_jinja_template(text).environment.parse(text)
        except TemplateError as error:
            raise DraftheadError(
                f"{where}: the chat template is not valid Jinja: {error}"
            ) from None
        self.takes_parts = takes_parts(tree)
        self._check_arguments(meta.find_undeclared_variables(tree))

    def _check_arguments(self, read: set[str]) -> None:
        """vLLM passes a template only what it reads, and the rest of a request by itself."""
        reserved = {"messages", *inspect.signature(self.tokenizer.apply_chat_template).parameters}
        for name in self.arguments:
            if name in reserved:
                raise DraftheadError(
                    f"target.chat_template_kwargs: {name} cannot be set in a recipe: vLLM sets it "
                    "for each request"
                )
            if name not in read:
                raise DraftheadError(
                    f"target.chat_template_kwargs: {name}: the chat template of {self.where} does "
                    f"not read it (it reads {', '.join(sorted(read - reserved)) or 'no others'})"
                )

    def at(self, now: datetime) -> "Template":
        """The same template, read at another time."""
        other = copy.copy(self)
        other.now = now
        return other

    def changes_within(self, span: timedelta, messages: Sequence[Message]) -> bool:
        """Whether the prompt of these messages is another one after that time, as it prints the
        date or the time.

        Raises:
            TemplateRefused: as :meth:`render`.
        """
        later = self.at(self.now + span)
        return self.render(messages, prompt=True) != later.render(messages, prompt=True)

    def render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """The conversation as text; with ``prompt``, ready for the target to answer.

        Raises:
            TemplateRefused: the template refuses these messages, or drops what the user said.
        """
        text = self._apply(messages, prompt, tokenize=False)
        for i in reversed(range(len(messages))):
            if messages[i]["role"] == "assistant":
                break
            content = messages[i]["content"].strip()
            if messages[i]["role"] != "user" or (content in text and len(content) >= _SHORT):
                continue
            # A template may trim or rewrite what the user said; then other words change the text.
            others = [*messages[:i], {**messages[i], "content": _STAND_IN}, *messages[i + 1 :]]
            if text == self._apply(others, prompt, tokenize=False):
                raise TemplateRefused(
                    f"{self.where}: the chat template drops the user's message, also in "
                    "vLLM's server. Fix: name another one under target.chat_template"
                )
        return text

    def _apply(self, messages: Sequence[Message], prompt: bool, **options: Any) -> Any:
        """`apply_chat_template` with what vLLM's server gives it.

        Raises:
            TemplateRefused: the template refuses these messages.
        """
        shown: Sequence[Mapping[str, Any]] = messages
        if self.takes_parts:
            shown = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            return self.tokenizer.apply_chat_template(
                list(shown),
                chat_template=self.text,
                add_generation_prompt=prompt,
                strftime_now=self.now.strftime,  # in place of transformers', which reads a clock
                **self.arguments,
                **options,
            )
        except Exception as error:  # templates raise through jinja, whatever they like
            raise TemplateRefused(
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
                    "target wrote cannot be told. Fix: prompts of a single turn"
                )
            begins, ends = np.array(encoded["offset_mapping"]).T
            if self.marks_generation:
                mask = self._marked(messages, ids)
                for i in np.flatnonzero(np.diff(begins) == 0):
                    mask[i + 1] |= mask[i]  # of several tokens of a character only the first is
            else:
                for start, stop in self._found(messages, text):
                    # The first token may begin with a space that the template writes.
                    mask |= (ends > start) & (begins < stop)
            self._with_end_tokens(ids, mask)
        return ids, mask

    def answer_text(self, ids: Sequence[int], *, special_tokens: bool = True) -> str:
        """An answer as vLLM decodes it: thinking and all, without the end token."""
        kept = list(ids)
        while kept and kept[-1] in self.eos:
            kept.pop()
        # Some tokenizers ask to take out spaces before punctuation, which vLLM does not do.
        return self.tokenizer.decode(
            kept,
            skip_special_tokens=not special_tokens,
            clean_up_tokenization_spaces=False,
        )

    def closes_thinking(self) -> bool:
        """Whether a prompt ends after a block of thinking, so that the answer has none."""
        try:
            text = self._apply([{"role": "user", "content": _STAND_IN}], True, tokenize=False)
        except TemplateRefused:
            return False
        return "</think>" in text.rpartition(_STAND_IN)[2]

    def _with_end_tokens(self, ids: list[int], mask: np.ndarray) -> None:
        """Mark the end token right after each answer: the target wrote that too, whether or not
        the template's markers include it."""
        for i in range(1, len(ids)):
            if mask[i - 1] and ids[i] in self.eos and ids[i - 1] not in self.eos:
                mask[i] = True

    def _marked(self, messages: Sequence[Message], ids: list[int]) -> np.ndarray:
        """bool [n]: the tokens between the template's generation markers."""
        encoded = self._apply(messages, True, return_dict=True, return_assistant_tokens_mask=True)
        if encoded["input_ids"] != ids:
            raise DraftheadError(
                f"{self.where}: the chat template renders a different prompt each time, so "
                "its generation markers cannot be used. Fix: name another one under "
                "target.chat_template"
            )
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
            before, stand_in, rest = rest.partition(stand_ins[i])
            if not stand_in:
                raise DraftheadError(
                    f"{self.where}: the chat template drops an earlier answer",
                    field="target.chat_template",
                )
            glue.append(before)
        glue.append(rest)
        spans = _match(text, glue, [messages[i]["content"] for i in answers])
        if spans is None:
            raise DraftheadError(
                f"{self.where}: the chat template rewrites earlier answers; which tokens the "
                "target wrote cannot be told. Fix: add {% generation %} markers to the template"
            )
        return spans


def default_template(tokenizer: Any) -> str | None:
    """The tokenizer's chat template for a request without tools; None if there is none."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def given_template(recipe: Recipe) -> str | None:
    """The text of ``target.chat_template``, read as vLLM reads ``--chat-template``: a file, or
    Jinja itself. None if the recipe names none.

    Raises:
        DraftheadError: no such file.
    """
    given = recipe.target.chat_template
    if given is None:
        return None
    try:
        with open(os.path.expanduser(given), encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and set(given) & set("{}\n"):
            return given
        raise DraftheadError(
            f"target.chat_template: {given}: cannot be read ({error}); give the path of a Jinja "
            "file, from the folder that drafthead runs in"
        ) from None


def recipe_template(recipe: Recipe, target: "Target", now: datetime | None = None) -> Template:
    """The chat template that the recipe's target is served with.

    Args:
        recipe: names the template, if it is not the target's own, and its arguments.
        target: the recipe's target.
        now: the time that a template reads that prints a date; None is now.

    Raises:
        DraftheadError: there is none, its file cannot be read, or it does not take the recipe's
            arguments.
    """
    given = given_template(recipe)
    return Template(
        target.tokenizer(),
        target.eos_token_ids,
        str(target.path) if given is None else "target.chat_template",
        text=target.chat_template if given is None else given,
        arguments=recipe.target.chat_template_kwargs,
        now=now,
    )


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
