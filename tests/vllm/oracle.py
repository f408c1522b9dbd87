"""Drafts that are right in text that does not repeat itself.

The head of ``models.write_head`` is right only where the target repeats one token, and there a
convolution's state is nearly the same one token earlier or later: much can be wrong with it before
another token comes out. Here n-gram's proposers are replaced by one that knows what plain decoding
wrote, and spoils some of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def drafts(known: list[list[int]], written: list[int], k: int) -> list[int]:
    """The ``k`` tokens that follow ``written`` in one of the sequences ``known``, some spoilt.

    Zeros where plain decoding wrote something else, or nothing more.
    """
    at = len(written)
    rest = next((s[at:] for s in known if s[:at] == written), [])
    right = (rest + [0] * k)[:k]
    return [t ^ 1 if (at + i) % 5 == 4 else t for i, t in enumerate(right)]


@contextmanager
def proposing(known: list[list[int]]) -> Iterator[None]:
    """Let n-gram speculation, of either model runner, draft from the sequences ``known``."""
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer
    from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator

    older, newer = NgramProposer.batch_propose, NgramGPUSpeculator.propose

    def batch_propose(self, requests, valid, lengths, token_ids, k):
        return [
            drafts(known, token_ids[row, : lengths[row]].tolist(), k) if row in valid else []
            for row in range(requests)
        ]

    def propose(self, input_batch, *_, dummy_run=False, **__):
        rows = self.drafts[: input_batch.num_reqs]
        if not dummy_run:
            lengths, tokens = self.req_states.total_len.gpu, self.req_states.all_token_ids.gpu
            for row, state in enumerate(input_batch.idx_mapping.tolist()):
                written = tokens[state, : lengths[state]].tolist()
                rows[row] = torch.tensor(drafts(known, written, rows.shape[1]))
        return rows

    NgramProposer.batch_propose, NgramGPUSpeculator.propose = batch_propose, propose
    try:
        yield
    finally:
        NgramProposer.batch_propose, NgramGPUSpeculator.propose = older, newer
