import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from drafthead.data import records
from drafthead.data.chats import Chat, load_chats, read_chats
from drafthead.recipe import PromptsSection, Source
from tests.refused import refused


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
    assert {c.turns for c in chats.train + chats.heldout} == {(("Hello?",),), (("Another",),)}
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
    assert Chat("Be brief.", (("One",), ("Two",)), "a") in chats.train + chats.heldout


def test_a_system_message_beside_the_conversation_is_kept(tmp_path):
    record = {"system": "Be brief.", "conversations": [{"from": "human", "value": "One"}]}
    chats = load_chats(section(jsonl(tmp_path / "a.jsonl", [record, {"prompt": "x"}])))
    assert Chat("Be brief.", (("One",),), "a") in chats.train + chats.heldout


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
    assert {c.turns for c in chats.train + chats.heldout} == {(("no tools",),), (("none either",),)}
    assert chats.left_out == {
        "tools": 2,
        "a system message that is not the first": 3,
    }


def test_parquet_is_read_as_jsonl_is(tmp_path):
    records = [{"messages": [{"role": "user", "content": f"q{i}"}]} for i in range(6)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    jsonl(tmp_path / "a.jsonl", records)
    a, b = (load_chats(section(tmp_path / f"a.{kind}")) for kind in ("parquet", "jsonl"))
    assert (a.train, a.heldout) == (b.train, b.heldout)
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
        "tools": 1,
        "starts with the assistant": 1,
        "empty message": 3,
        "no user message": 1,
        "half a character": 1,
    }
    assert len(load_chats(section(tmp_path / "a.jsonl", limit=2)).train) == 1


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', "line 2"),
        ('{"prompt": "a"}\n\n[1]\n', "line 3, list"),
        ('{"text": "a", "id": 1}\n', "line 1, text, id"),
        ('{"messages": {"role": "user"}}\n', "line 1, messages, dict"),
        ('{"messages": ["hi"]}\n', "line 1, message 0, str"),
        ('{"messages": "hi"}\n', "line 1, messages, JSON"),
        ("{\"messages\": \"[{'role': 'user', 'content': 1}]\"}\n", "line 1, messages, JSON"),
        ("{\"prompt\": \"[{'role': 'user', 'content': 1}]\"}\n", "line 1, prompt, JSON"),
        ('{"prompt": 5}\n', "line 1, prompt, int"),
        ('{"messages": [{"user": "hi", "assistant": "x"}]}\n', "line 1, user, assistant"),
        ('{"messages": [{"role": "user", "parts": ["hi"]}]}\n', "line 1, role, parts"),
        ('{"question": "Who?", "context": "Long ago."}\n', "line 1, context"),
        ('{"instruction": "And?", "history": [["a", "b"]]}\n', "line 1, history"),
        ("[" * 100_000 + "\n", "record 1"),
        ('[{"prompt": "a"}, {"prompt": "b"}', "record 3"),
        ('[{"prompt": "a"}, {"prompt": b}]', "record 2"),
        ('[{"prompt": "a"}, "b"]', "record 2, str"),
        ('[{"prompt": "a"}]\n[{"prompt": "b"}]\n', "bad.jsonl, 1 records"),
        ("[]", "bad.jsonl"),
        ("", "bad.jsonl"),
        ('{"messages": [{"role": "tool", "content": "x"}]}\n', "1 tools, line 1"),
        ('{"prompt": "only one"}\n', "prompts.heldout"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path, text, names):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with refused(*names.split(", ")):
        load_chats(section(path))


def of(records, tmp_path, **source):
    """The conversations of some records, and what was left out."""
    path = jsonl(tmp_path / "of.jsonl", records)
    chats, (counts,) = read_chats([Source(path=str(path), **source)])
    return chats, {reason: left.count for reason, left in counts.left_out.items()}


def user(text):
    return {"role": "user", "content": text}


