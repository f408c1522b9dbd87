"""`drafthead init`: the recipe that it writes is a good recipe, and says why."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from drafthead.data.chats import load_chats
from drafthead.data.estimate import Estimate
from drafthead.data.template import recipe_template
from drafthead.errors import DraftheadError
from drafthead.init import describe, fit_recipe, write_recipe
from drafthead.machine import Gpu, Machine
from drafthead.recipe import Recipe, load_recipe
from drafthead.targets import load_target
from tests.refused import refused

CPU = Machine("Linux", "a processor", 2, 16 << 30, (), True, None, {})
LARGE = replace(CPU, gpus=(Gpu("H100", 80 << 30),))
SMALL = replace(CPU, gpus=(Gpu("T4", 16 << 30),))
NINE = {
    *("name", "target.path", "prompts.sources", "prompts.heldout", "generate.max_new_tokens"),
    *("vocab.size", "head.kind", "train.row_tokens", "engine.max_model_len"),
}


def keys(text):
    """The keys that a recipe's text names, as `section.key`."""
    data = yaml.safe_load(text)
    return {
        f"{name}.{key}" if isinstance(value, dict) else name
        for name, value in data.items()
        for key in (value if isinstance(value, dict) else [None])
    }


def questions(path, count, words=3):
    path.write_text(
        "".join(
            json.dumps({"prompt": f"question {i}" + " word" * words}) + "\n" for i in range(count)
        )
    )
    return str(path)


def test_the_recipe_holds_the_nine_keys_that_matter_with_their_reasons(tmp_path, lfm2_moe):
    out = tmp_path / "recipe.yaml"
    prompts = questions(tmp_path / "chats.jsonl", 50)
    about = write_recipe(str(lfm2_moe), prompts, out)
    recipe, text = load_recipe(out), out.read_text()
    assert about["layer_kinds"] == {"conv": 4, "full_attention": 2}
    assert keys(text) == NINE
    lines = text.splitlines()
    for key in NINE:
        (at,) = [i for i, line in enumerate(lines) if line.strip().startswith(key.split(".")[-1])]
        assert lines[at - 1].strip().startswith("#"), key
    assert len(lines) < 50
    assert recipe.vocab.size == 512
    assert recipe.engine.max_model_len == 512
    assert recipe.prompts.sources[0].path == prompts
    # All else is the default.
    minimal = {
        "name": recipe.name,
        "target": {"path": str(lfm2_moe)},
        "prompts": {"sources": [{"path": prompts}]},
    }
    default = Recipe.model_validate(minimal).model_dump()
    for section, values in recipe.model_dump().items():
        for key, value in values.items() if isinstance(values, dict) else ():
            assert f"{section}.{key}" in NINE or value == default[section][key]


def test_every_key_is_written_on_request(tmp_path, llama):
    prompts = questions(tmp_path / "chats.jsonl", 50)
    write_recipe(str(llama), prompts, tmp_path / "few.yaml")
    write_recipe(str(llama), prompts, tmp_path / "all.yaml", every_key=True)
    assert load_recipe(tmp_path / "all.yaml") == load_recipe(tmp_path / "few.yaml")
    sections = {n: f for n, f in Recipe.model_fields.items() if isinstance(f.annotation, type)}
    for name, field in sections.items():
        for key in getattr(field.annotation, "model_fields", ()):
            assert f"{name}.{key}" in keys((tmp_path / "all.yaml").read_text())


@pytest.mark.parametrize(
    ("machine", "prompts", "row"),
    [
        (CPU, 300, 512),  # 2048 would be a few dozen steps
        (CPU, 100_000, 2048),
        (SMALL, 100_000, 2048),
        (LARGE, 300, 512),
        (LARGE, 3_000, 4096),
        (LARGE, 100_000, 8192),
    ],
)
def test_rows_leave_enough_steps_and_fit_the_machine(llama, machine, prompts, row):
    tokens = Estimate(prompts, 20 * prompts, 280 * prompts, 530 * prompts, 600)
    fitted = fit_recipe(load_target(llama), [{"path": "p.jsonl"}], tokens, machine)
    assert fitted["train"]["row_tokens"][0] == row
    limit = fitted["generate"]["max_new_tokens"][0]
    assert limit < 512 if machine is CPU else limit == 512


def test_sequences_are_long_enough_for_the_prompts(llama):
    target = load_target(llama)
    target.config.max_position_embeddings = 40_000
    for longest, max_len in ((600, 8192), (20_000, 20_000), (50_000, 40_000)):
        tokens = Estimate(100, 1000, 2000, 3000, longest)
        fitted = fit_recipe(target, [{"path": "p.jsonl"}], tokens, LARGE)
        assert fitted["engine"]["max_model_len"][0] == max_len


def test_prompts_that_cannot_be_read_are_refused_and_nothing_is_written(tmp_path, llama):
    out, file = tmp_path / "recipe.yaml", tmp_path / "p.jsonl"
    for content in ("", "no JSON", '{"prompt": "only one"}\n'):
        file.write_text(content)
        with pytest.raises(DraftheadError):
            write_recipe(str(llama), str(file), out)
    with refused("prompts", tmp_path):
        write_recipe(str(llama), str(tmp_path), out)
    assert not out.exists()


@pytest.mark.parametrize(("prompts", "heldout"), [(2, 1), (40, 8), (500, 64)])
def test_fewer_are_held_out_of_few_prompts(tmp_path, llama, prompts, heldout):
    """64 were, of 40 too, which `doctor` then refused."""
    file, out = tmp_path / "p.jsonl", tmp_path / "recipe.yaml"
    lines = [json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(prompts)]
    file.write_text("".join(lines + lines[:1]))
    about = write_recipe(str(llama), str(file), out)
    assert about["conversations"] == prompts
    assert "line" in describe(about).splitlines()[-1]  # what was seen before
    section = load_recipe(out).prompts
    assert section.heldout == heldout
    assert len(load_chats(section).train) == prompts - heldout


def test_a_target_without_a_chat_template_needs_one(tmp_path, llama, drafthead):
    base = shutil.copytree(llama, tmp_path / "base")
    template = (base / "chat_template.jinja").rename(tmp_path / "chat.jinja")
    out = tmp_path / "base.yaml"
    code, _, err = drafthead("init", str(base), "--out", str(out))
    assert code == 2
    assert "--chat-template" in err
    assert not out.exists()
    init = ("init", str(base), "--chat-template", str(template), "--out", str(out))
    code, _, err = drafthead(*init)
    assert code == 0, err
    recipe = load_recipe(out)
    assert recipe.target.chat_template == str(template)
    assert recipe_template(recipe, load_target(base)).text == template.read_text()


def test_existing_recipe_is_kept(tmp_path, llama):
    out = tmp_path / "recipe.yaml"
    out.write_text("mine")
    with refused("recipe.yaml", "--out"):
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
