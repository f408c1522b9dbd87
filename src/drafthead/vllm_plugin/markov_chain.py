"""A DSpark head's drafts are drawn one after the other by one kernel each.

Each draft is the argmax of base logits plus what the Markov head adds for the draft before. vLLM
takes that in nine kernels: embedding, projection, sum, two of the argmax, three to map the id to
the target's vocabulary and one to keep it; bias and sum, rows of the draft vocabulary, go through
memory. Here a program holds a tile of the projection: it finds the draft before as the best of all
tiles, adds that draft's bias to its tile of base logits, and keeps the best of the tile. Bias and
sum are rounded as vLLM rounds them, so the drafts are the same.

Drafts drawn at a temperature, heads with a quantized or scaled projection, adaptive verification
and top-k candidates go vLLM's way.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.triton_utils import tl, triton

from .patch import Replacement

TILE, WIDE_TILE, NARROW = 128, 256, 1 << 16
"""Draft ids of a tile, and of one where the draft vocabulary is larger than the last."""


def _tile(ids: int) -> int:
    return TILE if ids <= NARROW else WIDE_TILE


@dataclass(frozen=True)
class Chain:
    """The Markov head of a draft model, and room for the best of each tile."""

    embedding: Tensor
    """``markov_w1`` [V, r]"""
    projection: Tensor
    """``markov_w2`` [Vd or more, r]"""
    offsets: Tensor | None
    """Target id minus draft id [Vd]; None if they are the same."""
    ids: int
    """Vd"""
    values: Tensor
    """Logits [2, requests, tiles], of the draft before and of this one; the tiles filled up with
    −∞ to a power of two."""
    places: Tensor
    """Their draft ids [2, requests, tiles]"""

    @staticmethod
    def of(model: Any, requests: int) -> "Chain":
        """Of a Qwen3DSparkForCausalLM that drafts for so many requests at most."""
        head, ids = model.model.markov_head, model.config.draft_vocab_size
        tiles = triton.next_power_of_2(-(-ids // _tile(ids)))
        shape, device = (2, requests, tiles), head.markov_w1.weight.device
        return Chain(
            head.markov_w1.weight,
            head.markov_w2.weight,
            model.draft_id_to_target_id,
            ids,
            torch.full(shape, float("-inf"), device=device),
            torch.zeros(shape, dtype=torch.int32, device=device),
        )

    def draft(self, base: Tensor, anchors: Tensor, drafts: Tensor) -> None:
        """Draft for each request.

        Args:
            base: base logits [requests, steps, Vd].
            anchors: the token before the first draft [requests], any stride.
            drafts: target ids [requests or more, steps], written.
        """
        requests, steps, _ = base.shape
        rank = self.embedding.shape[1]
        rows = 16 if requests <= 16 else 32
        grid = (-(-self.ids // _tile(self.ids)), -(-requests // rows))
        for step in range(steps + 1):
            _step_kernel[grid if step < steps else (1, grid[1])](
                base,
                base.stride(0),
                base.stride(1),
                anchors,
                anchors.stride(0),
                self.embedding,
                self.projection,
                self.projection if self.offsets is None else self.offsets,
                self.values,
                self.places,
                self.values.stride(0),
                drafts,
                drafts.stride(0),
                requests,
                self.ids,
                step,
                FIRST=step == 0,
                LAST=step == steps,
                MAPPED=self.offsets is not None,
                RANK=rank,
                PART=min(64, max(16, triton.next_power_of_2(rank))),
                ROWS=rows,
                TILE=_tile(self.ids),
                TILES=self.values.shape[2],
                EXACT=base.dtype == torch.float32,
            )


# Not specialized: each kind of number would be compiled again, for every graph.
@triton.jit(do_not_specialize=["requests", "step"])
def _step_kernel(
    base_ptr,  # [requests, steps, Vd]
    base_stride,
    base_step_stride,
    anchors_ptr,  # [requests]
    anchors_stride,
    embedding_ptr,  # [V, RANK]
    projection_ptr,  # [Vd, RANK]
    offsets_ptr,  # [Vd]
    values_ptr,  # [2, requests, TILES]
    places_ptr,  # [2, requests, TILES]
    room_stride,
    drafts_ptr,  # [requests, steps]
    drafts_stride,
    requests,
    ids,
    step,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    MAPPED: tl.constexpr,
    RANK: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    EXACT: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = row < requests
    if FIRST:
        previous = tl.load(anchors_ptr + row * anchors_stride, mask=live, other=0).to(tl.int64)
    else:
        # The best tile of the step before; of equal ones the first, as argmax has it.
        before = ((step - 1) % 2) * room_stride + row * TILES
        found = tl.load(
            values_ptr + before[:, None] + tl.arange(0, TILES)[None, :],
            mask=live[:, None],
            other=float("-inf"),
        )
        best = tl.argmax(found, axis=1)
        previous = tl.load(places_ptr + before + best, mask=live, other=0).to(tl.int64)
        if MAPPED:
            previous += tl.load(offsets_ptr + previous, mask=live, other=0)
        if tile == 0:
            tl.store(drafts_ptr + row * drafts_stride + (step - 1), previous, mask=live)
    if not LAST:
        place = tile * TILE + tl.arange(0, TILE)
        real = place < ids
        bias = tl.zeros((ROWS, TILE), tl.float32)
        for start in tl.static_range(0, RANK, PART):
            part = start + tl.arange(0, PART)
            inside = part < RANK
            embedded = tl.load(
                embedding_ptr + previous[:, None] * RANK + part[None, :],
                mask=live[:, None] & inside[None, :],
                other=0.0,
            )
            projected = tl.load(
                projection_ptr + place[None, :] * RANK + part[:, None],
                mask=real[None, :] & inside[:, None],
                other=0.0,
            )
            if EXACT:
                bias = tl.dot(embedded, projected, bias, input_precision="ieee")
            else:
                bias = tl.dot(embedded, projected, bias)
        base = tl.load(
            base_ptr
            + row.to(tl.int64)[:, None] * base_stride
            + step * base_step_stride
            + place[None, :],
            mask=live[:, None] & real[None, :],
            other=float("-inf"),
        )
        kind = base.dtype
        total = (base.to(tl.float32) + bias.to(kind).to(tl.float32)).to(kind).to(tl.float32)
        total = tl.where(real[None, :], total, float("-inf"))
        first = tl.minimum(tile * TILE + tl.argmax(total, axis=1), ids - 1)
        here = (step % 2) * room_stride + row * TILES + tile
        tl.store(values_ptr + here, tl.max(total, axis=1), mask=live)
        tl.store(places_ptr + here, first, mask=live)


def fits(speculator: Any, model: Any) -> bool:
    """Whether the drafts of a speculator are plain argmaxes of a head in the model's own type."""
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.model_executor.models.qwen3_dspark import Qwen3DSparkForCausalLM

    if not isinstance(model, Qwen3DSparkForCausalLM):
        return False
    head, logits = model.model.markov_head, model.logits_processor
    w1, w2 = head.markov_w1.weight, head.markov_w2
    return (
        speculator.draft_logits is None
        and not speculator.enable_adaptive_verification
        and getattr(speculator, "_draft_topk", None) is None
        and getattr(speculator, "draft_watermarker", None) is None
        and not hasattr(model, "sample_sequential")  # vLLM 0.33: its own kernels
        and not hasattr(model, "apply_output_logit_transform")
        and type(w2.quant_method) is UnquantizedEmbeddingMethod
        and w1.dtype == w2.weight.dtype
        and w1.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and w1.is_contiguous()
        and w2.weight.is_contiguous()
        and getattr(w2, "bias", None) is None
        and logits.scale == 1.0
        and logits.soft_cap is None
        and logits.head_dtype in (None, w1.dtype)
    )


