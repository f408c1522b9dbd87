"""The recipe: what it refuses, and how it says so."""

from datetime import date
from pathlib import Path

import pytest
import yaml

from drafthead.errors import DraftheadError
from drafthead.recipe import Recipe, load_recipe, schema, without_paths, without_secrets
from tests.refused import refused

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
GOOD = {
    "name": "r",
    "target": {"path": "some/target"},
    "prompts": {"sources": [{"path": "prompts.jsonl"}]},
}


def _load(tmp_path, data):
    path = tmp_path / "recipe.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return load_recipe(path)


def test_minimal_recipe_has_every_default(tmp_path):
    recipe = _load(tmp_path, GOOD)
    assert recipe.serve.k == 3
    assert recipe.serve.candidates == [1, 2, 3, 4, 5]
    assert recipe.prompts.sources[0].path == "prompts.jsonl"


def test_answers_of_one_length_or_of_several(tmp_path):
    for said, meant in ((64, [64]), ([64, 256], [64, 256])):
        assert _load(tmp_path, GOOD | {"bench": {"max_new_tokens": said}}).bench.max_new_tokens == (
            meant
        )


@pytest.mark.parametrize(
    ("section", "wrong", "right"),
    [
        ("train", "learning_rat", "learning_rate"),
        ("engine", "max_num_seq", "max_num_seqs"),
        ("capture", "aux_layer", "aux_layers"),
    ],
)
def test_misspelt_key_names_the_nearest(tmp_path, section, wrong, right):
    with refused(f"{section}.{wrong}", right):
        _load(tmp_path, GOOD | {section: {wrong: 1}})


def test_misspelt_section_and_source_key(tmp_path):
    with refused("trian", "train"):
        _load(tmp_path, GOOD | {"trian": {}})
    with refused("prompts.sources.0.limt", "limit"):
        _load(tmp_path, GOOD | {"prompts": {"sources": [{"path": "a", "limt": 3}]}})


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ("a: [", "recipe.yaml"),
        ("- 1", "recipe.yaml, list"),
        (GOOD | {"name": "../up"}, "name"),
        (GOOD | {"prompts": {"sources": []}}, "prompts.sources"),
        (GOOD | {"prompts": {"sources": [{}]}}, "prompts.sources.0, path, dataset"),
        (GOOD | {"bench": {"sources": []}}, "bench.sources"),
        (GOOD | {"bench": {"max_new_tokens": 0}}, "bench.max_new_tokens.0"),
        (GOOD | {"bench": {"max_new_tokens": []}}, "bench.max_new_tokens"),
        (GOOD | {"bench": {"max_new_tokens": "long"}}, "bench.max_new_tokens"),
        (GOOD | {"bench": {"tensor_parallel_size": []}}, "bench.tensor_parallel_size"),
        ({"name": "r"}, "target"),
        (GOOD | {"target": {"path": ""}}, "target.path"),
        (GOOD | {"train": {"ttt_steps": 0}}, "train.ttt_steps"),
        (GOOD | {"serve": {"num_speculative_tokens": 300}}, "serve.num_speculative_tokens, 128"),
        (GOOD | {"bench": {"num_speculative_tokens": [129]}}, "bench.num_speculative_tokens, 128"),
        (GOOD | {"train": {"epochs": 1e6}}, "train.epochs, 1000"),
        (GOOD | {"train": {"seed": -1}}, "train.seed, 0, -1"),
        (GOOD | {"generate": {"seed": 1 << 32}}, "generate.seed, 4294967296"),
        (GOOD | {"train": {"betas": [0.9, 1.0]}}, "train.betas.1, 1"),
        (GOOD | {"generate": {"max_new_tokens": True}}, "generate.max_new_tokens, True"),
        (GOOD | {"train": {"eval_every": False}}, "train.eval_every, False"),
        (GOOD | {"bench": {"concurrency": True}}, "bench.concurrency, True"),
    ],
)
def test_wrong_recipes_are_refused_in_words(tmp_path, data, names):
    with refused(*names.split(", ")):
        _load(tmp_path, data)


