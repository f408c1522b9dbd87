"""The older runner's rejection sampler gets whole rows of logits for its bonus tokens.

It needs them for the log-probabilities of all that was accepted. A setting of some requests makes
the sampler return a few columns instead, and the engine ends. The rejection sampler does not
support that setting in any other way either, so it is taken out there.
"""

from dataclasses import replace

from .patch import Replacement


def _without_given_tokens(stock):
    def forward(self, metadata, draft_probs, logits, sampling_metadata):
        if sampling_metadata.logprob_token_ids:
            sampling_metadata = replace(sampling_metadata, logprob_token_ids=None)
        return stock(self, metadata, draft_probs, logits, sampling_metadata)

    return forward


REPLACEMENTS = (
    Replacement(
        "vllm.v1.sample.rejection_sampler:RejectionSampler.forward",
        "self metadata draft_probs logits sampling_metadata",
        _without_given_tokens,
    ),
)
