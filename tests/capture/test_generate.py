"""Units of answers and states, with a stand-in for the engine: killed, left out, refused."""

import json

import pytest
import torch

from drafthead.capture.checks import NOT_FINITE
from drafthead.capture.engine import Written
from drafthead.capture.generate import answer_unit, generate_units, prefill_units
from drafthead.capture.plan import make_plan
from drafthead.data.answers import part_path, pending_path, read_answers, read_left_out
from drafthead.recipe import parse_recipe
from drafthead.rundir import RunDir
from drafthead.states import Sample, StateReader
from drafthead.states.index import unit_path
from drafthead.states.writer import open_store, write_unit
from tests.refused import refused
from tests.vllm.runs import WORDS, recipe_for


class Killed(BaseException):
    """As a kill: nothing handles it."""


class Engine:
    """Answers in `length` tokens, and writes the states of a unit before `save` returns."""

    def __init__(self, plan, states, *, length=3, unusable=(), killed_in=None):
        self.plan, self.states, self.length = plan, states, length
        self.unusable, self.killed_in = unusable, killed_in
        self.asked, self.saved, self.keys = 0, [], 0

    def generate(self, prompts, seeds, progress):
        self.asked += len(prompts)
        first, self.keys = self.keys, self.keys + len(prompts)
        words = self.plan.template.tokenizer("the city on the river")["input_ids"]
        words = [*words[: self.length - 1], *self.plan.target.eos_token_ids]
        return [Written(key, words, "stop") for key in range(first, self.keys)]

    def prefill(self, sequences, progress):
        return list(range(len(sequences)))

    def save(self, number, wanted):
        if number == self.killed_in:
            raise Killed
        meta = self.plan.meta
        left_out = [w.conversation for w in wanted if w.conversation in self.unusable]
        samples = [
            Sample(
                torch.ones(w.prompt_len + 1, dtype=torch.int32),
                torch.ones(w.prompt_len + 1, dtype=torch.bool),
                torch.ones(w.prompt_len, len(meta.layers), meta.hidden_size),
                len(meta.aux_layers),
                w.prompt_len,
                w.conversation,
                w.split,
            )
            for w in wanted
            if w.conversation not in self.unusable
        ]
        checks = {"samples": len(samples)} | (
            {"left_out": {NOT_FINITE: left_out}} if left_out else {}
        )
        write_unit(self.states, meta, number, samples, checks, 1 << 30)
        self.saved.append(number)

    def flush(self):
        pass

    def close(self):
        pass


@pytest.fixture
def run(llama, tmp_path):
    """A plan of 6 units of 8 conversations, and its run's folder."""
    sections = recipe_for(llama, tmp_path, 48, 8)
    plan, run = make_plan(parse_recipe(sections, "test")), RunDir(tmp_path / "t")
    open_store(run.states, plan.meta)
    return plan, run


def generate(plan, run, engine):
    units = range(len(plan.units))
    generate_units(plan, run.answers, run.states, units, lambda: engine, lambda _: None)


def conversations(plan, units):
    return [chat.id for number in units for chat, _ in plan.units[number]]


def test_a_kill_loses_the_unit_in_flight_only(run):
    """The answers of a unit were written when the next one ended: a kill before lost two."""
    plan, run = run
    with pytest.raises(Killed):
        generate(plan, run, Engine(plan, run.states, killed_in=3))
    written = [n for n in range(6) if unit_path(run.states, n).exists()]
    assert written == [0, 1, 2]
    index = unit_path(run.states, 2).stat().st_mtime_ns
    pending = part_path(run.answers, 2)
    pending.replace(pending_path(run.answers, 2))  # as if killed before the answers counted
    engine = Engine(plan, run.states)
    generate(plan, run, engine)
    assert engine.saved == [3, 4, 5]
    assert unit_path(run.states, 2).stat().st_mtime_ns == index
    names = [answer.conversation for answer in read_answers(run.answers)]
    assert names == conversations(plan, range(6))
    assert not list(run.answers.glob(".*"))


def test_an_index_without_answers_belongs_to_answers_that_were_lost(run):
    plan, run = run
    generate(plan, run, Engine(plan, run.states))
    part_path(run.answers, 2).unlink()
    engine = Engine(plan, run.states)
    generate(plan, run, engine)
    assert engine.saved == [2]


