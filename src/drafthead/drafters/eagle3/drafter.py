"""EAGLE-3 behind the interface of all drafters."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafthead.drafters.base import TargetSide, architecture
from drafthead.drafters.eagle3.batch import Batch
from drafthead.drafters.eagle3.graphed import GraphedStep, worth_replaying
from drafthead.drafters.eagle3.operations import operations
from drafthead.drafters.eagle3.packing import Row, pack_row
from drafthead.drafters.eagle3.step import Objective, TrainStep
from drafthead.head.checkpoint import load_head, read_folder, save_head, trained_steps
from drafthead.head.config import HeadConfig, head_config
from drafthead.head.drafting import decoded_chain, draft_chain, true_tokens
from drafthead.head.formats import NATIVE_ARCHITECTURES, Format, Provenance
from drafthead.head.init import new_head
from drafthead.head.inspect import inspect_head
from drafthead.head.model import Eagle3Head
from drafthead.ops.graphs import Graphs
from drafthead.ops.vocabulary import draft_ids
from drafthead.recipe import HeadSection, Recipe, TrainSection
from drafthead.states import Sample
from drafthead.targets import Target


class Eagle3Trainer:
    """Training-time test on packed rows, replayed as CUDA graphs where the host would be late."""

    def __init__(
        self, head: Eagle3Head, target: TargetSide, settings: TrainSection, k: int, rate: float
    ):
        self.head, self.target, self.tokens = head, target, settings.row_tokens
        self.steps = settings.ttt_steps or k
        self.to_draft = draft_ids(head.target_ids(), head.config.vocab_size)
        objective = Objective(
            settings.loss, self.steps, settings.ttt_decay, settings.regression_weight
        )
        device = head.fc.weight.device
        assert target.teacher is not None
        step = TrainStep(head, target.teacher, objective, device.type == "cuda")
        self.graphs, self.backward = Graphs(torch.device("cpu")), step.backward
        if device.type == "cuda" and worth_replaying(head, self.tokens, rate):
            self.graphs = Graphs(device)
            self.backward = GraphedStep(step, self.tokens, self.graphs).backward

    def pack(self, samples: list[Sample], number: int, pinned: bool) -> Row | None:
        embedding = self.target.embedding
        return pack_row(samples, self.steps, self.to_draft, self.tokens, embedding, pinned)

    def supervised(self, batch: Batch) -> int:
        return len(batch.labels)

    def operations(self, batch: Batch) -> float:
        return operations(self.head.config, batch)


class Eagle3:
    """Heads that draft token after token."""

    kind = "eagle3"
    name = "EAGLE-3"
    prefixes = True

    def matches(self, raw: dict[str, Any]) -> bool:
        kind, name = raw.get("speculators_model_type"), architecture(raw) or ""
        return kind == "eagle3" or name in NATIVE_ARCHITECTURES or "Eagle3" in name

    def default_k(self, recipe: Recipe) -> Sequence[int]:
        return recipe.serve.candidates

    def training_words(self, recipe: Recipe) -> str:
        return f"{trained_steps(recipe)} training-time-test steps"

    def shape(
        self, section: HeadSection, target: Target, aux_layers: tuple[int, ...], vocab: int
    ) -> HeadConfig:
        return head_config(section, target, aux_layers, vocab)

    def read(self, folder: Path, target: Target | None = None) -> HeadConfig:
        return read_folder(folder, target).config

    def new(
        self,
        section: HeadSection,
        target: Target,
        aux_layers: tuple[int, ...],
        d2t: Tensor,
        seed: int,
    ) -> Eagle3Head:
        return new_head(section, target, aux_layers, d2t, seed)

    def trainer(
        self, head: Eagle3Head, target: TargetSide, settings: TrainSection, k: int, rate: float
    ) -> Eagle3Trainer:
        return Eagle3Trainer(head, target, settings, k, rate)

    def by_muon(self, name: str) -> bool:
        return "lm_head" not in name

    def draft(
        self, head: Eagle3Head, target: TargetSide, aux: Tensor, ids: Tensor, k: int, rows: Tensor
    ) -> Tensor:
        return draft_chain(head, target.embedding, aux, ids, k, rows)

    def true_path_logits(
        self, head: Eagle3Head, target: TargetSide, aux: Tensor, ids: Tensor, k: int, rows: Tensor
    ) -> Iterator[Tensor]:
        for decoded in decoded_chain(
            head, target.embedding, aux, ids, rows, true_tokens(ids, rows, k)
        ):
            yield head.logits(head.output(decoded))

    def most_drafts(self, config: HeadConfig) -> float:
        return math.inf

    def target_ids(self, head: Eagle3Head) -> Tensor:
        return head.target_ids()

    def save(
        self,
        head: Eagle3Head,
        folder: Path,
        provenance: Provenance,
        *,
        k: int,
        format: Format = "vllm",
        embedding: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        save_head(
            head,
            folder,
            provenance,
            format=format,
            speculative_tokens=k,
            embedding=embedding,
            dtype=dtype,
        )

    def speculative_config(self, folder: str, k: int, method: str) -> dict[str, Any]:
        # The reduction chooses the same drafts for less: among the ids that the head can draft, not
        # over the target's whole vocabulary. vLLM has it for every class of EAGLE-3 heads, and
        # refuses it with drafts that are drawn.
        reduced = {"use_local_argmax_reduction": True} if method == "greedy" else {}
        return {
            "method": "eagle3",
            "model": folder,
            "num_speculative_tokens": k,
            "draft_sample_method": method,
            **reduced,
        }

    def inspect(self, folder: Path, target: Target | None, deep: bool) -> dict[str, Any]:
        return inspect_head(folder, target, deep=deep)

    def load(self, folder: Path, target: Target | None = None) -> tuple[Eagle3Head, Tensor | None]:
        loaded = load_head(folder, target)
        return loaded.head, loaded.embedding
