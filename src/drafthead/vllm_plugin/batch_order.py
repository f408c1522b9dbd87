"""Decode rows come before prefill rows in the newer model runner's batches.

The metadata of short-conv layers splits a batch at its first prefill row, and the prefill kernel
reads the state at column 0 instead of at ``num_accepted_tokens - 1``. The newer runner sorts rows
without drafts of exactly ``1 + num_speculative_tokens`` tokens before the others; those are
prompt chunks, and a decode row that got no draft (the token budget left it one token) lands behind
them, in the prefill part, with a state that is off by its accepted drafts.
"""

from .patch import Replacement, original


def needed() -> bool:
    """Whether a decode row without drafts lands behind a prompt chunk as wide as a verify step."""
    from vllm.v1.worker.gpu import model_runner

    order = original(model_runner, "sort_batch_req_ids")({"prompt": 4, "decode": 1}, {}, 4)
    return list(order) != ["decode", "prompt"]


def sort_batch_req_ids(
    num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]], decode_query_len: int
) -> list[str]:
    """Verify rows of full width, other verify rows, then the rest from the shortest on.

    Of the rest only rows of one token can be decode rows, so they lead; the sort is stable and
    running requests precede new ones in ``num_tokens_per_req``.
    """

    def key(request_id: str) -> tuple[bool, bool, int]:
        rows = num_tokens_per_req[request_id]
        drafted = bool(draft_tokens.get(request_id))
        return not drafted, drafted and rows != decode_query_len, rows

    return sorted(num_tokens_per_req, key=key)


REPLACEMENTS = (
    Replacement(
        "vllm.v1.worker.gpu.model_runner:sort_batch_req_ids",
        "num_tokens_per_req draft_tokens decode_query_len",
        lambda _: sort_batch_req_ids,
    ),
)