def test_sources_that_overlap_are_counted_one_by_one(tmp_path):
    """The second stopped the run with the first one's counts: it had "no prompt in it"."""
    a = jsonl(tmp_path / "a.jsonl", [*prompts(5), {"prompt": ""}])
    b = jsonl(tmp_path / "b.jsonl", prompts(3))
    chats = load_chats(section(a, b))
    assert len(chats.train) == 4
    assert [source.conversations for source in chats.sources] == [5, 0]
    assert [list(source.left_out) for source in chats.sources] == [
        ["empty message"],
        ["seen before"],
    ]
    assert chats.sources[1].left_out["seen before"].examples[0] == f"{b}, line 1"
    assert chats.left_out == {"empty message": 1, "seen before": 3}
    assert any("b.jsonl" in note and "nothing new" in note for note in chats.sources[1].notes())
    bad = jsonl(tmp_path / "bad.jsonl", [{"prompt": "x", "tools": ["t"]}])
    with refused("bad.jsonl", "1 tools") as error:
        load_chats(section(a, bad))
    assert "empty message" not in str(error.value)


def test_user_messages_in_a_row_are_one_turn(tmp_path):
    """They were asked as two, with an answer between that no server would give."""
    answer = {"role": "assistant", "content": "x"}
    records = [{"messages": [user("a"), user("b"), answer, answer, user("c")]}, *prompts(1)]
    chat = of(records, tmp_path)[0][0]
    assert chat.turns == (("a", "b"), ("c",))
    assert chat.opening == [user("a"), user("b")]
    said = [{"role": "assistant", "content": "mine"}]
    assert chat.messages(["mine"]) == [user("a"), user("b"), *said, user("c")]
    assert chat.id != Chat(None, (("a",), ("b",), ("c",)), "").id
    # the names of all other conversations are as before, and with them the split
    assert Chat("S", (("a",), ("b",)), "").id == "9aac38709eeb6fb5"


def test_parts_of_text_are_joined_as_the_server_joins_them(tmp_path):
    parts = [{"type": "text", "text": "one"}, "two", {"type": "input_text", "text": "three"}]
    (chat,), _ = of([{"messages": [user(parts)]}], tmp_path)
    assert chat.turns == (("one\ntwo\nthree",),)


JSON_LIST = json.dumps([user("Hello"), {"role": "assistant", "content": "x"}, user("And?")])
TWO = (("Hello",), ("And?",))


@pytest.mark.parametrize("key", ["messages", "conversations", "prompt"])
def test_a_list_of_messages_as_json_is_read_as_that_list(tmp_path, key):
    """It was asked as the user's words."""
    pq.write_table(pa.Table.from_pylist([{key: JSON_LIST}]), tmp_path / "a.parquet")
    jsonl(tmp_path / "a.jsonl", [{key: JSON_LIST}])
    for suffix in ("parquet", "jsonl"):
        (chat,), _ = read_chats([Source(path=str(tmp_path / f"a.{suffix}"))])
        assert chat.turns == TWO


def test_json_that_is_the_users_own_words_is_asked(tmp_path):
    words = ["[1, 2, 3]", '[{"from": "Berlin", "to": "Rome"}]', JSON_LIST + " Why is this wrong?"]
    chats, _ = of([{"prompt": text} for text in words], tmp_path)
    assert [chat.turns for chat in chats] == [((text,),) for text in words]


@pytest.mark.parametrize("hub", [False, True])
def test_json_columns_of_datasets_are_read(tmp_path, hub):
    """`datasets` writes values of mixed types as Arrow's JSON: whole messages if one of them has a
    key more, and the content alone if one is a list of parts, strings in quotes of their own."""
    whole = [json.dumps(user("Hello") | extra) for extra in ({}, {"name": "Bob"})]
    contents = [json.dumps("Hi"), json.dumps([{"type": "text", "text": "Ho"}]), "42"]
    mixed = pa.struct([("role", pa.string()), ("content", pa.json_())])
    columns = (
        pa.array([[text] for text in whole]).cast(pa.list_(pa.json_())),
        pa.array([[user(text)] for text in contents]).cast(pa.list_(mixed)),
    )
    asked = []
    for number, column in enumerate(columns):
        folder = tmp_path / str(number)
        folder.mkdir()
        pq.write_table(pa.table({"messages": column}), folder / "train.parquet")
        place = {"dataset": str(folder)} if hub else {"path": str(folder / "train.parquet")}
        chats, _ = read_chats([Source(**place)])
        asked += [chat.turns[0][0] for chat in chats]
    assert asked == ["Hello", "Hi", "Ho", "42"]


