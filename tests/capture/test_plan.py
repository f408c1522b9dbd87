"""What is looked at before an engine is started."""

import io
import json
import shutil

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from drafthead.capture import stages
from drafthead.capture.engine import Written
from drafthead.capture.generate import answer_unit, answers_in, generate_units
from drafthead.capture.plan import make_plan
from drafthead.data.answers import Answer, write_part
from drafthead.data.chats import load_chats
from drafthead.errors import DraftheadError
from drafthead.fsio import write_json
from drafthead.recipe import parse_recipe
from drafthead.rundir import RunDir
from tests import templates
from tests.refused import refused
from tests.vllm.runs import recipe_for

REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
)


@pytest.mark.parametrize("system", ["Be brief.", ""])
def test_what_the_template_refuses_is_left_out_unless_it_is_most(llama, tmp_path, system):
    """One such record in a hundred stopped the run, which named neither it nor how many."""
    shutil.copytree(llama, tmp_path / "target")
    (tmp_path / "target" / "chat_template.jinja").write_text(REFUSING)
    recipe = parse_recipe(recipe_for(tmp_path / "target", tmp_path, 20, 4), "test")
    make_plan(recipe)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hello"}]
    prompts = tmp_path / "prompts.jsonl"
    with prompts.open("a") as file:
        file.write(json.dumps({"messages": messages}) + "\n")
    plan = make_plan(recipe)
    assert sum(map(len, plan.units)) == 20
    ((reason, left_out),) = plan.sources[0].left_out.items()
    assert "template" in reason
    assert left_out.count == 1
    assert f"{prompts}, line 21" in left_out.examples[0]
    with prompts.open("a") as file:
        for number in range(25):
            changed = [messages[0], {"role": "user", "content": f"Hello {number}"}]
            file.write(json.dumps({"messages": changed}) + "\n")
    with refused("26 of 46", "line 21"):
        make_plan(recipe)


def test_a_later_turn_that_the_template_refuses_leaves_the_conversation_out(llama, tmp_path):
    """Mistral's and Gemma's templates take no two user messages in a row."""
    shutil.copytree(llama, tmp_path / "target")
    template = tmp_path / "target" / "chat_template.jinja"
    alternating = (
        "{% for m in messages %}{% if not loop.first and m['role'] == loop.previtem['role'] %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
    )
    template.write_text(alternating + template.read_text())
    recipe = parse_recipe(recipe_for(tmp_path / "target", tmp_path, 20, 4), "test")
    user, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "x"}
    with (tmp_path / "prompts.jsonl").open("a") as file:
        for number, messages in enumerate([[user, user], [user, answer, user, user]]):
            first = {"role": "user", "content": f"first {number}"}
            file.write(json.dumps({"messages": [first, answer, *messages]}) + "\n")
        file.write(json.dumps({"messages": [user, answer, user]}) + "\n")
    plan = make_plan(recipe)
    assert sum(map(len, plan.units)) == 21
    (left_out,) = plan.sources[0].left_out.values()
    assert [f"line {n}" in left_out.examples[n - 21] for n in (21, 22)] == [True, True]


@pytest.mark.parametrize(("side", "long", "short"), [("heldout", 1, 3), ("train", 3, 1)])
def test_a_side_without_room_is_told_before_the_first_answer(llama, tmp_path, side, long, short):
    """That no held-out prompt fits the model was found after hours of answers."""
    sections = recipe_for(llama, tmp_path, 12, 4)
    texts = [f"{i} " + "word " * 300 for i in range(long)] + [f"short {i}" for i in range(short)]
    lines = (json.dumps({"prompt": text}) + "\n" for text in texts)
    (tmp_path / "prompts.jsonl").write_text("".join(lines))

    def recipe(seed):
        prompts = sections["prompts"] | {"heldout": 1, "seed": seed}
        return parse_recipe(sections | {"prompts": prompts}, "test")

    def all_long(seed):
        chats = getattr(load_chats(recipe(seed).prompts), side)
        return all(len(chat.turns[0][0]) > 300 for chat in chats)

    with refused("engine.max_model_len", 256):
        make_plan(recipe(next(filter(all_long, range(99)))))


def test_a_template_that_hides_earlier_answers_is_told_before_the_first_one(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "target")
    shouting = "{% for m in messages %}<|im_start|>{{ m['content'] | upper }}{% endfor %}"
    (tmp_path / "target" / "chat_template.jinja").write_text(shouting)
    with refused("{% generation %}"):
        make_plan(parse_recipe(recipe_for(tmp_path / "target", tmp_path), "test"))


class Engine:
    """Answers the first prompt of each batch with an end token alone, the others in words."""

    def __init__(self, plan):
        self.words = plan.template.tokenizer("the city")["input_ids"]
        self.end = plan.target.eos_token_ids[0]

    def generate(self, prompts, seeds, progress):
        words = [[] if i == 0 else self.words for i in range(len(prompts))]
        return [
            Written(1000 * len(prompts) + i, [*w, self.end], "stop") for i, w in enumerate(words)
        ]


