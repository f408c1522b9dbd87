"""The tiny hybrid's maker: its fast pass is transformers', its text and its chats are right."""

import pytest
import torch
from transformers import Lfm2MoeForCausalLM

from recipes.tiny_hybrid import model as hybrid
from recipes.tiny_hybrid.documents import documents, pack_rows, read_answers
from recipes.tiny_hybrid.prompts import prompts
from recipes.tiny_hybrid.state import load_state, save_state
from recipes.tiny_hybrid.tokenizer import SPECIALS, train_tokenizer


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Lfm2MoeForCausalLM(hybrid.config(256, tiny=True))
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if "inv_freq" not in name:  # away from zeros and ones, so that each of them shows
            value.data.add_(torch.randn_like(value) * 0.1)
    return model


def test_fast_pass_and_its_gradients_equal_transformers(model):
    ids = torch.randint(0, 256, (2, 33))
    weight = torch.randn(2, 33, 256)
    gradients = []
    for logits in (hybrid.forward(model, ids)[0], model(ids).logits):
        model.zero_grad()
        (logits * weight).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    for name, expected in gradients[1].items():
        scale = expected.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(
            gradients[0][name] / scale, expected / scale, rtol=0, atol=2e-4, msg=name
        )


def test_balance_evens_the_load(model):
    ids = torch.randint(0, 256, (4, 64))
    with torch.no_grad():
        spread = lambda loads: (loads.max(-1).values - loads.min(-1).values).mean().item()
        before = hybrid.forward(model, ids)[1]
        assert before.sum(-1).eq(4 * 64 * 2).all()  # top-2
        for _ in range(300):
            hybrid.balance(model, hybrid.forward(model, ids)[1], 1e-2)
        after = hybrid.forward(model, ids)[1]
    assert spread(after) < 0.3 * spread(before)


def test_training_state_comes_back(model, tmp_path):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 256, (1, 16))
    hybrid.forward(model, ids)[0].sum().backward()
    optimizer.step()
    model.model.layers[3].feed_forward.expert_bias += 1
    save_state(tmp_path / "state.safetensors", model, optimizer, 7, 1.5, 2.5)
    other = Lfm2MoeForCausalLM(model.config)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3)
    assert load_state(tmp_path / "state.safetensors", other, other_optimizer) == (7, 1.5, 2.5)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    moments = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert moments[0].keys() == moments[1].keys()
    assert all(
        torch.equal(moments[0][i][k], moments[1][i][k]) for i in moments[0] for k in moments[0][i]
    )


def test_prompts_are_distinct_and_repeatable():
    first = prompts(3000, seed=5)
    assert len(set(first)) == 3000
    assert first == prompts(3000, seed=5)
    assert not any("{" in p or "\n" in p or "|" in p for p in first)


def test_tokenizer_template_and_documents(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = [f"The fox number {i} went to the sea and found a key." for i in range(50)]
    tokenizer = train_tokenizer(text, 400, tmp_path / "tokenizer")
    assert [tokenizer.convert_tokens_to_ids(s) for s in SPECIALS] == list(range(8))
    assert (
        tokenizer.decode(tokenizer("Zoë 42!")["input_ids"], skip_special_tokens=True) == "Zoë 42!"
    )
    chat = [
        {"role": "user", "content": "The fox?"},
        {"role": "assistant", "content": "<think>hm</think> The sea."},
        {"role": "user", "content": "A key?"},
        {"role": "assistant", "content": "<think>so</think>The fox."},
    ]
    out = tokenizer.apply_chat_template(
        chat, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )
    ids, mask = out["input_ids"], out["assistant_masks"]
    assert tokenizer.decode(ids) == (
        "<|startoftext|><|im_start|>user\nThe fox?<|im_end|>\n"
        "<|im_start|>assistant\nThe sea.<|im_end|>\n"
        "<|im_start|>user\nA key?<|im_end|>\n"
        "<|im_start|>assistant\n<think>so</think>The fox.<|im_end|>\n"
    )
    marked = tokenizer.decode([i for i, m in zip(ids, mask) if m])
    assert marked == "The sea.<|im_end|><think>so</think>The fox.<|im_end|>"

    answers = ["It ends. ", "It ends. It is cut he", "no sentence"]
    table = {"prompt": ["a", "b", "c"], "answer": answers, "ended": [True, False, False]}
    pq.write_table(pa.table(table), tmp_path / "000.parquet")
    pairs = read_answers(tmp_path)
    assert pairs == [("a", "It ends."), ("b", "It ends.")]
    rows = documents(pairs * 20, tokenizer, seed=0)
    assert all(row[0] == 1 and row.count(1) == 1 for row in rows)
    kinds = {len([i for i in row if i == 6]) for row in rows}
    assert kinds == {0, 2, 4}  # plain text, one turn, two turns
    packed = pack_rows(rows, 16)
    flat = [i for row in rows for i in row]
    assert packed.flatten().tolist() == flat[: packed.size]
    assert len(flat) - packed.size < 16
