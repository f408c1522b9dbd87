import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from drafthead.data.chats import Chat, load_chats
from drafthead.errors import DraftheadError
from drafthead.recipe import PromptsSection


def section(*paths, heldout=1, seed=0, **source):
    sources = [{"path": str(path), **source} for path in paths]
    return PromptsSection(sources=sources, heldout=heldout, seed=seed)


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prompts(n, start=0):
    return [{"prompt": f"question number {i}"} for i in range(start, start + n)]


def test_three_forms_of_the_same_conversation_are_one(tmp_path):
    same = [
        {"prompt": "Hello?"},
        {"messages": [{"role": "user", "content": "Hello?"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}]},
        {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}]},
        {"prompt": "Another"},
    ]
    chats = load_chats(section(jsonl(tmp_path / "a.jsonl", same)))
    assert {c.turns for c in chats.train + chats.heldout} == {("Hello?",), ("Another",)}
    assert chats.left_out == {"seen before": 3}


def test_turns_and_system_message_are_kept_and_answers_dropped(tmp_path):
    record = {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "One"},
            {"from": "gpt", "value": "not the target's words"},
            {"from": "human", "value": "Two"},
        ]
    }
    chats = load_chats(section(jsonl(tmp_path / "a.jsonl", [record, {"prompt": "x"}])))
    assert Chat("Be brief.", ("One", "Two"), "a") in chats.train + chats.heldout


def test_a_system_message_beside_the_conversation_is_kept(tmp_path):
    record = {"system": "Be brief.", "conversations": [{"from": "human", "value": "One"}]}
    chats = load_chats(section(jsonl(tmp_path / "a.jsonl", [record, {"prompt": "x"}])))
    assert Chat("Be brief.", ("One",), "a") in chats.train + chats.heldout


def test_nothing_that_the_served_prompt_would_hold_is_dropped_in_silence(tmp_path):
    """Asked without its tools or a later system message, it would be another conversation."""
    user, system = ({"role": role, "content": role} for role in ("user", "system"))
    calling = {"role": "assistant", "content": "", "tool_calls": [{"id": "0"}]}
    records = [
        {"messages": [user], "tools": [{"type": "function"}]},
        {"messages": [user, calling]},
        {"messages": [system, system, user]},
        {"messages": [user, system, user]},
        {"messages": [system, user], "system": "another"},
        {"prompt": "no tools", "tools": "[]"},
        {"prompt": "none either", "tools": None, "system": ""},
    ]
    chats = load_chats(section(jsonl(tmp_path / "a.jsonl", records)))
    assert {c.turns for c in chats.train + chats.heldout} == {("no tools",), ("none either",)}
    assert chats.left_out == {
        "tools, images or other roles": 2,
        "a system message that is not the first": 3,
    }


def test_parquet_is_read_as_jsonl_is(tmp_path):
    records = [{"messages": [{"role": "user", "content": f"q{i}"}]} for i in range(6)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    jsonl(tmp_path / "a.jsonl", records)
    a, b = (load_chats(section(tmp_path / f"a.{kind}")) for kind in ("parquet", "jsonl"))
    assert a == b
    assert len(a.train) == 5


def test_a_data_set_is_read_through_datasets(tmp_path):
    jsonl(tmp_path / "train.jsonl", prompts(4))
    chats = load_chats(PromptsSection(sources=[{"dataset": str(tmp_path)}], heldout=1))
    assert len(chats.train) == 3


def test_split_follows_from_the_texts_alone(tmp_path):
    a, b = jsonl(tmp_path / "a.jsonl", prompts(40)), jsonl(tmp_path / "b.jsonl", prompts(40, 40))
    one, other = load_chats(section(a, b, heldout=10)), load_chats(section(b, a, heldout=10))
    assert {c.id for c in one.heldout} == {c.id for c in other.heldout}
    assert [(c.id, s) for c, s in one.all()] == [(c.id, s) for c, s in other.all()]
    assert len(one.heldout) == 10
    assert not {c.id for c in one.heldout} & {c.id for c in one.train}
    assert {c.id for c in load_chats(section(a, b, heldout=10, seed=1)).heldout} != {
        c.id for c in one.heldout
    }
    # more prompts never move one from training to the held-out side
    fewer = load_chats(section(a, heldout=10))
    assert {c.id for c in one.heldout} & {c.id for c in fewer.train + fewer.heldout} <= {
        c.id for c in fewer.heldout
    }


def test_what_cannot_be_asked_is_counted(tmp_path):
    records = [
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]},
        {"messages": [{"role": "user", "content": "  "}]},
        {"prompt": ""},
        {"messages": None, "prompt": None},
        {"messages": [{"role": "system", "content": "x"}]},
        {"prompt": "cut in the middle of an emoji \ud83d"},
        *prompts(3),
    ]
    chats = load_chats(section(jsonl(tmp_path / "a.jsonl", records)))
    assert chats.left_out == {
        "tools, images or other roles": 1,
        "starts with the assistant": 1,
        "empty message": 3,
        "no user message": 1,
        "half a character": 1,
    }
    assert len(load_chats(section(tmp_path / "a.jsonl", limit=2)).train) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', "line 2: broken JSON"),
        ('{"prompt": "a"}\n\n[1]\n', "line 3: a record is an object, found list"),
        ('{"question": "a"}\n', "line 1: no `messages`, `conversations` or `prompt`.*question"),
        ('{"messages": {"role": "user"}}\n', "line 1: `messages` is a dict, not a list"),
        ('{"messages": ["hi"]}\n', r"line 1: `messages`\[0\] is not an object"),
        ("[" * 100_000 + "\n", "line 1: broken JSON"),
        ("", "no prompt in it"),
        ('{"messages": [{"role": "tool", "content": "x"}]}\n', "no prompt in it.*1 tools"),
        ('{"prompt": "only one"}\n', "nothing would be left to train on"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(DraftheadError, match=message):
        load_chats(section(path))


def test_other_bad_sources(tmp_path):
    with pytest.raises(DraftheadError, match="no such file"):
        load_chats(section(tmp_path / "none.jsonl"))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DraftheadError, match=r"found \.csv"):
        load_chats(section(tmp_path / "a.csv"))
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(DraftheadError, match="not a readable Parquet file"):
        load_chats(section(tmp_path / "a.parquet"))
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff\xfe"}\n')
    with pytest.raises(DraftheadError, match="not UTF-8"):
        load_chats(section(tmp_path / "b.jsonl"))
    with pytest.raises(DraftheadError, match="cannot be loaded"):
        load_chats(PromptsSection(sources=[{"dataset": str(tmp_path / "nothing")}]))
