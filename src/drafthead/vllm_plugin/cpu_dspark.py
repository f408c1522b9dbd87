"""DSpark heads on vLLM's CPU build, so that a laptop can rehearse the job.

vLLM serves them by its newer model runner alone, which the CPU build does not have. The older one
serves DFlash heads, the same network without a Markov head, by blocks of one query more than there
are drafts. On a CPU a DSpark head is run as a DFlash head that

- has as many queries as drafts: the anchor drafts too;
- draws its drafts one after the other, with what the Markov head adds.
"""

from typing import Any

import torch

from .patch import Replacement

ARCHITECTURE = "Qwen3DSparkModel"


def is_dspark(speculative_config: Any) -> bool:
    """Whether the head is one that this patch runs."""
    draft = speculative_config.draft_model_config
    return draft is not None and ARCHITECTURE in (draft.hf_config.architectures or ())


def _as_dflash(stock):
    def __post_init__(self):
        result = stock(self)
        if self.method == "dspark" and is_dspark(self):
            if self.draft_sample_method != "greedy":
                raise ValueError("DSpark on a CPU drafts greedily: leave draft_sample_method out")
            self.method = "dflash"
        return result

    return __post_init__


def _one_query_less(stock):
    def set_inputs_first_pass(self, *args, **named):
        if not is_dspark(self.speculative_config):
            return stock(self, *args, **named)
        drafts = self.num_speculative_tokens
        self.num_speculative_tokens = drafts - 1
        try:
            queries, _, metadata = stock(self, *args, **named)
        finally:
            self.num_speculative_tokens = drafts
        return queries, torch.arange(queries, device=self.device), metadata

    return set_inputs_first_pass


def _one_after_the_other(stock):
    def _greedy_sample(self, hidden_states):
        """hidden_states [requests * drafts, H] -> target ids [requests * drafts]."""
        if not is_dspark(self.speculative_config):
            return stock(self, hidden_states)
        model, drafts = self.model, self.num_speculative_tokens
        base = model.compute_draft_logits(hidden_states).unflatten(0, (-1, drafts))
        previous = self.input_ids[: len(hidden_states) : drafts]  # the anchors
        chain = []
        for step in range(drafts):
            logits = base[:, step] + model.markov_bias(model.markov_embed(previous))
            previous = model.map_draft_to_target(logits.argmax(dim=-1))
            chain.append(previous)
        return torch.stack(chain, dim=1).flatten()

    return _greedy_sample


REPLACEMENTS = (
    Replacement("vllm.config.speculative:SpeculativeConfig.__post_init__", "self", _as_dflash),
    Replacement(
        "vllm.v1.spec_decode.dflash:DFlashProposer.set_inputs_first_pass",
        "self target_token_ids next_token_ids target_positions target_hidden_states "
        "token_indices_to_sample cad num_rejected_tokens_gpu",
        _one_query_less,
    ),
    Replacement(
        "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer._greedy_sample",
        "self hidden_states",
        _one_after_the_other,
    ),
)
