"""What is looked at before an engine is started."""

import json
import shutil

import pytest

from drafthead.capture.plan import make_plan
from drafthead.errors import DraftheadError
from drafthead.recipe import parse_recipe
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
