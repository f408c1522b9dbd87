"""Runs in an environment with xllamacpp, which has llama.cpp's server, on a folder that
`tests.engines.made.make` wrote and llama.cpp's own converter turned into two GGUF files."""

import json
import sys
import urllib.request
from importlib.metadata import version
from pathlib import Path

import xllamacpp as llama


def server(folder, draft=None, k=0):
    params = llama.CommonParams()
    params.model.path = str(folder / "target.gguf")
    params.n_ctx, params.n_parallel, params.port = 512, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    exact = llama.ggml_type.GGML_TYPE_F32  # half precision is enough to turn these random targets
    params.cache_type_k = params.cache_type_v = exact
    params.speculative.draft.cache_type_k = params.speculative.draft.cache_type_v = exact
    if draft:
        params.speculative.types = [getattr(llama.common_speculative_type, draft)]
        params.speculative.draft.mparams.path = str(folder / "head.gguf")
        params.speculative.draft.n_max, params.speculative.draft.n_min = k, 0
        params.speculative.draft.p_min = 0.0
    return llama.Server(params)


def answer(running, prompt, tokens):
    asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "return_tokens": True,
             "cache_prompt": False, "ignore_eos": True}  # fmt: skip
    request = urllib.request.Request(
        f"{running.listening_address}/completion",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as reply:
        got = json.load(reply)
    return got["tokens"], got["timings"]


def walk(ids, anchor, drafts):
    """How many drafts are accepted, as our own walk has them. drafts: row i after i + 1.

    The last token is always the target's own: llama.cpp drafts one less than there are left."""
    accepted = 0
    while anchor < len(ids) - 1:
        right = [a == b for a, b in zip(drafts[anchor - 1], ids[anchor + 1 : -1])] + [False]
        accepted += right.index(False)
        anchor += right.index(False) + 1
    return accepted


def main(folder):
    expected = json.loads((folder / "expected.json").read_text())
    k, kind = expected["k"], expected["kind"]
    alone = server(folder)
    plain = [answer(alone, p, len(a))[0] for p, a in zip(expected["prompts"], expected["answers"])]
    del alone
    drafting = server(folder, f"COMMON_SPECULATIVE_TYPE_DRAFT_{kind.upper()}", k)
    found = dict.fromkeys(("accepted", "accepted by our walk", "drafted"), 0)
    for index, (prompt, truth) in enumerate(zip(expected["prompts"], expected["answers"])):
        tokens, timings = answer(drafting, prompt, len(truth))
        assert tokens == plain[index], f"with the head {tokens}, alone {plain[index]}"
        assert tokens == truth, f"the target itself answers {tokens}, not {truth}"
        found["accepted"] += timings["draft_n_accepted"]
        found["drafted"] += timings["draft_n"]
        found["accepted by our walk"] += walk(
            prompt + truth, len(prompt), expected["drafts"][str(k)][index]
        )
    # One in a hundred or so turns where two tokens are all but equally likely.
    ours = found["accepted by our walk"]
    assert abs(found["accepted"] - ours) <= ours / 50, found
    build = version("xllamacpp")
    print(json.dumps({"versions": {"xllamacpp": build}, "answers": len(plain), **found}))


main(Path(sys.argv[1]))
