"""A DSpark head that has nothing to draft in a step does not draft.

With ``num_speculative_tokens_per_batch_size`` a busy step may ask for no drafts. vLLM drafts the
whole block all the same and drops it. Here only the head's cache is kept up to date, from which it
drafts again when fewer requests run.
"""

from .patch import Replacement


def _only_its_cache(stock):
    def propose(self, *args, num_speculative_tokens=None, is_profile=False, **named):
        # The graph drafts, so such a step runs without, as vLLM's profiling does.
        self._drafthead_rests = num_speculative_tokens == 0 and not named.get("dummy_run", False)
        return stock(
            self,
            *args,
            num_speculative_tokens=num_speculative_tokens,
            is_profile=is_profile or self._drafthead_rests,
            **named,
        )

    return propose


def _unless_it_rests(stock):
    def _generate_draft(self, *args, **named):
        if not getattr(self, "_drafthead_rests", False):
            stock(self, *args, **named)

    return _generate_draft


_SPECULATORS = "vllm.v1.worker.gpu.spec_decode."
REPLACEMENTS = (
    Replacement(
        f"{_SPECULATORS}dflash.speculator:DFlashSpeculator.propose",
        "self num_speculative_tokens is_profile dummy_run *",
        _only_its_cache,
    ),
    Replacement(
        f"{_SPECULATORS}dspark.speculator:DSparkSpeculator._generate_draft",
        "self num_reqs *",
        _unless_it_rests,
    ),
)
