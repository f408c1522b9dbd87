"""A later vLLM that the plugin does not know: the installed one under another number, with two
functions that patches replace under other names.

    python -m tests.vllm.later TARGET HEAD      (prints JSON)
"""

import json
import sys
from pathlib import Path

import tests.conftest  # noqa: F401  (the environment, before vLLM reads it)


def move(owner: type, name: str) -> None:
    """Let ``owner`` have its function under another name; who calls the old one gets it still,
    from above the class, where no patch looks."""
    function = vars(owner)[name]
    setattr(owner, f"{name}_now", function)
    owner.__getattribute__ = _renamed(owner.__getattribute__, name)
    delattr(owner, name)


def _renamed(stock, name):
    def __getattribute__(self, asked):
        return stock(self, f"{name}_now" if asked == name else asked)

    return __getattribute__


def main(target: str, head: str) -> None:
    import vllm
    from vllm.model_executor.models.interfaces import EagleModelMixin
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    vllm.__version__ = "0.34.0"
    move(EagleModelMixin, "_maybe_add_hidden_state")
    move(GPUModelRunner, "_may_reorder_batch")
    from drafthead.vllm_plugin import registry
    from tests.vllm.engines import answers, counter, eagle3, engine, stress

    requests = [request for request in stress() if len(request[0]) > 1][:12]
    with engine(Path(target)) as llm:
        alone = answers(llm, requests)
    with engine(Path(target), eagle3(Path(head), 3)) as llm:
        told = {
            "alone": alone,
            "with head": answers(llm, requests),
            "accepted": counter(llm, "spec_decode_num_accepted_tokens"),
        }
    for status in registry.statuses():
        if status.unprotected:
            told.setdefault(status.state, []).append(status.patch.name)
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
