"""DSpark behind the interface of all drafters."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafthead.drafters.base import TargetSide
from drafthead.drafters.dspark.checkpoint import load_head, save_head
from drafthead.drafters.dspark.config import DSparkConfig
from drafthead.drafters.dspark.drafting import draft_blocks, told_blocks
from drafthead.drafters.dspark.formats import is_dspark, read_config
from drafthead.drafters.dspark.init import head_config, new_head
from drafthead.drafters.dspark.inspect import inspect_dspark
from drafthead.drafters.dspark.model import DSparkHead
from drafthead.drafters.dspark.packing import BlockBatch, BlockRow, pack_blocks
from drafthead.drafters.dspark.training import BlockObjective, BlockStep, operations
from drafthead.errors import DraftheadError
from drafthead.fsio import read_json
from drafthead.head.formats import Format, Provenance
from drafthead.ops.graphs import Graphs
from drafthead.ops.vocabulary import draft_ids
from drafthead.recipe import HeadSection, Recipe, TrainSection
from drafthead.states import Sample
from drafthead.targets import Target


class DSparkTrainer:
    """Blocks at random anchors of packed rows; other anchors for every row of the plan."""

    def __init__(self, head: DSparkHead, target: TargetSide, settings: TrainSection):
        if settings.loss == "ce+smoothl1":
            raise DraftheadError(
                "train.loss is ce+smoothl1, which compares states that a DSpark head does not "
                "have; use kl, ce+tv or acceptance",
                field="train.loss",
            )
        self.head, self.target, self.settings = head, target, settings
        self.steps = head.config.block_size
        self.to_draft = draft_ids(head.target_ids(), head.config.vocab_size)
        device, dtype = head.fc.weight.device, head.fc.weight.dtype
        mask = target.embedding[head.config.mask_token_id].to(device, dtype)
        objective = BlockObjective(settings.loss, settings.slot_decay)
        if head.lm_head is not None and settings.lm_head_rate == 0:
            head.lm_head.requires_grad_(False)
        compiled = device.type == "cuda"
        assert target.teacher is not None
        step = BlockStep(head, target.teacher, objective, mask, target.lm_head, compiled)
        self.backward, self.graphs = step.backward, Graphs(torch.device("cpu"))

    def pack(self, samples: list[Sample], number: int, pinned: bool) -> BlockRow | None:
        s, c = self.settings, self.head.config
        return pack_blocks(
            samples, c.block_size, s.anchors, self.to_draft, s.row_tokens, self.target.embedding,
            (s.seed, number), c.causal, pinned,
        )  # fmt: skip

    def supervised(self, batch: BlockBatch) -> int:
        return len(batch.slots)

    def operations(self, batch: BlockBatch) -> float:
        return operations(self.head, batch)


class DSpark:
    """Heads that draft a block at once."""

    kind = "dspark"
    name = "DSpark"
    prefixes = False

    def matches(self, raw: dict[str, Any]) -> bool:
        return is_dspark(raw)

    def default_k(self, recipe: Recipe) -> Sequence[int]:
        return [k for k in (5, 3, 7, 1) if k <= recipe.head.block_size]

    def training_words(self, recipe: Recipe) -> str:
        return (
            f"blocks of {recipe.head.block_size} at {recipe.train.anchors:.0%} of the positions of "
            "an epoch"
        )

    def shape(
        self, section: HeadSection, target: Target, aux_layers: tuple[int, ...], vocab: int
    ) -> DSparkConfig:
        return head_config(section, target, aux_layers, vocab)

    def read(self, folder: Path, target: Target | None = None) -> DSparkConfig:
        path = folder / "config.json"
        return read_config(read_json(path, "a head's configuration"), str(path))

    def new(
        self,
        section: HeadSection,
        target: Target,
        aux_layers: tuple[int, ...],
        d2t: Tensor,
        seed: int,
    ) -> DSparkHead:
        return new_head(section, target, aux_layers, d2t, seed)

    def trainer(
        self, head: DSparkHead, target: TargetSide, settings: TrainSection, k: int, rate: float
    ) -> DSparkTrainer:
        return DSparkTrainer(head, target, settings)

    def by_muon(self, name: str) -> bool:
        return not any(part in name for part in ("lm_head", "markov_head", "confidence_head"))

    def draft(
        self, head: DSparkHead, target: TargetSide, aux: Tensor, ids: Tensor, k: int, rows: Tensor
    ) -> Tensor:
        lm_head = target.lm_head if head.lm_head is None else None
        return draft_blocks(head, target.embedding, aux, ids, k, rows, lm_head)

    def true_path_logits(
        self, head: DSparkHead, target: TargetSide, aux: Tensor, ids: Tensor, k: int, rows: Tensor
    ) -> Iterator[Tensor]:
        lm_head = target.lm_head if head.lm_head is None else None
        return told_blocks(head, target.embedding, aux, ids, k, rows, lm_head)

    def most_drafts(self, config: DSparkConfig) -> float:
        return config.block_size

    def target_ids(self, head: DSparkHead) -> Tensor:
        return head.target_ids()

    def save(
        self,
        head: DSparkHead,
        folder: Path,
        provenance: Provenance,
        *,
        k: int,
        format: Format = "vllm",
        embedding: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        p = provenance
        about = {
            "drafthead_version": p.drafthead_version,
            "target": p.target,
            "target_fingerprint": p.target_fingerprint,
            "trained": p.trained,
        }
        verifier = {"name_or_path": p.target, "architectures": list(p.target_architectures)}
        save_head(
            head,
            folder,
            about,
            format=format,
            verifier=verifier,
            embedding=embedding,
            dtype=dtype,
        )

    def speculative_config(self, folder: str, k: int, method: str) -> dict[str, Any]:
        if Path(folder).is_dir() and k > (most := self.read(Path(folder)).block_size):
            # vLLM does not look, and drafts what no training has seen.
            raise DraftheadError(
                f"{folder}: {k} drafts a step, the head was trained for blocks of {most}",
                field="serve.num_speculative_tokens",
            )
        return {
            "method": "dspark",
            "model": folder,
            "num_speculative_tokens": k,
            "draft_sample_method": method,
        }

    def inspect(self, folder: Path, target: Target | None, deep: bool) -> dict[str, Any]:
        return inspect_dspark(folder, target)

    def load(self, folder: Path, target: Target | None = None) -> tuple[DSparkHead, Tensor | None]:
        loaded = load_head(folder)
        return loaded.head, loaded.embedding
