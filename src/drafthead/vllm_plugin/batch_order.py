"""Decode rows come before prefill rows in the newer model runner's batches.

The metadata of short-conv layers splits a batch at its first prefill row, and the prefill kernel
reads the state at column 0 instead of at ``num_accepted_tokens - 1``. The newer runner sorts rows
without drafts of exactly ``1 + num_speculative_tokens`` tokens before the others; those are
prompt chunks, and a decode row that got no draft (the token budget left it one token) lands behind
them, in the prefill part, with a state that is off by its accepted drafts.
"""

from .patch import log, still_has, wrap

FAULT = """        not draft_tokens.get(r),
        (num := num_tokens_per_req[r]) != decode_query_len,
"""


def apply() -> None:
    try:
        from vllm.v1.worker.gpu import model_runner
    except ImportError:
        log.debug("drafthead: no newer model runner here; 'batch_order' is not needed.")
        return
    if still_has(model_runner.sort_batch_req_ids, FAULT, "batch_order"):
        wrap(model_runner, "sort_batch_req_ids", lambda _: sort_batch_req_ids)


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