def test_user_messages_in_a_row_are_asked_together(llama, tmp_path):
    """They were two turns, with an answer of the target's between them."""
    recipe = parse_recipe(recipe_for(llama, tmp_path, 8, 4), "test")
    first, then, last = ({"role": "user", "content": text} for text in ("Hello", "Well?", "Bye"))
    answer = {"role": "assistant", "content": "x"}
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"messages": [first, then, answer, last]}) + "\n")
    plan = make_plan(recipe)
    pairs = [pair for unit in plan.units for pair in unit if pair[0].where.endswith("line 9")]
    plain = [pair for unit in plan.units for pair in unit if len(pair[0].turns) == 1]
    *_, asked = answer_unit(plan, Engine(plan), [plain[0], *pairs]).answers
    said = {"role": "assistant", "content": "the city"}
    assert asked.prompt_ids.tolist() == plan.template.encode([first, then, said, last])[0]


def test_a_conversation_ends_at_the_answer_that_its_template_refuses(llama, tmp_path):
    """Mistral's newer templates raise on an empty answer: the run ended there, each time again."""
    shutil.copytree(llama, tmp_path / "target")
    picky = (
        "{% if message['role'] == 'assistant' and not message['content'] %}"
        "{{ raise_exception('no content') }}{% endif %}<|im_start|>"
    )
    template = tmp_path / "target" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", picky, 1))
    plan = make_plan(parse_recipe(recipe_for(tmp_path / "target", tmp_path), "test"))
    asked = [pair for unit in plan.units for pair in unit if len(pair[0].turns) > 1]
    unit = answer_unit(plan, Engine(plan), asked)
    ended, *others = unit.answers
    assert ended.answer_ids.tolist() == list(plan.target.eos_token_ids)
    assert ended.prompt_ids.tolist() == plan.template.encode(asked[0][0].opening)[0]
    assert not ended.prompt_mask.any()
    assert all(answer.prompt_mask.any() for answer in others)
    assert len(others) == len(asked) - 1
    assert [wanted.key // 1000 for wanted in unit.wanted] == [len(asked)] + [len(others)] * len(
        others
    )
    ((reason, names),) = unit.left_out.items()
    assert "template refuses" in reason
    assert names == [asked[0][0].id]


@pytest.mark.parametrize("key", [{"location": "file:///there"}, {"workers": 2}])
def test_work_meant_for_a_cluster_is_not_done_here(llama, tmp_path, monkeypatch, key):
    """Terabytes meant for a bucket went to this disk; with --ray forgotten at `capture` every
    state was computed a second time."""
    monkeypatch.setattr(stages, "_in_child", pytest.fail)
    recipe = parse_recipe(recipe_for(llama, tmp_path, 8, 4, cluster=key), "test")
    with refused("cluster.address", "--ray"):
        stages.generate(recipe, RunDir(tmp_path / "run"), console=Console(quiet=True))


def test_answers_to_other_prompts_are_not_taken_for_these(llama, tmp_path):
    """A data set on the hub may have changed, and answers can be copied from run to run."""
    sections = recipe_for(llama, tmp_path, 8, 4, capture={"mode": "prefill"})
    plan = make_plan(parse_recipe(sections, "test"))
    run = RunDir(tmp_path / "run")
    for number, unit in enumerate(plan.units):
        found = [
            Answer(c.id, "s", side, np.ones(3), np.zeros(3, bool), np.ones(2), "stop", "x")
            for c, side in unit
        ]
        write_part(run.answers, number, found, {})
    assert stages.generate(plan.recipe, run, console=Console(quiet=True))["conversations"] == 8
    (tmp_path / "new.jsonl").write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(8)))
    for prompts in ({"seed": 1}, {"sources": [{"path": str(tmp_path / "new.jsonl")}]}):
        other = parse_recipe(sections | {"prompts": sections["prompts"] | prompts}, "test")
        with refused(run.answers):
            stages.generate(other, run, console=Console(quiet=True))


def test_turns_that_might_not_fit_are_told_of(llama, tmp_path):
    """With long answers allowed for, all but the first turns may go unasked."""
    plans = [
        make_plan(parse_recipe(recipe_for(llama, tmp_path, generate={"max_new_tokens": n}), "test"))
        for n in (24, 200)
    ]
    several = {chat.id for unit in plans[0].units for chat, _ in unit if len(chat.turns) > 1}
    roomy, tight = (
        answer_unit(plan, Engine(plan), [pair for unit in plan.units for pair in unit])
        for plan in plans
    )
    assert roomy.left_out == {}
    ((reason, names),) = tight.left_out.items()
    assert "engine.max_model_len" in reason
    assert set(names) == several


