"""What the tiny hybrid is trained on: documents of chats and plain texts, packed into rows."""

import random
import re
from pathlib import Path

import numpy as np

CHAT_SHARE = 0.6  # of the documents, told as chats; the rest are plain text


def read_answers(folder: Path) -> list[tuple[str, str]]:
    """(prompt, answer) of every shard; an answer cut at the limit ends at its last sentence."""
    import pyarrow.parquet as pq

    pairs = []
    for shard in sorted(folder.glob("*.parquet")):
        table = pq.read_table(shard).to_pydict()
        for prompt, answer, ended in zip(table["prompt"], table["answer"], table["ended"]):
            text = answer.strip()
            if not ended:
                whole = re.match(r"(?s)(.*[.!?][\"')]*)(\s|$)", text)
                text = whole.group(1) if whole else ""
            if text:
                pairs.append((prompt, text))
    return pairs


def documents(pairs: list[tuple[str, str]], tokenizer, seed: int) -> list[list[int]]:
    """Token ids of each document: chats of one or two turns, and plain texts, in a mixed order."""
    draw = random.Random(seed)
    rows = []
    at = 0
    while at < len(pairs):
        if draw.random() < CHAT_SHARE:
            turns = 2 if draw.random() < 0.25 else 1
            chat = []
            for prompt, answer in pairs[at : at + turns]:
                chat += [{"role": "user", "content": prompt}]
                chat += [{"role": "assistant", "content": answer}]
            rows.append(tokenizer.apply_chat_template(chat, tokenize=False))
            at += turns
        else:
            rows.append("<|startoftext|>" + pairs[at][1] + "<|im_end|>")
            at += 1
    return tokenizer(rows, add_special_tokens=False)["input_ids"]


def pack_rows(documents: list[list[int]], length: int) -> np.ndarray:
    """All documents end to end, cut into rows [n, length]; the last short row is dropped."""
    flat = np.concatenate([np.asarray(d, dtype=np.int32) for d in documents])
    return flat[: len(flat) // length * length].reshape(-1, length)
