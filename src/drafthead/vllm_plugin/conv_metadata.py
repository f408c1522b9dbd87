"""The metadata of short-conv layers is built once a step, not once for every group of them.

The cache planner spreads a hybrid's conv layers over several groups, which differ in nothing but
the blocks that hold their states. vLLM lets later groups take over the first one's metadata, but
not under speculation: taking over copies the accepted counts a second time, padded by then. So
every group splits the batch anew on the host and, with prefix caching, derives its state indices
in seven small kernels of its own. Here a batch of decode rows is not split at all, later groups
share the first one's counts, and the indices of all groups come from the one kernel that vLLM has
for this purpose (it asks a builder for `mamba_aligned_state_indices`).

Only the newer model runner shares metadata when it captures graphs as it does when it replays
them, so only there.
"""

from dataclasses import replace

import torch
from vllm.v1.attention.backends import mamba_attn
from vllm.v1.attention.backends.short_conv_attn import ShortConvAttentionMetadataBuilder

from .patch import Replacement


def _shares(builder) -> bool:
    return vars(builder).get("_drafthead_shares", False)


def _sharing(stock):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        stock(self, kv_cache_spec, layer_names, vllm_config, device)
        if (
            type(self) is ShortConvAttentionMetadataBuilder
            and vllm_config.use_v2_model_runner
            and self.use_spec_decode
            and not self.use_replayssm
        ):
            self.supports_update_block_table = self._drafthead_shares = True
            if device.type == "cuda":  # vLLM launches the kernel there only, and asserts it
                # The model state fills this in before it builds, with prefix caching only.
                self.mamba_aligned_state_indices = None

    return __init__


def _known_indices(builder) -> torch.Tensor | None:
    """This step's indices if the model state has derived them; they are good for one use."""
    known = getattr(builder, "mamba_aligned_state_indices", None)
    if known is not None:
        builder.mamba_aligned_state_indices = None
    return known


def _state_indices(builder, block_table: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
    """Blocks of the states [requests, 1 + drafts at least], int32."""
    known = _known_indices(builder)
    if known is not None:
        return known[: block_table.shape[0]]
    return mamba_attn.mamba_get_block_table_tensor(
        block_table,
        seq_lens,
        builder.kv_cache_spec,
        builder.vllm_config.cache_config.mamba_cache_mode,
    )


def _decodes_at_once(stock):
    def build(
        self,
        common_prefix_len,
        common_attn_metadata,
        fast_build=False,
        *,
        num_accepted_tokens=None,
        num_decode_draft_tokens_cpu=None,
        **rest,
    ):
        m = common_attn_metadata
        if not (
            _shares(self)
            and not rest
            and num_accepted_tokens is not None
            and m.max_query_len <= self.reorder_batch_threshold
            and not m.is_prefilling.any()
        ):
            if _shares(self):
                _known_indices(self)  # stock leaves them unused
            return stock(
                self,
                common_prefix_len,
                m,
                fast_build,
                num_accepted_tokens=num_accepted_tokens,
                num_decode_draft_tokens_cpu=num_decode_draft_tokens_cpu,
                **rest,
            )
        indices = _state_indices(self, m.block_table_tensor[: m.num_reqs], m.seq_lens[: m.num_reqs])
        metadata = self.metadata_cls(
            num_prefills=0,
            num_prefill_tokens=0,
            num_decodes=m.num_reqs,
            num_decode_tokens=m.num_actual_tokens,
            num_reqs=m.num_reqs,
            has_initial_states_p=None,
            query_start_loc_p=None,
            state_indices_tensor_p=indices[m.num_reqs :, 0],
            state_indices_tensor_d=indices[:, : 1 + self.num_spec_tokens],
            query_start_loc_d=m.query_start_loc[: m.num_reqs + 1],
            num_accepted_tokens=num_accepted_tokens[: m.num_reqs],
            seq_lens=m.seq_lens,
        )
        return self._update_metadata_for_cudagraph_capture(metadata)

    return build


def _counts_shared(stock):
    def update_block_table(self, metadata, blk_table, slot_mapping):
        if not _shares(self):
            return stock(self, metadata, blk_table, slot_mapping)
        decodes, prefills = metadata.num_decodes, metadata.num_prefills
        indices = _state_indices(self, blk_table, metadata.seq_lens)
        of_decodes = indices[:decodes, : 1 + self.num_spec_tokens]
        if (
            prefills == 0
            and decodes <= self.decode_cudagraph_max_bs
            and self.compilation_config.cudagraph_mode.has_full_cudagraphs()
        ):
            # Graphs were captured with this buffer; padded rows hold the null block.
            held = self.state_indices_tensor_d[: metadata.num_reqs]
            held[:decodes].copy_(of_decodes, non_blocking=True)
            if decodes < metadata.num_reqs:
                held[decodes:] = mamba_attn.NULL_BLOCK_ID
            of_decodes = held
        return replace(
            metadata,
            state_indices_tensor_d=of_decodes,
            state_indices_tensor_p=indices[decodes : decodes + prefills, 0],
        )

    return update_block_table


_BUILDER = "vllm.v1.attention.backends.short_conv_attn:ShortConvAttentionMetadataBuilder."
REPLACEMENTS = (
    Replacement(
        f"{_BUILDER}__init__", "self kv_cache_spec layer_names vllm_config device", _sharing
    ),
    Replacement(
        f"{_BUILDER}build",
        "self common_prefix_len common_attn_metadata fast_build num_accepted_tokens "
        "num_decode_draft_tokens_cpu kwargs",
        _decodes_at_once,
        text="d4933c7b3286e67e",
    ),
    Replacement(
        f"{_BUILDER}update_block_table",
        "self metadata blk_table slot_mapping",
        _counts_shared,
        text="5b70dd643a5e66a6",
    ),
)
