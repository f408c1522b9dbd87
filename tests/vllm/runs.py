"""Recipes of small runs that capture."""

import json

import numpy as np

WORDS = "the sum of two numbers and a city on river stone house while sun"


def recipe_for(folder, tmp_path, conversations=18, chunk=6, **sections):
    rng = np.random.default_rng(0)
    records = []
    for i in range(conversations):
        turns = [" ".join(rng.choice(WORDS.split(), 5)) for _ in range(1 + (i % 3 == 2))]
        records.append({"turns": turns})
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = {
        "name": "t",
        "target": {"path": str(folder)},
        "prompts": {"sources": [{"path": str(prompts)}], "heldout": 4},
        "generate": {"max_new_tokens": 24, "chunk": chunk},
        "capture": {"aux_layers": [1, 3], "format": "fp32"},
        "engine": {
            "dtype": "float32",
            "max_model_len": 256,
            "max_num_seqs": 4,
            "kv_cache_memory_bytes": 32 << 20,
        },
    }
    for name, section in sections.items():
        recipe[name] = recipe.get(name, {}) | section
    return recipe
