"""Prompts against vLLM's own: the ids that its chat server makes of the same messages."""

import shutil

import pytest
from transformers import AutoTokenizer

from drafthead.capture.generate import History
from drafthead.data.content_format import takes_parts
from drafthead.data.template import Template
from tests.refused import refused
from tests.templates import CONTENT_FORMATS, KEEPS_THINKING, STRIPS_THINKING, TEMPLATES

SYSTEM = {"role": "system", "content": "Answer like a sailor."}
CHATS = {
    "one turn": [{"role": "user", "content": " What does the fox say? "}],
    "system": [SYSTEM, {"role": "user", "content": "Hello there"}],
    "turns": [
        SYSTEM,
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "The fox, it seems."},
        {"role": "user", "content": "Why?\n"},
    ],
}


def tree(text):
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(text).environment.parse(text)


@pytest.mark.parametrize("name", CONTENT_FORMATS)
def test_parts_where_vllm_gives_parts(name):
    from vllm.renderers.hf import _detect_content_format

    text, parts = CONTENT_FORMATS[name]
    assert takes_parts(tree(text)) is parts
    assert _detect_content_format(text, default="string") == ("openai" if parts else "string")


@pytest.fixture(scope="module")
def served(llama, tmp_path_factory):
    """Ids that vLLM's server makes of a chat request, by what lies between its HTTP and engine."""
    from vllm.config import ModelConfig, VllmConfig
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.renderers import renderer_from_config
    from vllm.renderers.hf import _CONTENT_FORMATS

    folder = shutil.copytree(llama, tmp_path_factory.mktemp("served") / "target")
    (folder / "chat_template.jinja").unlink()
    model = ModelConfig(model=str(folder), dtype="float32")
    renderer = renderer_from_config(VllmConfig(model_config=model))

    def ids(messages, text, arguments=None, own=False):
        _CONTENT_FORMATS.clear()  # kept by the folder's name, which stays the same here
        renderer.tokenizer.chat_template = text if own else None
        request = ChatCompletionRequest(messages=messages)
        defaults = {**(arguments or {}), "tools": None, "tokenize": False}
        params = request.build_chat_params(None if own else text, "auto").with_defaults(defaults)
        _, (prompt,) = renderer.render_chat(
            [request.messages], params, request.build_tok_params(model)
        )
        return prompt["prompt_token_ids"]

    ids.tokenizer = AutoTokenizer.from_pretrained(folder)
    return ids


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_the_servers(served, name, chat):
    text, arguments = TEMPLATES[name]
    found = Template(served.tokenizer, [4], "there", text=text, arguments=arguments)
    assert found.encode(CHATS[chat])[0] == served(CHATS[chat], text, arguments)


def test_of_several_templates_the_default_as_in_the_server(served):
    several = {"default": TEMPLATES["parts"][0], "tool_use": "{{ 'tools' }}"}
    served.tokenizer.chat_template = several
    found = Template(served.tokenizer, [4], "there")
    served.tokenizer.chat_template = None
    assert found.encode(CHATS["turns"])[0] == served(CHATS["turns"], several, own=True)


THINKING = "<think>\nThey ask who.\n</think>\n\nThe fox."


@pytest.mark.parametrize("parser", ["deepseek_r1", "qwen3", None])
@pytest.mark.parametrize("text", [STRIPS_THINKING, KEEPS_THINKING], ids=["strips", "keeps"])
def test_later_turns_hold_what_a_client_got(served, text, parser):
    """A client sends back what the server answered: without the thinking if it has a parser."""
    tokenizer = served.tokenizer
    tokenizer.add_tokens(["<think>", "</think>"])
    found = Template(tokenizer, [4], "there", text=text)
    ids = [*tokenizer(THINKING, add_special_tokens=False)["input_ids"], 4]
    content = History(found, parser).content(ids)
    assert content == (THINKING if parser is None else "\n\nThe fox.")
    messages = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": content},
        {"role": "user", "content": "Why?"},
    ]
    prompt, mask = found.encode(messages)
    if parser:  # else the server's tokenizer would need the tokens of thinking, too
        assert prompt == served(messages, text)
    written = tokenizer.decode([i for i, marked in zip(prompt, mask, strict=True) if marked])
    kept = parser is None and text is KEEPS_THINKING
    assert ("They ask who" in written) is kept
    assert written.endswith("The fox.<|im_end|>")


def test_an_answer_that_is_all_thinking_has_no_content(served):
    found = Template(served.tokenizer, [4], "there", text=KEEPS_THINKING)
    ids = served.tokenizer("They ask who, and", add_special_tokens=False)["input_ids"]
    assert History(found, "deepseek_r1").content(ids) is None
    assert History(found, None).content([4]) == ""


def test_a_parser_that_vllm_does_not_know(served):

    found = Template(served.tokenizer, [4], "there", text=KEEPS_THINKING)
    with refused("no_such_parser"):
        History(found, "no_such_parser").content([5])
