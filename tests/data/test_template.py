"""The loss mask, right to the token, for templates as real models have them."""

import shutil
from datetime import datetime, timedelta

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from drafthead.data.template import Template, TemplateRefused, given_template, recipe_template
from drafthead.recipe import parse_recipe
from drafthead.targets import load_target
from tests import templates
from tests.refused import refused

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
# As LFM2.5's: generation markers, and the thinking of past turns stripped.
LFM25 = """{{- bos_token -}}
{%- set ns = namespace(last_user=-1) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- set content = message['content'] -%}
    {%- if loop.index0 < ns.last_user and '</think>' in content -%}
      {%- set content = content.split('</think>')[-1] | trim -%}
    {%- endif -%}
    {%- generation -%}{{- content + '<|im_end|>' -}}{%- endgeneration -%}
  {%- else -%}
    {{- message['content'] + '<|im_end|>' -}}
  {%- endif -%}
  {{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
MARKS = ("{%- generation -%}", "{%- endgeneration -%}")
LFM25_UNMARKED = LFM25.replace(MARKS[0], "").replace(MARKS[1], "")
LFM25_END_OUTSIDE = LFM25.replace(
    "content + '<|im_end|>' -}}{%- endgeneration -%}",
    "content -}}{%- endgeneration -%}{{- '<|im_end|>' -}}",
)

HISTORY = [
    {"role": "user", "content": "Say hello to the world, please."},
    {
        "role": "assistant",
        "content": "<think>\nThey want a greeting.\n</think>\n\nHello, world! é🙂",
    },
    {"role": "user", "content": "Hello, world! again"},
    {"role": "assistant", "content": "Hello, world!"},
    {"role": "user", "content": "And now?"},
]


def tokenizer(template):
    """Byte-level BPE with a few merges, so that tokens cross what a template joins."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("H", "e"), ("l", "l"), ("He", "ll"), ("Hell", "o"), ("Ċ", "Ċ"), ("Ġ", "w")]
    vocab = {t: i for i, t in enumerate([*alphabet, *(a + b for a, b in merges)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|im_start|>", "<|im_end|>"]
    special += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special += ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=special[0], additional_special_tokens=special[1:]
    )
    fast.chat_template = template
    return fast


def template(text):
    fast = tokenizer(text)
    ends = [fast.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|eot_id|>", "<|return|>")]
    return Template(fast, ends, "there")


def written(found, messages):
    """What the mask says the target wrote: the text of each run of marked tokens."""
    ids, mask = found.encode(messages)
    edges = np.flatnonzero(np.diff(np.r_[0, mask.astype(int), 0]))
    runs = [found.tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]
    return runs, ids, mask


@pytest.mark.parametrize(
    ("text", "first", "end"),
    [
        (CHATML, HISTORY[1]["content"], "<|im_end|>"),
        (LLAMA3, HISTORY[1]["content"], "<|eot_id|>"),
        (LFM25, "Hello, world! é🙂", "<|im_end|>"),
        (LFM25_UNMARKED, "Hello, world! é🙂", "<|im_end|>"),
        (LFM25_END_OUTSIDE, "Hello, world! é🙂", "<|im_end|>"),
        # The target wrote <|return|> there, and the template writes <|end|>.
        (templates.HARMONY, HISTORY[1]["content"], ""),
    ],
    ids=["chatml", "llama3", "lfm2.5", "lfm2.5 unmarked", "lfm2.5 end outside", "harmony"],
)
def test_mask_covers_each_answer_and_its_end_token_and_nothing_else(text, first, end):
    found = template(text)
    runs, ids, mask = written(found, HISTORY)
    assert runs == [first + end, "Hello, world!" + end]
    rendered = found.tokenizer.apply_chat_template(
        HISTORY, add_generation_prompt=True, return_dict=False
    )
    assert ids == rendered
    assert not mask[-1]


def test_a_first_token_that_begins_with_the_templates_space_is_the_answers():
    text = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    user = {"role": "user", "content": "Who?"}
    runs, _, _ = written(template(text), [user, {"role": "assistant", "content": "who"}, user])
    assert runs == [" who"]


def test_markers_are_found_however_they_trim():
    for mark in ("{%generation%}", "{% generation -%}", MARKS[0], "{%- generation %}"):
        assert template(LFM25.replace(MARKS[0], mark)).marks_generation
    assert not template(LFM25_UNMARKED).marks_generation


def test_derived_mask_equals_the_markers():
    for messages in (HISTORY, HISTORY[:3], HISTORY[2:]):
        a, b = (written(template(text), messages) for text in (LFM25, LFM25_UNMARKED))
        assert a[1] == b[1]
        assert np.array_equal(a[2], b[2])


def test_no_answers_no_mask():
    ids, mask = template(CHATML).encode(HISTORY[:1])
    assert not mask.any()
    assert len(mask) == len(ids)


def test_an_answer_that_quotes_the_template_is_still_whole():
    quoting = "write <|im_end|>\n<|im_start|>user\nlike this"
    messages = [
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": quoting},
        {"role": "user", "content": "Thanks"},
    ]
    runs, _, mask = written(template(CHATML), messages)
    assert "".join(runs) == quoting + "<|im_end|>"
    assert mask.sum() > 10


def test_answer_text_keeps_thinking_and_drops_the_end_token():
    found = template(LFM25)
    ids = found.tokenizer("<think>\nx\n</think>\n\nHello<|im_end|>", add_special_tokens=False)
    assert found.answer_text(ids["input_ids"]) == "<think>\nx\n</think>\n\nHello"


def test_a_tokenizer_without_offsets_takes_single_turns():
    """One written in Python, as some models bring along."""

    class Slow(PreTrainedTokenizer):
        vocab_size = 256

        def get_vocab(self):
            return {chr(i): i for i in range(256)}

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return ord(token) % 256

        def _convert_id_to_token(self, index):
            return chr(index)

    slow = Slow()
    slow.chat_template = CHATML
    found = Template(slow, [1], "there")
    assert len(found.encode(HISTORY[:1])[0]) > 10
    with refused("there", "tokenizer"):
        found.encode(HISTORY[:3])


def test_no_template_and_templates_that_refuse_or_rewrite():
    with refused("there", "target.chat_template"):
        template(None)
    refusing = template("{{ raise_exception('no system role') }}")
    with refused("there", "no system role"):
        refusing.encode(HISTORY)
    shouting = CHATML.replace("message['content'] +", "message['content'] | upper +")
    with refused("there", "{% generation %}"):
        template(shouting).encode(HISTORY)
    dropping = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with refused(field="target.chat_template"):
        template(dropping).encode(HISTORY)


def test_the_tokenizers_own_end_token_ends_an_answer_though_no_configuration_names_it():
    """vLLM stops at it. Kept in the history, the template's own would stand there a second time."""
    fast = tokenizer(CHATML)
    fast.eos_token = "<|im_end|>"
    found = Template(fast, [fast.convert_tokens_to_ids("<|eot_id|>")], "there")
    assert found.answer_text(fast("Hello<|im_end|>")["input_ids"]) == "Hello"
    runs, _, _ = written(found, HISTORY[2:])
    assert runs == ["Hello, world!<|im_end|>"]


ASKED = [{"role": "user", "content": "Who?"}]


def made(text, **options):
    return Template(tokenizer(None), [1], "there", text=text, **options)


def test_content_is_given_in_parts_where_the_template_loops_over_it():
    found = made(templates.PARTS)
    assert found.takes_parts
    assert "user\nWho?<" in found.render(ASKED, prompt=True)
    system = [{"role": "system", "content": "Be brief."}, *ASKED]
    text = made(templates.SYSTEM_FIRST_PART).render(system, prompt=True)
    assert "system\nBe brief.<" in text
    assert "user\nWho?<" in text


@pytest.mark.parametrize("said", ["user", "What does the fox say, and to whom?"])
def test_a_prompt_without_the_users_words_is_refused(said):
    """Also if they stand there by chance: a role's name is a user's word, too."""
    dropping = made("{% for m in messages %}<|im_start|>{{ m.role }}\n<|im_end|>{% endfor %}")
    with refused("target.chat_template", error=TemplateRefused):
        dropping.encode([{"role": "user", "content": said}])
    first_only = made("{{ messages[0].content }}")
    with pytest.raises(TemplateRefused):
        first_only.encode([{"role": "user", "content": "Who?"}, {"role": "user", "content": said}])
    for rewrites in ("upper", "tojson", "trim", "replace(' ', '')"):
        made(f"{{{{ messages[0].content | {rewrites} }}}}").encode(
            [{"role": "user", "content": f" {said} "}]
        )


def test_markers_of_a_prompt_that_is_another_one_each_time_tell_nothing():
    found = made(templates.KEEPS_THINKING + 2 * "{{ range(100000) | random }}")
    with refused("target.chat_template"):
        found.encode(HISTORY)


def test_a_template_reads_the_time_that_it_is_given():
    found = made(templates.DATED, now=datetime(2026, 2, 3))
    assert "03 Feb 2026" in found.render(ASKED, prompt=True)
    assert "04 Feb 2026" in found.at(datetime(2026, 2, 4)).render(ASKED, prompt=True)
    assert found.changes_within(timedelta(days=1), ASKED)
    assert not found.changes_within(timedelta(hours=1), ASKED)
    fixed = made(templates.DATED, arguments={"date": "26 Jul 2024"})
    assert "26 Jul 2024" in fixed.render(ASKED, prompt=True)
    assert not fixed.changes_within(timedelta(days=1), ASKED)


def test_arguments_of_a_template():
    on, off = (
        made(templates.THINKING_OFF, arguments=arguments)
        for arguments in (None, {"enable_thinking": False})
    )
    assert (
        off.render(ASKED, prompt=True) == on.render(ASKED, prompt=True) + "<think>\n\n</think>\n\n"
    )
    assert off.closes_thinking()
    assert not on.closes_thinking()
    for name in ("enable_thinkng", "messages", "tools", "add_generation_prompt", "tokenize"):
        with refused("target.chat_template_kwargs", name):
            made(templates.THINKING_OFF, arguments={name: False})


def test_of_several_templates_the_default_is_taken():
    fast = tokenizer({"default": CHATML, "tool_use": LLAMA3})
    assert Template(fast, [1], "there").text == CHATML
    fast.chat_template = {"tool_use": CHATML}
    with refused("target.chat_template"):
        Template(fast, [1], "there")


def test_no_jinja():
    with refused("there"):
        made("{% for m in messages %}")


def test_spaces_before_punctuation_stay_in_an_answer():
    """As in vLLM: some tokenizers ask transformers to take them out."""
    fast = tokenizer(CHATML)
    fast.clean_up_tokenization_spaces = True
    ids = fast("Hello , world ! it 's", add_special_tokens=False)["input_ids"]
    assert Template(fast, [1], "there").answer_text(ids) == "Hello , world ! it 's"


def named(folder, **target):
    return parse_recipe(
        {
            "name": "r",
            "target": {"path": str(folder), **target},
            "prompts": {"sources": [{"path": "p.jsonl"}]},
        },
        "test",
    )


def test_a_recipe_names_a_template_by_file_or_text(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jinja").write_text(templates.THINKING_OFF)
    target = load_target(llama)
    assert recipe_template(named(llama), target).text == target.chat_template
    off = {"enable_thinking": False}
    for given in ("own.jinja", templates.THINKING_OFF):
        found = recipe_template(named(llama, chat_template=given, chat_template_kwargs=off), target)
        assert found.text == templates.THINKING_OFF
        assert found.closes_thinking()
    for wrong in ("other.jinja", ".", "own\0jinja"):
        with refused("target.chat_template"):
            given_template(named(llama, chat_template=wrong))


def test_a_base_model_has_no_template(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    target = load_target(base)
    assert target.chat_template is None
    with refused("target.chat_template"):
        recipe_template(named(base), target)
    assert recipe_template(named(base, chat_template=CHATML), target).text == CHATML
