"""What a chat client gets of an answer from vLLM's server, and sends back with its next message."""

from collections.abc import Sequence

from drafthead.data.template import Template
from drafthead.errors import DraftheadError


class History:
    """Answers as later turns show them to the chat template.

    The server leaves out special tokens and, if it has a reasoning parser, the thinking, which chat
    clients do not send back.

    Args:
        template: the target's.
        parser: the server's ``--reasoning-parser``, None without one.
    """

    def __init__(self, template: Template, parser: str | None):
        self._template, self._parser = template, parser

    def content(self, ids: Sequence[int]) -> str | None:
        """The `content` of the server's message for an answer; None if it is all thinking.

        Raises:
            DraftheadError: vLLM's parser cannot read the answer.
        """
        if not self._parser:
            return self._template.answer_text(ids, special_tokens=False)
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.parser import ParserManager

        try:
            parser_class = ParserManager.get_parser(
                reasoning_parser_name=self._parser, is_harmony=self._parser == "openai_gptoss"
            )
            # A parser keeps a state: each answer gets its own, as each request does.
            parser = parser_class(
                self._template.tokenizer, None, chat_template_kwargs=self._template.arguments
            )
            request = parser.adjust_request(ChatCompletionRequest(messages=[]))
            text = self._template.answer_text(ids, special_tokens=not request.skip_special_tokens)
            _, content, _ = parser.parse(text, request, model_output_token_ids=list(ids))
        except Exception as error:  # parsers raise whatever they like
            raise DraftheadError(
                f"vLLM's reasoning parser {self._parser} cannot read an answer of "
                f"{self._template.where}: {error!r}"
            ) from None
        return content
