"""What a prediction beside served figures may be over: the text that is served, or none."""

from drafthead.prove.bench import grid
from drafthead.prove.prediction import Rehearsal, predicted_over_served
from drafthead.recipe import parse_recipe
from drafthead.rundir import RunDir


def _recipe(**sections):
    base = {
        "name": "r",
        "target": {"path": "somewhere"},
        "prompts": {"sources": [{"path": "prompts.jsonl"}]},
        "generate": {"max_new_tokens": 64},
        "bench": {"max_new_tokens": 64},
    }
    return parse_recipe(base | sections, "recipe")


def test_no_prediction_over_other_text(tmp_path):
    run = RunDir(tmp_path)
    run.states.mkdir()
    (run.states / "meta.json").write_text("{}")
    for recipe in (
        _recipe(generate={"max_new_tokens": 64, "temperature": 0.7}),
        _recipe(generate={"max_new_tokens": 63}),
        _recipe(bench={"max_new_tokens": 64, "temperature": [0.5]}),
    ):
        assert predicted_over_served(Rehearsal(recipe, run, None, grid(recipe)[0])) is None


def test_no_prediction_without_states(tmp_path):
    recipe = _recipe()
    assert predicted_over_served(Rehearsal(recipe, RunDir(tmp_path), None, grid(recipe)[0])) is None
