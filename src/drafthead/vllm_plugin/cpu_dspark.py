"""DSpark heads on vLLM's CPU build, so that a laptop can rehearse the job.

vLLM serves them by its newer model runner alone, which the CPU build does not have. The older one
serves DFlash heads, the same network without a Markov head, by blocks of one query more than there
are drafts. On a CPU a DSpark head is run as a DFlash head that

- has as many queries as drafts: the anchor drafts too;
- draws its drafts one after the other, with what the Markov head adds.
"""

from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.spec_decode.dflash import DFlashProposer
from vllm.v1.worker import gpu_model_runner

ARCHITECTURE = "Qwen3DSparkModel"


def is_dspark(speculative_config: Any) -> bool:
    """Whether the head is one that this proposer runs."""
    draft = speculative_config.draft_model_config
    return draft is not None and ARCHITECTURE in (draft.hf_config.architectures or ())


def as_dflash(stock):
    """`SpeculativeConfig.__post_init__` that calls a DSpark head a DFlash one, on a CPU."""

    def __post_init__(self, *args, **named):
        result = stock(self, *args, **named)
        if current_platform.is_cpu() and self.method == "dspark" and is_dspark(self):
            if self.draft_sample_method != "greedy":
                raise ValueError("DSpark on a CPU drafts greedily: leave draft_sample_method out")
            self.method = "dflash"
        return result

    return __post_init__


class BlockProposer(DFlashProposer):
    """vLLM's DFlash proposer, and one of DSpark heads where the head is of that kind."""

    def __init__(self, vllm_config, device, runner=None):
        super().__init__(vllm_config, device, runner)
        self.markov = is_dspark(self.speculative_config)

    def set_inputs_first_pass(self, *args, **named):
        """As vLLM's, for one query less of each request; all of them draft."""
        if not self.markov:
            return super().set_inputs_first_pass(*args, **named)
        drafts: int = self.num_speculative_tokens  # type: ignore[has-type]
        self.num_speculative_tokens = drafts - 1
        try:
            queries, _, metadata = super().set_inputs_first_pass(*args, **named)
        finally:
            self.num_speculative_tokens = drafts
        return queries, torch.arange(queries, device=self.device), metadata

    def _greedy_sample(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [requests * drafts, H] -> target ids [requests * drafts]."""
        if not self.markov:
            return super()._greedy_sample(hidden_states)
        model, drafts = self.model, self.num_speculative_tokens
        base = model.compute_draft_logits(hidden_states).unflatten(0, (-1, drafts))
        previous = self.input_ids[: len(hidden_states) : drafts]  # the anchors
        chain = []
        for step in range(drafts):
            logits = base[:, step] + model.markov_bias(model.markov_embed(previous))
            previous = model.map_draft_to_target(logits.argmax(dim=-1))
            chain.append(previous)
        return torch.stack(chain, dim=1).flatten()


def apply() -> None:
    from vllm.config.speculative import SpeculativeConfig

    if gpu_model_runner.DFlashProposer is BlockProposer:
        return
    gpu_model_runner.DFlashProposer = BlockProposer
    SpeculativeConfig.__post_init__ = as_dflash(SpeculativeConfig.__post_init__)
