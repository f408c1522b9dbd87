"""`drafthead init`: the recipe that it writes is a good recipe, and says why."""

import json
import shutil
from pathlib import Path

import pytest

from drafthead.data.chats import load_chats
from drafthead.errors import DraftheadError
from drafthead.init import write_recipe
from drafthead.recipe import Recipe, load_recipe


def test_written_recipe_loads_and_fits_the_target(tmp_path, lfm2_moe):
    out = tmp_path / "recipe.yaml"
    found = write_recipe(str(lfm2_moe), "chats.jsonl", out)
    recipe = load_recipe(out)
    assert found["layer_kinds"] == {"conv": 4, "full_attention": 2}
    assert recipe.capture.aux_layers == [2, 3]
    assert recipe.vocab.size == 512
    assert recipe.engine.max_model_len == 512
    assert recipe.prompts.sources[0].path == "chats.jsonl"
    # What was not fitted is the default, unchanged by writing and reading.
    minimal = Recipe.model_validate(
        {
            "name": recipe.name,
            "target": {"path": str(lfm2_moe)},
            "prompts": {"sources": [{"path": "chats.jsonl"}]},
        }
    )
    assert recipe.train == minimal.train
    assert recipe.generate == minimal.generate
    text = out.read_text()
    assert "# Peak learning rate, of all weights" in text


@pytest.mark.parametrize(("prompts", "heldout"), [(2, 1), (40, 8), (500, 64)])
def test_fewer_are_held_out_of_few_prompts(tmp_path, llama, prompts, heldout):
    """64 were, of 40 too, which `doctor` then refused."""
    file, out = tmp_path / "p.jsonl", tmp_path / "recipe.yaml"
    lines = [json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(prompts)]
    file.write_text("".join(lines + lines[:1]))
    assert write_recipe(str(llama), str(file), out)["conversations"] == prompts
    section = load_recipe(out).prompts
    assert section.heldout == heldout
    assert len(load_chats(section).train) == prompts - heldout


def test_a_target_without_a_chat_template_is_told_of(tmp_path, llama, drafthead):
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    code, _, err = drafthead("init", str(base), "--out", str(tmp_path / "base.yaml"))
    assert code == 0
    assert "target.chat_template" in err
    assert not write_recipe(str(base), "chats.jsonl", tmp_path / "again.yaml")["chat_template"]
    _, _, err = drafthead("init", str(llama), "--out", str(tmp_path / "llama.yaml"))
    assert "target.chat_template" not in err


def test_existing_recipe_is_kept(tmp_path, llama):
    out = tmp_path / "recipe.yaml"
    out.write_text("mine")
    with pytest.raises(DraftheadError, match="exists already"):
        write_recipe(str(llama), "chats.jsonl", out)
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("folder", "name"), [("my model (v2)!", "my-model-v2"), (".", "here"), ("__", "run")]
)
def test_any_folder_gives_a_name_that_a_run_may_have(tmp_path, llama, monkeypatch, folder, name):
    place = tmp_path / "here"
    shutil.copytree(llama, place / folder, dirs_exist_ok=True)
    monkeypatch.chdir(place)
    write_recipe(folder, "chats.jsonl", Path("recipe.yaml"))
    assert load_recipe("recipe.yaml").name == name
