"""How many floating-point operations a training step needs."""

from drafthead.drafters.eagle3.batch import Batch
from drafthead.head.config import HeadConfig


def operations(config: HeadConfig, batch: Batch) -> float:
    """Operations of one row, forward and backward, a multiply and an add counted as two.

    A product of [n, k] by [k, m] counts 2 n k m, three times that where both gradients are needed,
    twice where only the weight's is. Attention counts its seven products over the pairs that are
    seen. Norms, activations, loss, optimizer and whatever is computed twice count nothing.
    """
    h, ht, steps = config.hidden_size, config.target_hidden_size, len(batch.student)
    q = config.num_attention_heads * config.head_dim
    kv = 2 * config.num_key_value_heads * config.head_dim
    positions, live, rows = batch.tokens, len(batch.live), batch.rows
    mlp = 3 * h * config.intermediate_size
    pairs = sum(
        a * (b - a) + a * (a + 1) / 2
        for a, b in zip(batch.documents.q_lengths, batch.documents.k_lengths)
    )
    total = 2.0 * 2 * positions * config.num_aux_hidden_states * ht * h
    for index in range(config.num_hidden_layers):
        width = 2 * h if index == 0 else h
        queries = live if index == config.num_hidden_layers - 1 else positions
        total += 3 * 2 * (positions * width * kv + queries * (width * q + q * h + mlp))
        total += 3 * 2 * (steps - 1) * live * (width * (q + kv) + q * h + mlp)
        total += 3.5 * 4 * steps * pairs * q
    total += 3 * 2 * rows * h * config.draft_vocab_size
    return total + 2 * len(batch.labels) * ht * config.draft_vocab_size
