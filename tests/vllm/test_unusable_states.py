"""A prompt for which the target computes NaN, among others."""

import torch

from drafthead.capture.checks import NOT_FINITE
from drafthead.capture.engine import CaptureEngine
from drafthead.capture.generate import answer_unit, generate_units
from drafthead.capture.plan import make_plan
from drafthead.data.answers import read_answers, read_left_out
from drafthead.recipe import parse_recipe
from drafthead.rundir import RunDir
from drafthead.states.writer import open_store
from tests.vllm.runs import recipe_for


def test_a_prompt_without_finite_states_is_left_out_alone(llama, tmp_path):
    """It ended the run. On a CPU its NaN went on to the sequences that got its blocks."""
    recipe = recipe_for(llama, tmp_path)
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "Zanzibar"}\n')
    plan, run = make_plan(parse_recipe(recipe, "test")), RunDir(tmp_path / "t")
    open_store(run.states, plan.meta)
    engine = CaptureEngine(plan.recipe, plan.target, plan.meta, run.states)
    close, engine.close = engine.close, lambda: None
    (token,) = plan.template.tokenizer("Z", add_special_tokens=False)["input_ids"]
    (row,) = engine.llm.apply_model(lambda model: model.model.embed_tokens.weight.data[token])
    clean = row.clone()
    row.fill_(torch.nan)  # as a row that overflows
    units = range(len(plan.units))
    generate_units(plan, run.answers, run.states, units, lambda: engine, lambda _: None)
    row.copy_(clean)
    expected = [a for unit in plan.units for a in answer_unit(plan, engine, unit).answers]
    close()
    ((reason, names),) = read_left_out(run.answers).items()
    assert reason == NOT_FINITE
    labels = [plan.labels[name] for name in names]
    assert labels == [f"{tmp_path}/prompts.jsonl, line 19: 'Zanzibar'"]
    kept = {a.conversation: a.answer_ids.tolist() for a in read_answers(run.answers)}
    assert kept == {
        a.conversation: a.answer_ids.tolist() for a in expected if a.conversation not in names
    }
