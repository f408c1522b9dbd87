"""A store whose tokens follow a rule that a head learns in seconds, and a task to train on it."""

from pathlib import Path

import torch

from drafthead.drafters import DRAFTERS
from drafthead.drafters.dspark.config import DSparkConfig
from drafthead.drafters.dspark.model import DSparkHead
from drafthead.head.config import HeadConfig
from drafthead.head.formats import Provenance
from drafthead.head.init import init_from_target
from drafthead.head.model import Eagle3Head
from drafthead.ops.losses import Teacher
from drafthead.recipe import TrainSection
from drafthead.states import Encoding, Sample, StateReader, StateWriter, StoreMeta
from drafthead.train.loop import Task

VOCAB, DRAFT, WIDTH, LAYERS = 61, 53, 32, 4
UNITS, PER_UNIT = 4, 12
SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "draft_vocab_size": DRAFT,
    "target_hidden_size": WIDTH,
    "aux_layer_ids": (1, 2),
    "max_position_embeddings": 256,
}


def sequence(start: int, length: int) -> torch.Tensor:
    """x[i+1] = 5 x[i] + 3 modulo 61: every token follows from the one before."""
    ids = [start % VOCAB]
    for _ in range(length - 1):
        ids.append((5 * ids[-1] + 3) % VOCAB)
    return torch.tensor(ids, dtype=torch.int32)


def target_weights() -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding and LM head [VOCAB, WIDTH]."""
    g = torch.Generator().manual_seed(7)
    return torch.randn(VOCAB, WIDTH, generator=g), torch.randn(VOCAB, WIDTH, generator=g)


def write_store(path: Path, poison: int | None = None, encoding: Encoding = "fp32") -> StateReader:
    """Small random states, the last one pointing at the next token. `poison`: the number
    of a sample whose states hold a NaN."""
    _, lm_head = target_weights()
    g = torch.Generator().manual_seed(3)
    meta = StoreMeta((1, 2), LAYERS, WIDTH, encoding, UNITS, {"target": "toy"})
    with StateWriter(path, meta) as writer:
        for unit in range(UNITS):
            samples = []
            for number in range(unit * PER_UNIT, (unit + 1) * PER_UNIT):
                length, prompt = 8 + number % 23, 2 + number % 5
                ids = sequence(number, length)
                states = 0.1 * torch.randn(length - 1, 3, WIDTH, generator=g)
                states[:, 2] = lm_head[ids[1:].long()]
                if number == poison:
                    states[prompt, 0, 5] = torch.nan
                samples.append(
                    Sample(
                        ids=ids,
                        loss_mask=torch.arange(length) >= prompt,
                        states=states,
                        num_aux=2,
                        prompt_len=prompt,
                        conversation=f"c{number}",
                        split="heldout" if number % 6 == 0 else "train",
                    )
                )
            writer.submit(unit, samples, {})
    return StateReader(path)


def eagle3_head(lm_head: torch.Tensor, d2t: torch.Tensor) -> Eagle3Head:
    return init_from_target(HeadConfig(**SHAPE), d2t, lm_head, torch.ones(WIDTH))


def dspark_head(lm_head: torch.Tensor, d2t: torch.Tensor) -> DSparkHead:
    config = DSparkConfig(
        **SHAPE, num_hidden_layers=2, block_size=5, mask_token_id=VOCAB - 1, markov_rank=16
    )
    torch.manual_seed(0)
    head = DSparkHead(config)
    head.d2t.copy_(d2t)
    with torch.no_grad():
        head.lm_head.weight.copy_(lm_head[head.target_ids()])
    return head


def make_task(store: Path, kind: str = "eagle3", **settings) -> Task:
    """A task on the store at `store` (written if it is not there)."""
    reader = StateReader(store) if (store / "meta.json").exists() else write_store(store)
    embedding, lm_head = target_weights()
    d2t = torch.zeros(DRAFT, dtype=torch.int64)
    d2t[20:] = VOCAB - DRAFT
    head = {"eagle3": eagle3_head, "dspark": dspark_head}[kind](lm_head, d2t)
    defaults = {"row_tokens": 64, "epochs": 4, "learning_rate": 5e-3, "rows_per_step": 2}
    return Task(
        drafter=DRAFTERS[kind],
        head=head,
        embedding=embedding,
        teacher=Teacher(torch.ones(WIDTH), 1e-5, lm_head[head.target_ids()]),
        reader=reader,
        settings=TrainSection(**{**defaults, **settings}),
        k=3,
        provenance=Provenance("toy"),
    )
