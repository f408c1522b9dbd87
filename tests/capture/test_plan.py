"""What is looked at before an engine is started."""

import io
import json
import shutil

import pytest
from rich.console import Console

from drafthead.capture import stages
from drafthead.capture.plan import make_plan
from drafthead.errors import DraftheadError
from drafthead.recipe import parse_recipe
from drafthead.rundir import RunDir
from tests.vllm.runs import recipe_for

REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{{ messages[0]['content'] }}"
)


@pytest.mark.parametrize("system", ["Be brief.", ""])
def test_a_template_that_takes_no_system_message_is_told_before_the_first_answer(
    llama, tmp_path, system
):
    shutil.copytree(llama, tmp_path / "target")
    (tmp_path / "target" / "chat_template.jinja").write_text(REFUSING)
    recipe = parse_recipe(recipe_for(tmp_path / "target", tmp_path, 20, 4), "test")
    make_plan(recipe)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hello"}]
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(DraftheadError, match=r"refuses.*'system', 'user'.*not supported"):
        make_plan(recipe)


def test_records_that_cannot_be_asked_are_told_of_before_the_first_answer(
    llama, tmp_path, monkeypatch
):
    recipe = parse_recipe(recipe_for(llama, tmp_path, 20, 4), "test")
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "tool", "content": "x"}]}\n' * 7)
    console = Console(file=io.StringIO())

    def starts(*_):
        assert "left out 7 records: tools, images or other roles" in console.file.getvalue()
        raise DraftheadError("engine")

    monkeypatch.setattr(stages, "_in_child", starts)
    with pytest.raises(DraftheadError, match="engine"):
        stages.generate(recipe, RunDir(tmp_path / "run"), console=console)