def test_a_conversation_without_usable_states_is_left_out_and_the_unit_stays(run):
    plan, run = run
    lost = conversations(plan, [1])[3]
    generate(plan, run, Engine(plan, run.states, unusable=[lost]))
    names = [answer.conversation for answer in read_answers(run.answers)]
    assert names == [name for name in conversations(plan, range(6)) if name != lost]
    assert names == StateReader(run.states).conversation.tolist()
    assert read_left_out(run.answers) == {NOT_FINITE: [lost]}


def test_too_many_conversations_without_usable_states_stop_the_run_by_name(run):
    plan, run = run
    unusable = conversations(plan, range(6))
    with refused("capture.max_unusable", "8 of 8", "prompts.jsonl, line"):
        generate(plan, run, Engine(plan, run.states, unusable=unusable))
    assert not part_path(run.answers, 0).exists()
    # The same command stops again, and no engine starts for it.
    with refused("capture.max_unusable"):
        generate(plan, run, None)
    # More may be left out from now on: what was captured counts.
    capture = plan.recipe.capture.model_copy(update={"max_unusable": 1.0})
    object.__setattr__(plan, "recipe", plan.recipe.model_copy(update={"capture": capture}))
    engine = Engine(plan, run.states, unusable=unusable)
    generate(plan, run, engine)
    assert 0 not in engine.saved
    assert list(read_answers(run.answers)) == []


def test_a_pass_of_its_own_leaves_them_out_too(run):
    plan, run = run
    generate_units(plan, run.answers, None, range(6), lambda: Engine(plan, None), lambda _: None)
    lost = conversations(plan, [1])[:1]
    engine = Engine(plan, run.states, unusable=lost)
    prefill_units(plan, run.answers, run.states, range(6), lambda: engine, lambda _: None)
    assert len(StateReader(run.states)) == 47
    for number in range(6):
        unit_path(run.states, number).unlink()
    engine = Engine(plan, run.states, unusable=conversations(plan, range(6)))
    with refused("capture.max_unusable", "8 of 8"):
        prefill_units(plan, run.answers, run.states, range(6), lambda: engine, lambda _: None)


@pytest.mark.parametrize("states", [True, False])
def test_answers_of_one_token_stop_the_run_early(run, states):
    """All stages up to training ran, and training said that prompts.heldout was too small."""
    plan, run = run
    engine = Engine(plan, run.states, length=1)
    with refused("eos_token_id"):
        folder = run.states if states else None
        generate_units(plan, run.answers, folder, range(6), lambda: engine, lambda _: None)
    assert 32 <= engine.asked < 48


def test_a_later_turn_without_room_keeps_the_earlier_ones(run, tmp_path, llama):
    """The whole conversation was dropped, though its earlier answer and states were there."""
    turns = [{"role": "user", "content": text} for text in ("Hello", WORDS * 3)]
    between = {"role": "assistant", "content": "x"}
    sections = recipe_for(llama, tmp_path, 8, 4)
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"messages": [turns[0], between, turns[1]]}) + "\n")
    plan = make_plan(parse_recipe(sections, "test"))
    pair = next(p for unit in plan.units for p in unit if p[0].turns[0] == ("Hello",))
    # The template adds more to the second turn than the estimate allows for.
    encode = plan.template.encode

    def longer(messages):
        ids, mask = encode(messages)
        return (ids, mask) if len(messages) == 1 else (ids * 99, mask)

    plan.template.encode = longer
    unit = answer_unit(plan, Engine(plan, None), [pair])
    (answer,) = unit.answers
    assert answer.prompt_ids.tolist() == encode(pair[0].opening)[0]
    assert unit.wanted[0].key == 0
    ((reason, names),) = unit.left_out.items()
    assert "engine.max_model_len" in reason
    assert names == [pair[0].id]


def test_a_prompt_with_tokens_beyond_the_vocabulary_is_left_out(run):
    """The engine looked them up past the end of the embedding, or refused them and died."""
    plan, run = run
    beyond = plan.units[0][0][0]
    encode, first = plan.template.encode, beyond.messages()

    def longer(messages):
        ids, mask = encode(messages)
        return ([*ids[:-1], plan.target.vocab_size], mask) if messages == first else (ids, mask)

    plan.template.encode = longer
    unit = answer_unit(plan, Engine(plan, None), plan.units[0])
    assert len(unit.answers) == 7
    assert list(unit.left_out.values()) == [[beyond.id]]
