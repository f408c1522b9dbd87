"""The head's greedy drafts are chosen among the ids that it can draft.

A head with a draft vocabulary of its own gets its logits scattered into a row of the target's
vocabulary, draft pass by draft pass, of which only the largest is wanted. The model has a method
that takes the largest in the draft vocabulary and maps its id; vLLM uses it only when
``use_local_argmax_reduction`` is asked for, to save traffic between GPUs. It pays on one too.
``drafthead serve`` asks for it itself, whatever the head and the runner: this is for who serves
a head by another command.
"""

from .patch import Replacement


def _asked_for(stock):
    def _validate_local_argmax_reduction(self):
        # Runs once, after the draft model was loaded and before anything is captured.
        scale = getattr(getattr(self.model, "logits_processor", None), "scale", 0.0)
        if (
            self.method == "eagle3"
            and self.draft_logits is None  # probabilistic drafts need every logit
            and not self.enable_adaptive_verification  # so does its estimator
            and getattr(self.model, "draft_id_to_target_id", None) is not None
            and hasattr(self.model, "get_top_tokens")
            and scale > 0
        ):
            self.use_local_argmax_reduction = True
        return stock(self)

    return _validate_local_argmax_reduction


REPLACEMENTS = (
    Replacement(
        "vllm.v1.worker.gpu.spec_decode.speculator:"
        "DraftModelSpeculator._validate_local_argmax_reduction",
        "self",
        _asked_for,
    ),
)