def test_columns_of_older_datasets_are_read(tmp_path):
    table = {"from": ["human", "gpt", "human"], "value": ["Hello", "x", "And?"]}
    (chat,), _ = of([{"conversations": table}], tmp_path)
    assert chat.turns == TWO


ARRAY = [
    {"id": f"x_{i}", "conversations": [{"from": "human", "value": f"Name {i} birds, ü ]."}]}
    for i in range(50)
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_a_json_array_is_read(tmp_path, monkeypatch, indent, name, chunk):
    """ShareGPT's own file is one; it was "broken JSON"."""
    monkeypatch.setattr(records, "_CHUNK", chunk)
    text = "\ufeff \n" + json.dumps(ARRAY, indent=indent, ensure_ascii=False) + "\n"
    (tmp_path / name).write_text(text, encoding="utf-8")
    chats, _ = read_chats([Source(path=str(tmp_path / name))])
    assert [chat.turns[0][0] for chat in chats] == [f"Name {i} birds, ü ]." for i in range(50)]
    assert chats[4].where == f"{tmp_path / name}, record 5"
    cut = tmp_path / "cut.json"
    cut.write_text(text[: len(text) // 2], encoding="utf-8")
    with refused("cut.json, record 26"):
        read_chats([Source(path=str(cut))])


@pytest.mark.parametrize(
    ("record", "system", "turns"),
    [
        ({"conversation": [user("Hello")], "turn": 1, "model": "x"}, None, ["Hello"]),
        ({"conversations": [{"from": "prompter", "value": "Hello"}]}, None, ["Hello"]),
        ({"messages": [{"role": "developer", "content": "S"}, user("Hello")]}, "S", ["Hello"]),
        ({"messages": [{"role": "User", "content": None, "value": "Hello"}]}, None, ["Hello"]),
        ({"prompt": [{"role": "system", "content": "S"}, user("Hello")]}, "S", ["Hello"]),
        ({"turns": ["Hello", "And?"], "question_id": 81}, None, ["Hello", "And?"]),
        ({"instruction": "Hello", "input": "", "output": "x"}, None, ["Hello"]),
        ({"instruction": "Sum up", "input": "A text."}, None, ["Sum up\n\nA text."]),
        ({"instruction": "Sum up", "context": "A text."}, None, ["Sum up\n\nA text."]),
        ({"system_prompt": "S", "question": "Hello", "response": "x"}, "S", ["Hello"]),
        ({"system_prompt": "", "question": "Hello", "response": "x"}, None, ["Hello"]),
        ({"query": "Hello", "response": "x"}, None, ["Hello"]),
        ({"url": "/v1", "body": {"model": "x", "messages": [user("Hello")]}}, None, ["Hello"]),
        (
            {"system": "S", "conversations": [{"from": "system", "value": "S"}, user("Hello")]},
            "S",
            ["Hello"],
        ),
        ({"messages": [{"role": "system", "content": ""}, user("Hello")]}, "", ["Hello"]),
        ({"messages": [user("Hello"), {"role": "ai", "content": None}]}, None, ["Hello"]),
    ],
)
def test_other_forms_of_records(tmp_path, record, system, turns):
    (chat,), left_out = of([record], tmp_path)
    assert (chat.system, chat.turns) == (system, tuple((turn,) for turn in turns))
    assert not left_out


@pytest.mark.parametrize(
    ("reason", "more"),
    [
        ("images", {"image": "coco/1.jpg"}),  # LLaVA, ShareGPT4V
        ("images", {"images": [{"bytes": None, "path": "1.jpg"}]}),  # LLaMA-Factory, TRL
        ("images", {"image_url": "https://there/1.jpg"}),
        ("video", {"video": "1.mp4"}),
        ("video", {"videos": ["1.mp4"]}),
        ("audio", {"audios": ["1.wav"]}),
        ("audio", {"audio_path": "1.wav"}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),  # OpenAI
        ("tools", {"tools": '[{"name": "f"}]'}),  # xLAM, Glaive, ToolACE, APIGen
        ("tools", {"functions": [{"name": "f"}]}),  # OpenAI, before tools
        ("tools", {"function_call": {"name": "f"}}),
    ],
)
def test_more_than_text_is_left_out_in_any_column(tmp_path, reason, more):
    forms = [
        {"messages": [user("x")], **more},
        {"prompt": "y", **more},
        {"query": "z", "answers": "[]", **more},
        {"messages": [user("v") | more]},
        {"messages": [user("w"), {"role": "assistant", "content": None, **more}]},
    ]
    nothing = ({}, [], None, "", "[]", [None], {"path": None, "bytes": None}, float("nan"), False)
    empty = [{"prompt": f"e{i}", next(iter(more)): value} for i, value in enumerate(nothing)]
    chats, left_out = of([*forms, *empty], tmp_path)
    assert left_out == {reason: len(forms)}
    assert len(chats) == len(empty)


@pytest.mark.parametrize(
    ("reason", "part"),
    [
        ("images", {"type": "image_url", "image_url": {"url": "u"}}),
        ("images", {"type": "image"}),
        ("images", {"type": "input_image", "image_url": "u"}),
        ("images", {"type": None, "image_url": "u"}),
        ("video", {"type": "video", "video": "1.mp4"}),
        ("audio", {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}),
        ("tools", {"type": "tool_result", "content": "x"}),
        ("content that is not text", {"type": "file", "file": {"file_id": "1"}}),
        ("content that is not text", 5),
    ],
)
def test_content_parts_that_are_not_text(tmp_path, reason, part):
    records = [{"messages": [user([{"type": "text", "text": "What is this?"}, part])]}]
    with refused(f"1 {reason}"):
        of(records, tmp_path)
    assert of([*records, *prompts(1)], tmp_path)[1] == {reason: 1}


@pytest.mark.parametrize("role", ["tool", "function", "function_call", "observation"])
def test_what_tools_say_is_counted_as_tools(tmp_path, role):
    records = [{"conversations": [user("x"), {"from": role, "value": "{}"}]}, *prompts(1)]
    assert of(records, tmp_path)[1] == {"tools": 1}


def test_other_roles_are_counted(tmp_path):
    records = [{"conversations": [{"from": "narrator", "value": "x"}, user("y")]}, *prompts(1)]
    ((reason, count),) = of(records, tmp_path)[1].items()
    assert ("role" in reason, count) == (True, 1)


def test_other_bad_sources(tmp_path):
    with refused("none.jsonl"):
        load_chats(section(tmp_path / "none.jsonl"))
    (tmp_path / "a.csv").write_text("x")
    with refused("a.csv", ".csv"):
        load_chats(section(tmp_path / "a.csv"))
    (tmp_path / "a.parquet").write_text("not parquet")
    with refused("a.parquet"):
        load_chats(section(tmp_path / "a.parquet"))
    for kind, begin in {"Parquet": b"PAR1", "gzip": gzip.compress(b"{}"), "zip": b"PK\3\4"}.items():
        (tmp_path / "a.jsonl").write_bytes(begin)
        with refused("a.jsonl", kind):
            load_chats(section(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff\xfe"}\n')
    with refused("b.jsonl", "line 1"):
        load_chats(section(tmp_path / "b.jsonl"))
    os.mkfifo(tmp_path / "pipe")
    with refused("pipe"):
        load_chats(section(tmp_path / "pipe"))
    with refused("prompts.sources", "nothing"):
        load_chats(PromptsSection(sources=[{"dataset": str(tmp_path / "nothing")}]))
