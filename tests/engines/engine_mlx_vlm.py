"""Runs in mlx-vlm's own environment, on a folder that `tests.engines.made.make` wrote."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx_vlm.generate.ar import generate_step
from mlx_vlm.speculative.drafters import load_drafter
from mlx_vlm.utils import load_model


def answer(model, prompt, tokens, **draft):
    steps = generate_step(
        mx.array([prompt]), model, None, None, max_tokens=tokens, temperature=0.0, **draft
    )
    return [int(token) for token, *_ in steps]


def watch(drafter, calls):
    """Note each anchor and the drafts after it."""
    inner = drafter.draft_block

    def draft_block(last, *args, **named):
        drafts = inner(last, *args, **named)
        calls.append((last, [int(x) for x in drafts[0].tolist()]))
        return drafts

    drafter.draft_block = drafter.draft_block_greedy = draft_block


def main(folder):
    expected = json.loads((folder / "expected.json").read_text())
    model = load_model(folder / "target")
    drafter, kind = load_drafter(str(folder / "head"))
    calls = []
    watch(drafter, calls)
    blocks = others = 0
    for index, (prompt, truth) in enumerate(zip(expected["prompts"], expected["answers"])):
        alone = answer(model, prompt, len(truth))
        calls.clear()
        width = expected["k"] + 1
        draft = {"draft_model": drafter, "draft_kind": kind, "draft_block_size": width}
        drafted = answer(model, prompt, len(truth), **draft)
        assert drafted == alone, f"with the head {drafted}, alone {alone}"
        if alone != truth:  # the target itself computes something else here
            others += 1
            continue
        ids, anchor = prompt + truth, len(prompt)
        for last, drafts in calls:
            assert ids[anchor] == last
            ours = expected["drafts"][str(len(drafts))][index][anchor - 1]
            assert drafts == ours, f"after position {anchor}: {drafts}, ours {ours}"
            alike = [a == b for a, b in zip(drafts, ids[anchor + 1 :])] + [False]
            anchor += alike.index(False) + 1
            blocks += 1
    versions = {name: version(name) for name in ("mlx-vlm", "mlx")}
    assert not others or "moe" in model.config.model_type  # findings/mlx-vlm-lfm2-moe-routing.sh
    assert blocks or others == len(expected["answers"])
    found = {
        "answers": len(expected["answers"]),
        "answers that the target gives elsewhere": len(expected["answers"]) - others,
        "blocks drafted as our walk does": blocks,
    }
    print(json.dumps({"versions": versions, **found}))


main(Path(sys.argv[1]))