@pytest.mark.parametrize(
    ("data", "field", "written"),
    [
        ({"bench": {"num_speculative_tokens": 2}}, "bench.num_speculative_tokens", "[2]"),
        ({"verify": {"num_speculative_tokens": "1,3"}}, "verify.num_speculative_tokens", "[1, 3]"),
        ({"train": {"track": "wandb"}}, "train.track", "[wandb]"),
        ({"capture": {"aux_layers": 7}}, "capture.aux_layers", "[7]"),
        ({"capture": {"aux_layers": "None"}}, "capture.aux_layers", "null"),
        ({"prompts": {"sources": "p.jsonl"}}, "prompts.sources", "[{path: p.jsonl}]"),
        ({"prompts": {"sources": ["p.jsonl"]}}, "prompts.sources.0", "{path: p.jsonl}"),
        ({"prompts": {"sources": {"path": "p"}}}, "prompts.sources", "[{path: p}]"),
        ({"target": "./model"}, "target", "{path: ./model}"),
        ({"name": 2026}, "name", '"2026"'),
        ({"name": "a b"}, "name", "-"),
        ({"publish": {"repo": "me"}}, "publish.repo", "OWNER/NAME"),
        ({"head": {"fc_norm": "maybe"}}, "head.fc_norm", "true"),
        ({"train": {"ttt_steps": 2.5}}, "train.ttt_steps", "2"),
        ({"train": {"epochs": "many"}}, "train.epochs", "0.5"),
    ],
)
def test_a_value_of_another_shape_is_told_how_to_be_written(tmp_path, data, field, written):
    with pytest.raises(DraftheadError) as refused:
        _load(tmp_path, GOOD | data)
    assert f"`{field}`" in str(refused.value)
    assert f"`{written}`" in str(refused.value)


def test_missing_recipe_names_the_mend(tmp_path):
    with refused("none.yaml", "drafthead init TARGET"):
        load_recipe(tmp_path / "none.yaml")


def test_as_many_steps_are_trained_as_may_be_drafted_and_are_of_use(tmp_path):
    steps = lambda **sections: _load(tmp_path, GOOD | sections).ttt_steps
    bare = {"norm_output": False}
    assert steps() == 3
    assert steps(head=bare) == 5
    assert steps(serve={"num_speculative_tokens": 2}) == 2
    assert steps(serve={"num_speculative_tokens": 12}) == 3
    assert steps(serve={"num_speculative_tokens": 12}, head=bare) == 8
    assert steps(serve={"num_speculative_tokens": 3}, train={"ttt_steps": 1}) == 1


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_recipes_that_come_along_hold(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert min(recipe.serve.k, 3) <= recipe.ttt_steps
    # Each k that bench measures was proved before, or is the one that is served.
    proved = {*(recipe.verify.num_speculative_tokens or []), recipe.serve.k}
    assert {*(recipe.bench.num_speculative_tokens or [])} <= proved


def test_lfm2_recipe_fits_the_target_that_it_names():
    """LFM2.5-8B-A1B's published shape: 24 layers, hidden 2048, 128,000 tokens."""
    recipe = load_recipe(RECIPES / "lfm2.5-8b-a1b-nvfp4.yaml")
    assert recipe.capture.aux_layers == [2, 24 // 2, 24 - 3]
    assert recipe.vocab.size < 128_000
    assert recipe.engine.max_model_len <= 128_000
    assert recipe.head.intermediate_size == 4 * 2048


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("max_model_len", "engine.max_model_len"),
        ("max-model-len", "engine.max_model_len"),
        ("--max-num-seqs", "engine.max_num_seqs"),
        ("tensor_parallel_size", "engine.tensor_parallel_size"),
        ("-tp", "engine.tensor_parallel_size"),
        ("speculative_config", "serve.num_speculative_tokens"),
        ("speculative-config.method", "serve.num_speculative_tokens"),
        ("spec_tokens", "serve.num_speculative_tokens"),
        ("dtype", "engine.dtype"),
        ("model", "target.path"),
        ("trust_remote_code", "target.trust_remote_code"),
        ("block-size", "block_size"),
    ],
)
def test_an_extra_argument_that_has_a_key_of_its_own_is_refused(tmp_path, key, named):
    with refused("engine.extra", key, named):
        _load(tmp_path, GOOD | {"engine": {"extra": {key: 1}}})


