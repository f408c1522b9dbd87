"""Targets and heads for other engines to run, and what our own walk drafts with them.

Everything is tiny and float32. A head is trained for a moment on the very answers that are served,
so that chains of every length are accepted.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from drafthead.drafters.base import Drafter, TargetSide
from drafthead.drafters.dspark.drafter import DSpark
from drafthead.drafters.dspark.packing import pack_blocks
from drafthead.drafters.dspark.training import BlockObjective, BlockStep
from drafthead.drafters.eagle3.drafter import Eagle3
from drafthead.head.config import HeadConfig
from drafthead.head.formats import Format, Provenance
from drafthead.head.init import init_from_target
from drafthead.ops.losses import Teacher
from drafthead.ops.vocabulary import draft_ids
from drafthead.states import Sample
from drafthead.targets import Target, load_target
from drafthead.train.evaluate import evaluate
from drafthead.vocab import choose, count_tokens, offsets
from tests import tiny
from tests.vllm.models import write_target
from tests.vllm.test_dspark import shaped
from tests.vllm.test_served_acceptance import AUX, answers, overfit

K = {"dspark": 5, "eagle3": 3}
TARGETS: dict[str, Callable[[Path], Path]] = {
    "llama": tiny.tiny_llama,
    "lfm2": lambda folder: write_target(folder, moe=False, embedding_scale=1.0),
    "lfm2_moe": lambda folder: write_target(folder, embedding_scale=1.0),
}


def make(folder: Path, kind: str, vocabulary: str, target: str, format: Format = "vllm") -> Path:
    """Write a target and a head, and `expected.json` beside them; returns the folder.

    vocabulary: `full` (with the target's LM head), `own` (full, LM head trained), `all but one`
    (the same less one token) or `reduced`. `expected.json` has the prompts, the target's answers,
    k, and for 1 to k drafts a step (positions of a DSpark block see each other) and each answer the
    drafts that follow each position: row i those after ids[i + 1].
    """
    folder.mkdir(parents=True, exist_ok=True)
    where = folder / "target"
    if not where.exists():
        TARGETS[target](where)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(5, 500, n).tolist() for n in (9, 2, 14, 5, 7, 3, 20, 6)]
    held = answers(where, prompts, [40, 30, 24, 36, 28, 40, 20, 33])
    read = load_target(where)
    written = count_tokens([one.ids[one.prompt_len :].numpy() for one in held], read.vocab_size)
    used = int((written > 0).sum())
    size = {"reduced": int(used * 0.9), "all but one": read.vocab_size - 1}
    d2t = offsets(choose(written, size.get(vocabulary, read.vocab_size), []))
    drafter, head = {"dspark": _dspark, "eagle3": _eagle3}[kind](read, held, d2t, vocabulary)
    about = Provenance("target", read.fingerprint, read.architectures)
    # mlx-vlm takes an EAGLE-3 head only with an embedding of its own.
    embedding = read.embedding() if format == "speculators" else None
    drafter.save(
        head, folder / "head", about, k=K[kind], format=format, embedding=embedding,
        dtype=torch.float32,
    )  # fmt: skip
    served, _ = drafter.load(folder / "head", read)
    side = TargetSide(read.embedding(), lm_head=read.lm_head())
    rows = [torch.arange(len(one.ids) - 1) for one in held]
    drafts = {
        k: [
            drafter.draft(served, side, one.aux, one.ids, k, r).tolist()
            for one, r in zip(held, rows)
        ]
        for k in range(1, K[kind] + 1)
    }
    counted = evaluate(drafter, served, side, held, [K[kind]])[0]
    assert min(counted.accepted) > 2, "a head that is never right would prove nothing"
    expected = {
        "kind": kind,
        "k": K[kind],
        "prompts": prompts,
        "answers": [one.ids[one.prompt_len :].tolist() for one in held],
        "drafts": drafts,
        "tokens_a_step": counted.accepted_length,
    }
    (folder / "expected.json").write_text(json.dumps(expected))
    return folder


def _dspark(
    target: Target, held: list[Sample], d2t: torch.Tensor, vocabulary: str
) -> tuple[Drafter, torch.nn.Module]:
    shared = vocabulary == "full"
    head = shaped(
        target,
        draft_vocab_size=len(d2t),
        aux_layer_ids=AUX,
        own_lm_head=not shared,
        block_size=5,
        num_target_layers=target.num_layers,
    )
    head.d2t.copy_(d2t)
    weight, eps = target.final_norm()
    teacher = Teacher(weight, eps, target.lm_head()[head.target_ids()], target.logits)
    embedding = target.embedding()
    mask = embedding[head.config.mask_token_id]
    objective, lm_head = BlockObjective("ce"), target.lm_head() if shared else None
    step = BlockStep(head, teacher, objective, mask, lm_head)
    to_draft = draft_ids(head.target_ids(), target.vocab_size)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    for number in range(25):
        row = pack_blocks(held, 5, 1.0, to_draft, 1000, embedding, (number,))
        assert row is not None
        optimizer.zero_grad()
        step.backward(row.batch("cpu"))
        optimizer.step()
    return DSpark(), head


def _eagle3(
    target: Target, held: list[Sample], d2t: torch.Tensor, vocabulary: str
) -> tuple[Drafter, torch.nn.Module]:
    config = HeadConfig(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=target.vocab_size,
        draft_vocab_size=len(d2t),
        target_hidden_size=64,
        aux_layer_ids=AUX,
        max_position_embeddings=512,
    )
    head = init_from_target(config, d2t, target.lm_head(), target.final_norm()[0])
    overfit(head, target.embedding(), held, steps=90)
    return Eagle3(), head