def test_records_that_cannot_be_asked_are_told_of_before_the_first_answer(
    llama, tmp_path, monkeypatch
):
    recipe = parse_recipe(recipe_for(llama, tmp_path, 20, 4), "test")
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "tool", "content": "x"}]}\n' * 7)
    console = Console(file=io.StringIO())

    def starts(*_):
        assert "left out 7 records: tools (line 21, line 22, line 23, …)" in console.file.getvalue()
        raise DraftheadError("engine")

    monkeypatch.setattr(stages, "_in_child", starts)
    with pytest.raises(DraftheadError, match="engine"):
        stages.generate(recipe, RunDir(tmp_path / "run"), console=console)


class Child:
    """A stage's process of which only the messages are known."""

    def __init__(self, messages):
        self.messages = lambda: iter(messages)

    def close(self):
        pass


def test_a_stage_that_goes_on_counts_from_what_is_done(llama, tmp_path, monkeypatch):
    plan = make_plan(parse_recipe(recipe_for(llama, tmp_path), "test"))
    run, console = RunDir(tmp_path / "run"), Console(file=io.StringIO())
    write_part(run.answers, 0, [], {})
    turns = [sum(len(chat.turns) for chat, _ in unit) for unit in plan.units]
    messages = [{"ready": True}, {"answers": 1, "tokens": 7}, {"unit": 1}, {"doing": "ending"}]
    monkeypatch.setattr(stages, "Child", lambda *_: Child(messages))
    stages._in_child("generate", plan, run, console)
    first, *_, last = console.file.getvalue().splitlines()
    assert f"{turns[0]} of {sum(turns)} answers" in first
    assert f"{turns[0] + 1} of {sum(turns)} answers" in last
    assert "ending" in last


def test_answers_that_are_left_out_are_counted_too(llama, tmp_path):
    """Else what is left would grow by them, and the bar end short of its end."""
    settings = recipe_for(llama, tmp_path, generate={"max_new_tokens": 200})
    plan, reports = make_plan(parse_recipe(settings, "test")), []

    class Counting(Engine):
        def generate(self, prompts, seeds, progress):
            written = super().generate(prompts, seeds, progress)
            for answer in written:
                progress(len(answer.ids))
            return written

        def close(self):
            pass

    units = range(len(plan.units))
    generate_units(plan, tmp_path / "a", None, units, lambda: Counting(plan), reports.append)
    answers = [report["answers"] for report in reports if "answers" in report]
    assert sum(answers) == answers_in("generate", plan, units) > len(answers)


def test_a_conversation_ends_at_an_answer_that_is_all_thinking(llama, tmp_path):
    """Its client got no content to send back, so it asks no further."""
    shutil.copytree(llama, tmp_path / "target")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(tmp_path / "target")
    # As long as vLLM's parser is told by name, the template need not show any thinking.
    sections = recipe_for(tmp_path / "target", tmp_path)
    sections["engine"]["extra"] = {"reasoning_parser": "deepseek_r1"}
    plan = make_plan(parse_recipe(sections, "test"))
    two_turns = [pair for unit in plan.units for pair in unit if len(pair[0].turns) == 2][:2]

    class Thinks(Engine):
        def generate(self, prompts, seeds, progress):
            texts = ["<think>the city", "<think>the</think>the city"][: len(prompts)]
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            return [Written(key, [*i, self.end], "stop") for key, i in enumerate(ids)]

    unit = answer_unit(plan, Thinks(plan), two_turns)
    ((_, ended),) = unit.left_out.items()
    assert ended == [two_turns[0][0].id]
    shown = tokenizer.decode(unit.answers[1].prompt_ids)
    assert "assistant\nthe city<|im_end|>" in shown
    assert "think" not in shown


def test_a_resumed_run_asks_as_on_its_first_day(llama, tmp_path, monkeypatch):
    shutil.copytree(llama, tmp_path / "target")
    (tmp_path / "target" / "chat_template.jinja").write_text(templates.DATED)
    recipe = parse_recipe(recipe_for(tmp_path / "target", tmp_path), "test")
    run = RunDir(tmp_path / "run")
    write_json(run.record("generate", "begun"), {"began": "2026-02-03T04:05:06"})
    asked = []

    class Child:
        def __init__(self, stage, module, order, log):
            monkeypatch.setattr(stages, "work", lambda _, plan, *rest: asked.append(plan))
            stages._child(order, None)
            raise DraftheadError("asked")

    monkeypatch.setattr(stages, "Child", Child)
    with pytest.raises(DraftheadError, match="asked"):
        stages.generate(recipe, run, console=Console(quiet=True))
    (plan,) = asked
    chat, _ = plan.units[0][0]
    assert "03 Feb 2026" in plan.template.render(chat.opening, prompt=True)