def test_every_argument_with_a_key_of_its_own_is_one_of_vllms():
    """Or of its short names."""
    from vllm.engine.arg_utils import EngineArgs

    short = {"model_tag", "tp", "sc", "kv_cache_memory", "num_speculative_tokens"}
    server = {"chat_template", "chat_template_kwargs", "default_chat_template_kwargs"}
    assert schema._RECIPE_KEYS.keys() - short - server <= EngineArgs.__dataclass_fields__.keys()
    named = [key.split(".") for key in schema._RECIPE_KEYS.values()]
    assert all(
        field in Recipe.model_fields[section].annotation.model_fields for section, field in named
    )


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ({"hf_token": "s"}, {"hf_token": "(not shown)"}),
        ({"hf_token": True, "api_key": None}, {"hf_token": True, "api_key": None}),
        ({"api-key": ["s", "t"]}, {"api-key": "(not shown)"}),
        ({"a": [{"s3_secret_access_key": "s"}]}, {"a": [{"s3_secret_access_key": "(not shown)"}]}),
        ({"x": {"Authorization": "Bearer s"}}, {"x": {"Authorization": "(not shown)"}}),
        ({"cache": "redis://me:s@host:1/0"}, {"cache": "redis://(not shown)@host:1/0"}),
        ({"x": "--hf-token hf_" + 34 * "a"}, {"x": "--hf-token (not shown)"}),
        ({"max_num_batched_tokens": 64, "tokenizer": "a/b", "eos_token_id": 2, 0: "s"}, None),
        ({"hf_overrides": {"eos_token": "</s>", "image_token": "<image>"}}, None),
        ({"model": "org/name@main", "url": "https://host/a@b", "x": "hf_overrides"}, None),
    ],
)
def test_secrets_are_known(written, shown):
    assert without_secrets(written) == (written if shown is None else shown)


def test_every_field_says_why():
    """A default without its reason is a default nobody can judge."""

    def undocumented(model, path):
        for name, field in model.model_fields.items():
            inner = field.annotation
            if hasattr(inner, "model_fields"):
                yield from undocumented(inner, f"{path}{name}.")
            elif not field.description:
                yield f"{path}{name}"

    assert list(undocumented(Recipe, "")) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/models/Qwen3-8B", "Qwen3-8B"),
        ("/home/me/my models/Qwen3-8B/", "Qwen3-8B"),
        ("~/models/x", "x"),
        ("../models/x", "x"),
        ("build/demo/x", "build/demo/x"),
        ("some/target", "some/target"),
        ("drafthead run /home/me/r.yaml --runs=/data/runs", "drafthead run r.yaml --runs=runs"),
        ("drafthead run '/home/me/my recipes/r.yaml'", "drafthead run 'r.yaml'"),
        ('--x {"model":"/home/me/run/head","k":3}', '--x {"model":"head","k":3}'),
        ("s3://bucket/run https://a.example/b", "s3://bucket/run https://a.example/b"),
        ("12 tokens/s, p50 / p99, 1/2", "12 tokens/s, p50 / p99, 1/2"),
        ("line\n/home/me/x", "line\nx"),
    ],
)
def test_local_paths_are_shown_as_names(text, shown):
    assert without_paths({"a": [text, 1]}) == {"a": [shown, 1]}


@pytest.mark.parametrize("section", ["generate", "prompts", "serve", "bench"])
def test_arguments_of_the_chat_template_stand_under_target(tmp_path, section):
    given = {"chat_template_kwargs": {"enable_thinking": False}}
    recipe = _load(tmp_path, GOOD | {"target": GOOD["target"] | given})
    assert recipe.target.chat_template_kwargs == {"enable_thinking": False}
    with refused(f"{section}.chat_template_kwargs", "target.chat_template_kwargs"):
        _load(tmp_path, GOOD | {section: GOOD.get(section, {}) | given})
    with refused("target.chat_template_kwargs"):
        extra = {"default_chat_template_kwargs": {"enable_thinking": False}}
        _load(tmp_path, GOOD | {"engine": {"extra": extra}})


def test_an_argument_of_the_chat_template_that_json_cannot_hold(tmp_path):
    """YAML reads a date where text is meant."""
    given = {"chat_template_kwargs": {"date": date(2026, 1, 2)}}
    with refused("target.chat_template_kwargs"):
        _load(tmp_path, GOOD | {"target": GOOD["target"] | given})
