"""The reader that asks an engine for states, with a stand-in for the engine's process."""

import os
import queue
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from drafthead.capture import online
from drafthead.capture.plan import make_plan
from drafthead.capture.shared_memory import PAGE, PagePool, pages_needed
from drafthead.data.answers import Answer, write_part
from drafthead.errors import DraftheadError
from drafthead.recipe import parse_recipe
from drafthead.rundir import RunDir
from drafthead.states import Sample, StateReader, StateWriter
from tests.refused import refused
from tests.vllm.runs import recipe_for


def states_of(ids, meta):
    """[T - 1, L, Ht]: a stand-in for a model."""
    g = torch.Generator().manual_seed(int(ids.sum()))
    return torch.randn(len(ids) - 1, len(meta.layers), meta.hidden_size, generator=g)


class FakeEngine:
    """Fills pages as the engine's process does, a few requests at a time."""

    unusable: tuple[int, ...] = ()

    def __init__(self, what, module, order, log, environment):
        self.pages = PagePool.open(order["pages"])
        self.inbox, self.log, self.under_way = queue.Queue(), [], set()

    def send(self, message):
        _, _, pages = message
        assert not self.under_way & set(pages), "pages given out twice"
        self.under_way |= set(pages)
        self.log.append(message)
        self.inbox.put(message)

    def messages(self, due):
        while True:
            batch = [self.inbox.get()]
            while not self.inbox.empty() and len(batch) < 3:
                batch.append(self.inbox.get())
            if None in batch:
                return
            for _, index, pages in batch:
                if index == self.broken:
                    raise DraftheadError("captured states are all zero")
                self.pages.put(pages, [states_of(self.answers[index].ids, self.meta)])
                if index in self.unusable:
                    self.pages.clear(pages)
                self.under_way -= set(pages)
            yield {"ready": [number for number, _, _ in batch]}

    def close(self):
        self.inbox.put(None)


@pytest.fixture
def made(llama, tmp_path, monkeypatch):
    """A run with answers, an online reader over them, and a store of the same states."""
    chunk, rng = 5, random.Random(1)
    capture = {"mode": "online", "online_bytes": 6 * PAGE, "shard_bytes": 1 << 17}
    recipe = parse_recipe(recipe_for(llama, tmp_path, 18, chunk, capture=capture), "test")
    plan, run = make_plan(recipe), RunDir(tmp_path / "run")
    answers = []
    for unit, chats in enumerate(plan.units):
        part = []
        for chat, split in chats:
            prompt, answer = rng.randrange(2, 60), rng.randrange(1, 180)
            ids = np.array([rng.randrange(500) for _ in range(prompt + answer)], np.int32)
            mask = np.zeros(prompt, bool)
            part.append(
                Answer(chat.id, "s", split, ids[:prompt], mask, ids[prompt:], "stop", "text")
            )
        write_part(run.answers, unit, part, {})
        answers += part
    FakeEngine.answers, FakeEngine.meta, FakeEngine.broken = answers, plan.meta, None
    monkeypatch.setattr(online, "Child", FakeEngine)
    reader = online.open_states(recipe, run)
    with StateWriter(run.states, plan.meta, recipe.capture.shard_bytes) as writer:
        for unit in range(len(plan.units)):
            samples = [
                Sample(
                    torch.from_numpy(a.ids),
                    torch.from_numpy(a.loss_mask),
                    states_of(a.ids, plan.meta),
                    2,
                    len(a.prompt_ids),
                    a.conversation,
                    a.split,
                )
                for a in answers[unit * chunk : (unit + 1) * chunk]
            ]
            writer.submit(unit, samples)
    yield reader, StateReader(run.states)
    reader.close()


def same(a, b):
    return (
        torch.equal(a.states, b.states)
        and torch.equal(a.ids, b.ids)
        and torch.equal(a.loss_mask, b.loss_mask)
        and vars(a).keys() == vars(b).keys()
        and (a.prompt_len, a.conversation, a.split) == (b.prompt_len, b.conversation, b.split)
    )


def test_index_order_and_samples_are_those_of_a_store(made):
    reader, store = made
    assert len(store.shards) > len(store.units)  # so that the cut into shards matters
    for name in ("tokens", "states", "prompt", "conversation", "split"):
        assert getattr(reader, name).tolist() == getattr(store, name).tolist()
    for seed in range(3):
        assert reader.order(seed, "train").tolist() == store.order(seed, "train").tolist()
    reader.expect(range(len(reader)))
    assert all(same(reader[i], store[i]) for i in range(len(store)))


def test_what_is_expected_is_asked_for_in_order_and_as_far_as_there_is_room(made):
    reader, store = made
    order = reader.order(0).tolist() * 2
    reader.expect(order)
    need = np.cumsum([pages_needed(int(reader.states[i]) * 4 * 64 * 3) for i in order])
    asked = [index for _, index, _ in reader._child.log]
    assert asked == order[: np.searchsorted(need, 6, side="right")]
    assert 2 <= len(asked) < len(order)
    assert all(same(reader[i], store[i]) for i in order)
    assert [index for _, index, _ in reader._child.log] == order  # nothing twice
    assert sorted(reader._free) == list(range(6))


def test_threads_that_ask_for_anything_at_any_time_all_get_it(made):
    reader, store = made
    order = reader.order(1).tolist() * 10
    reader.expect(order)
    rng = random.Random(3)
    asked = [rng.randrange(len(store)) if rng.random() < 0.2 else i for i in order]

    def get(step):
        if step % 40 == 7:
            reader.expect(range(5))  # as an evaluation does
        return same(reader[asked[step]], store[asked[step]])

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(get, range(len(asked))))


def test_an_engines_fault_reaches_who_waits(made):
    reader, _ = made
    FakeEngine.broken = 7
    assert reader[3].conversation == reader.conversation[3]
    with pytest.raises(DraftheadError, match="all zero"):
        reader[7]
    with pytest.raises(DraftheadError, match="all zero"):
        reader[3]


def test_a_sample_without_usable_states_teaches_nothing_and_is_named(made, monkeypatch):
    reader, store = made
    monkeypatch.setattr(FakeEngine, "unusable", (3,))
    for _ in range(2):
        assert not reader[3].loss_mask.any()
    assert same(reader[4], store[4])
    (note,) = reader.notes()
    assert "1 conversations" in note
    assert "prompts.jsonl, line" in note
    monkeypatch.setattr(FakeEngine, "unusable", (3, 5))  # of 18
    with refused("capture.max_unusable", "2 of 18", "prompts.jsonl, line"):
        reader[5]


def test_layers_can_be_chosen(made):
    reader, store = made
    reader.aux_layers, reader.columns = (3,), [1, 2]
    sample = reader[2]
    assert torch.equal(sample.aux, store[2].states[:, 1:2])
    assert torch.equal(sample.last, store[2].states[:, 2])


def test_pages_are_shared_with_another_process():
    pages = PagePool.create(5)
    tensors = [torch.arange(PAGE // 4 + 7, dtype=torch.float32), torch.arange(9).bool()]
    size = sum(t.nbytes for t in tensors)
    child = os.fork()
    if child == 0:
        try:
            PagePool.open(pages.path).put([4, 1], tensors)
        finally:
            os._exit(0)
    os.waitpid(child, 0)  # this one: others of other tests may end now
    raw = pages.take([4, 1], size)
    assert torch.equal(raw[: tensors[0].nbytes].view(torch.float32), tensors[0])
    assert torch.equal(raw[tensors[0].nbytes :].view(torch.bool), tensors[1])
