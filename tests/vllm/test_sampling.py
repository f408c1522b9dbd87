"""Sampling settings that stock vLLM's CPU engine does not survive with a head."""

from tests.prove import crafted
from tests.vllm.engines import eagle3, engine


def test_requests_are_answered_whatever_the_sampling(tmp_path):
    from vllm import SamplingParams

    target = crafted.target(tmp_path / "target")
    head = crafted.head(tmp_path / "head", target)
    settings = [{"temperature": 0.8, "top_k": 20, "seed": 1}, {"temperature": 0}]
    with engine(target, eagle3(head, 3)) as llm:
        for setting in settings:
            sampling = SamplingParams(**setting, max_tokens=6, ignore_eos=True, detokenize=False)
            (output,) = llm.generate([{"prompt_token_ids": [20, 21]}], sampling, use_tqdm=False)
            assert len(output.outputs[0].token_ids) == 6
