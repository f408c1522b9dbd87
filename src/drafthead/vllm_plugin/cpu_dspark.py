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
            self.method = "dflash"
        return result

    return __post_init__


def _one_query_less(stock):
    def set_inputs_first_pass(self, *args, **named):
        if not is_dspark(self.speculative_config):
            return stock(self, *args, **named)
        drafts = self.num_speculative_tokens
        # Where the load leaves none to draft, the pass still keeps the draft's cache.
        self.num_speculative_tokens = max(drafts - 1, 0)
        try:
            queries, _, metadata = stock(self, *args, **named)
        finally:
            self.num_speculative_tokens = drafts
        return queries, torch.arange(queries, device=self.device), metadata

    return set_inputs_first_pass


def _chain(proposer, hidden_states, choose):
    """hidden_states [requests * drafts, H] -> target ids [requests * drafts]. choose: of logits
    over the draft vocabulary [requests, Vd] the target ids to draft [requests]."""
    model, drafts = proposer.model, proposer.num_speculative_tokens
    base = model.compute_draft_logits(hidden_states).unflatten(0, (-1, drafts))
    previous = proposer.input_ids[: len(hidden_states) : drafts]  # the anchors
    chain = []
    for step in range(drafts):
        previous = choose(base[:, step] + model.markov_bias(model.markov_embed(previous)))
        chain.append(previous)
    return torch.stack(chain, dim=1).flatten()


def _one_after_the_other(stock):
    def _greedy_sample(self, hidden_states):
        if not is_dspark(self.speculative_config):
            return stock(self, hidden_states)
        likeliest = lambda logits: self.model.map_draft_to_target(logits.argmax(dim=-1))
        return _chain(self, hidden_states, likeliest)

    return _greedy_sample


def _drawn_one_after_the_other(stock):
    def _sample_draft_tokens(self, hidden_states, sampling_metadata):
        greedy = not self._enable_probabilistic_draft_probs or sampling_metadata.all_greedy
        if greedy or not is_dspark(self.speculative_config):
            return stock(self, hidden_states, sampling_metadata)
        from vllm.v1.spec_decode.llm_base_proposer import compute_probs_and_sample_next_token

        vocab = self.vllm_config.model_config.get_vocab_size()
        distributions = []

        def drawn(logits):
            ids = self.model.map_draft_to_target(torch.arange(logits.shape[-1]))
            whole = logits.new_full((len(logits), vocab), float("-inf"))
            whole[:, ids] = logits
            tokens, probabilities = compute_probs_and_sample_next_token(
                whole, sampling_metadata, self.use_fp64_gumbel
            )
            distributions.append(probabilities)
            return tokens

        tokens = _chain(self, hidden_states, drawn)
        return tokens, torch.stack(distributions, dim=1).flatten(0, 1)

    return _sample_draft_tokens


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
    Replacement(
        "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer._sample_draft_tokens",
        "self hidden_states sampling_metadata",
        _drawn_one_after_the_other,
    ),
)
