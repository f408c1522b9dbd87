"""What train/step.py measures: shapes, documents and the sides, each with a `run(number)`."""

import dataclasses

import torch

from benchmarks.peers import specforge_side, speculators_side
from drafthead.drafters.eagle3.batch import Batch
from drafthead.drafters.eagle3.graphed import GraphedStep, worth_replaying
from drafthead.drafters.eagle3.operations import operations
from drafthead.drafters.eagle3.packing import pack_row
from drafthead.drafters.eagle3.step import Objective, TrainStep
from drafthead.head.config import HeadConfig
from drafthead.head.model import Eagle3Head
from drafthead.ops.graphs import Graphs
from drafthead.ops.losses import Teacher
from drafthead.states import Sample
from drafthead.train.optimizer import AdamW, AdamWSettings

DOCUMENTS = 8
SUPERVISED = 0.8


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one benchmark."""

    hidden: int = 2048
    mlp: int = 8192
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    vocab: int = 128_000
    draft_vocab: int = 32_000
    tokens: int = 8192
    aux: int = 3


SHAPES = {
    "lfm2": Shape(),
    "smollm2": Shape(576, 2304, 9, 3, 64, 49_152, 16_000, 2048),
    "tiny": Shape(64, 128, 4, 2, 16, 512, 128, 256),
}


def documents(shape: Shape, seed: int) -> list[Sample]:
    """Random documents that fill a row exactly, each with a prompt of a fifth of its tokens."""
    g = torch.Generator().manual_seed(seed)
    positions = shape.tokens // DOCUMENTS
    length = positions + 2
    prompt = length - round(SUPERVISED * positions)
    return [
        Sample(
            ids=torch.randint(0, shape.draft_vocab, (length,), generator=g, dtype=torch.int32),
            loss_mask=torch.arange(length) >= prompt,
            states=torch.randn(length - 1, shape.aux + 1, shape.hidden, generator=g).bfloat16(),
            num_aux=shape.aux,
            prompt_len=prompt,
            conversation=str(number),
            split="train",
        )
        for number in range(DOCUMENTS)
    ]


def update(step, optimizer: AdamW, batch, supervised: int) -> torch.Tensor:
    """One step of ours on a batch with so many supervised rows; the loss of one row."""
    loss, *_ = step.backward(batch)
    count = torch.full((), supervised, dtype=torch.float32, device=loss.device)
    optimizer.step(1e-4, count)
    return loss / count


class Ours:
    """drafthead's step."""

    name = "drafthead"
    muon = False
    replayed = True

    def __init__(self, shape: Shape, steps: int, samples: list, device, options, like=None):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        config = self.config = HeadConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.mlp,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab,
            draft_vocab_size=shape.draft_vocab,
            target_hidden_size=shape.hidden,
            aux_layer_ids=tuple(range(1, shape.aux + 1)),
            max_position_embeddings=8192,
            rope_theta=5e6,
        )
        with torch.device(device):
            head = Eagle3Head(config).to(dtype)
            embedding = torch.randn(shape.vocab, shape.hidden).mul_(0.02).to(dtype)
        rows, embedding = embedding[: shape.draft_vocab].clone(), embedding.cpu()
        head.lm_head.weight.data.copy_(rows)
        teacher = Teacher(torch.ones(shape.hidden, device=device, dtype=dtype), 1e-5, rows)
        to_draft = torch.arange(shape.vocab)
        to_draft[shape.draft_vocab :] = -1
        self.batches: list[Batch] = []
        for documents in samples:
            row = pack_row(documents, steps, to_draft, shape.tokens, embedding)
            assert row is not None
            self.batches.append(row.batch(device))
        objective = Objective("kl", steps, 1.0, chunk_rows=options.chunk)
        self.embedding = embedding
        self.start = {name: t.cpu().clone() for name, t in head.state_dict().items()}
        step = TrainStep(head, teacher, objective, options.compile)
        replayed = self.replayed and worth_replaying(head, shape.tokens, options.ceiling)
        self.graphs = Graphs(device if replayed else torch.device("cpu"))
        self.step: GraphedStep | TrainStep = step
        if replayed:
            self.step = graphed = GraphedStep(step, shape.tokens, self.graphs)
            # As a training of many such rows would have it.
            graphed.sizes.chosen += [graphed.sizes.own(batch) for batch in self.batches]
        self.optimizer = AdamW(
            head.named_parameters(), AdamWSettings(self.muon), graphs=self.graphs
        )
        self.operations = operations(config, self.batches[0])

    def reserved(self) -> int:
        """Bytes that the graphs keep to themselves."""
        if self.graphs.pool is None:
            return 0
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if s["segment_pool_id"] == self.graphs.pool)

    def run(self, number: int) -> torch.Tensor:
        batch = self.batches[number % len(self.batches)]
        return update(self.step, self.optimizer, batch, len(batch.labels))


class OursMuon(Ours):
    """drafthead's step with `train.optimizer: muon`, its default."""

    name = "drafthead-muon"
    muon = True


class OursLaunched(Ours):
    """drafthead's step, each kernel started by the host."""

    name = "drafthead-launched"
    replayed = False


class Speculators:
    """speculators 0.9.0's step, as its trainer makes it, from the weights of `Ours`."""

    name = "speculators"

    def __init__(self, shape: Shape, steps: int, samples: list, device, options, like: Ours):
        model = speculators_side.make_model(like.config, device)
        ids = torch.arange(shape.draft_vocab)
        norm = torch.ones(shape.hidden)
        speculators_side.give_target(
            model, like.embedding, norm, like.embedding[: shape.draft_vocab], ids
        )
        model.load_state_dict(like.start, strict=False)
        self.side = speculators_side.Side(model, steps, 1e-4, 0.0)
        self.batches = [
            speculators_side.make_batch(documents, shape.tokens, shift=2).map(
                lambda x: x.to(device)
            )
            for documents in samples
        ]

    def run(self, number: int) -> torch.Tensor:
        return self.side.step(self.batches[number % len(self.batches)])


class SpecForge:
    """SpecForge 0.2.0's step, as its trainer makes it, from the weights of `Ours`."""

    name = "specforge"

    def __init__(self, shape: Shape, steps: int, samples: list, device, options, like: Ours):
        model = specforge_side.make_model(like.config, steps, device)
        specforge_side.give_weights(model, like.start, like.embedding)
        # No token outside the draft vocabulary may be likeliest: it would not train on such rows.
        target_head = like.embedding.to(device, copy=True)
        target_head[shape.draft_vocab :] = 0
        self.side = specforge_side.Side(model, target_head, 1e-4)
        norm = torch.ones(shape.hidden, dtype=target_head.dtype)
        self.batches = [
            {name: t.to(device) for name, t in specforge_side.make_batch(part, norm, 1e-5).items()}
            for part in samples
        ]
        rows = target_head[: shape.draft_vocab]
        self.entropies = [specforge_side.entropy(batch, rows, steps) for batch in self.batches]

    def run(self, number: int) -> torch.Tensor:
        number %= len(self.batches)
        mask = self.batches[number]["loss_mask"]
        loss = self.side.step(self.batches[number]) * mask.numel()
        return (loss - self.entropies[number]) / mask.sum()


SIDES = (Ours, OursMuon, OursLaunched, Speculators, SpecForge)