def _with_room(stock):
    def load_draft_model(self, target_model, target_attn_layer_names):
        model = stock(self, target_model, target_attn_layer_names)
        # Before any graph is captured: graphs keep the addresses.
        self._drafthead_chain = Chain.of(model, self.max_num_reqs) if fits(self, model) else None
        return model

    return load_draft_model


def _in_one_kernel_each(stock):
    def _sample_sequential(self, num_reqs, head_hidden):
        chain = getattr(self, "_drafthead_chain", None)
        if chain is None:
            return stock(self, num_reqs, head_hidden)
        steps = self.num_speculative_steps
        hidden = head_hidden[self.sample_indices[: num_reqs * steps]]
        base = self.model.compute_draft_logits(hidden)
        if base.dtype != chain.embedding.dtype:
            return stock(self, num_reqs, head_hidden)
        queries = self.input_buffers.input_ids[: num_reqs * self.num_query_per_req]
        anchors = queries[:: self.num_query_per_req]
        return chain.draft(base.unflatten(0, (num_reqs, steps)), anchors, self.draft_tokens)

    return _sample_sequential


_SPECULATOR = "vllm.v1.worker.gpu.spec_decode.dspark.speculator:DSparkSpeculator"
REPLACEMENTS = (
    Replacement(
        f"{_SPECULATOR}.load_draft_model",
        "self target_model target_attn_layer_names",
        _with_room,
    ),
    Replacement(
        f"{_SPECULATOR}._sample_sequential", "self num_reqs head_hidden", _in_one_kernel_each
    ),
)
