"""The smallest kind of draft head: independent heads that each predict one of the next tokens.

After Medusa (arXiv 2401.10774), greedy and without a tree. vLLM is not asked to serve it.
"""

import dataclasses
import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from drafthead.ops.graphs import Graphs
from drafthead.ops.vocabulary import draft_ids

HEADS = 4


@dataclass(frozen=True)
class Config:
    vocab_size: int
    draft_vocab_size: int
    hidden_size: int
    target_hidden_size: int
    aux_layer_ids: tuple[int, ...]
    max_position_embeddings: int


class Medusa(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        states = len(config.aux_layer_ids) * config.target_hidden_size
        self.fc = nn.Linear(states + config.hidden_size, HEADS * config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))

    def forward(self, aux, embedded):
        """aux [N, A, Ht], embedded [N, H] of the token after: logits [N, HEADS, Vd]."""
        states = F.silu(self.fc(torch.cat([aux.flatten(1), embedded], -1)))
        return self.lm_head(states.unflatten(-1, (HEADS, -1)))

    def target_ids(self):
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t


@dataclass(frozen=True)
class Batch:
    aux: torch.Tensor
    embedded: torch.Tensor
    labels: torch.Tensor

    tokens = property(lambda self: len(self.labels))
    bytes = property(lambda self: self.aux.nbytes + self.embedded.nbytes + self.labels.nbytes)

    def map(self, change):
        return Batch(*(change(getattr(self, f.name)) for f in dataclasses.fields(self)))

    def batch(self, device, dtype=None):
        return self.map(lambda x: x.to(device, dtype if x.is_floating_point() else None))


class Trainer:
    steps, graphs = HEADS, Graphs(torch.device("cpu"))

    def __init__(self, head, target):
        self.head, self.embedding = head, target.embedding
        self.to_draft = draft_ids(head.target_ids(), head.config.vocab_size)

    def pack(self, samples, number, pinned):
        rows = [self._of(sample) for sample in samples]
        return Batch(*(torch.cat(parts) for parts in zip(*rows, strict=True)))

    def _of(self, sample):
        ids = sample.ids.long()
        start, end = sample.prompt_len - 1, len(ids) - 2
        labels = F.pad(self.to_draft[ids], (0, HEADS), value=-1).unfold(0, HEADS, 1)
        embedded = self.embedding[ids[start + 1 : end + 1]]
        return sample.aux[start:end], embedded, labels[start + 2 : end + 2]

    def backward(self, batch):
        logits = self.head(batch.aux.to(batch.embedded.dtype), batch.embedded)
        loss = F.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-1, reduction="sum"
        )
        loss.backward()
        right = (logits.argmax(-1) == batch.labels).sum(0)
        return loss.detach(), right, (batch.labels >= 0).sum(0)

    def supervised(self, batch):
        return int((batch.labels >= 0).sum())

    def operations(self, batch):
        return 6.0 * batch.tokens * sum(p.numel() for p in self.head.parameters())


class MedusaDrafter:
    kind, name, prefixes = "medusa", "Medusa", True

    def matches(self, raw):
        return raw.get("architectures") == ["MedusaModel"]

    def default_k(self, recipe):
        return [HEADS]

    def training_words(self, recipe):
        return f"{HEADS} heads"

    def shape(self, section, target, aux_layers, vocab):
        width, reach = target.hidden_size, target.max_position_embeddings
        return Config(target.vocab_size, vocab, width, width, aux_layers, reach)

    def new(self, section, target, aux_layers, d2t, seed):
        torch.manual_seed(seed)
        head = Medusa(self.shape(section, target, aux_layers, len(d2t)))
        head.d2t.copy_(d2t)
        return head

    def read(self, folder, target=None):
        raw = json.loads((folder / "config.json").read_text())["medusa"]
        return Config(**raw | {"aux_layer_ids": tuple(raw["aux_layer_ids"])})

    def trainer(self, head, target, settings, k, rate):
        return Trainer(head, target)

    def by_muon(self, name):
        return name == "fc.weight"

    def draft(self, head, target, aux, ids, k, rows):
        logits = head(aux[rows].to(head.fc.weight.dtype), target.embedding[ids[rows + 1].long()])
        return head.target_ids()[logits[:, :k].argmax(-1)]

    def most_drafts(self, head):
        return HEADS

    def target_ids(self, head):
        return head.target_ids()

    def save(self, head, folder, provenance, *, k, format="vllm", embedding=None, dtype=None):
        folder.mkdir(parents=True, exist_ok=True)
        config = {"architectures": ["MedusaModel"], "medusa": dataclasses.asdict(head.config)}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(
            {n: t.contiguous() for n, t in head.state_dict().items()}, folder / "m.safetensors"
        )

    def speculative_config(self, folder, k, method):
        return {"method": "medusa", "model": folder, "num_speculative_tokens": k}

    def inspect(self, folder, target, deep):
        config = dataclasses.asdict(self.read(folder))
        return {"kind": "medusa", "config": config, "problems": [], "unsupported": [], "notes": []}

    def load(self, folder, target=None):
        head = Medusa(self.read(folder))
        head.load_state_dict(load_file(folder / "m.safetensors"))
        return head, None
