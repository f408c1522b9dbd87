import os
import signal
from concurrent.futures import wait
from dataclasses import replace

import numpy as np
import pytest
import torch

from drafthead.errors import DraftheadError
from drafthead.fsio import read_json, write_json
from drafthead.states import Sample, StateReader, StateWriter, StoreMeta
from drafthead.states import reader as reader_module
from drafthead.states.format import decode, encode
from drafthead.states.writer import write_unit
from tests import disk
from tests.refused import refused

META = StoreMeta((1, 2), 4, 16, "fp32", 3, {"target": "tiny"})


def make_sample(seed: int, tokens: int = 9, states: int | None = None) -> Sample:
    g = torch.Generator().manual_seed(seed)
    return Sample(
        ids=torch.randint(0, 99, (tokens,), generator=g, dtype=torch.int32),
        loss_mask=torch.arange(tokens) >= 3,
        states=torch.randn(tokens - 1 if states is None else states, 3, 16, generator=g),
        num_aux=2,
        prompt_len=3,
        conversation=f"c{seed}",
        split="heldout" if seed % 4 == 0 else "train",
    )


def write(path, meta=META, units=3, per_unit=5, shard_bytes=1 << 30):
    meta = replace(meta, units=units)
    samples = [make_sample(i, tokens=5 + i % 7) for i in range(units * per_unit)]
    with StateWriter(path, meta, shard_bytes) as writer:
        for unit in range(units):
            writer.submit(unit, samples[unit * per_unit : (unit + 1) * per_unit], {"n": unit})
    return samples


@pytest.mark.parametrize("shard_bytes", [1 << 30, 1 << 11])
def test_round_trip_is_exact_in_fp32(tmp_path, shard_bytes):
    samples = write(tmp_path, shard_bytes=shard_bytes)
    reader = StateReader(tmp_path)
    assert len(reader) == len(samples)
    assert (len(reader.shards) > 3) == (shard_bytes < 1 << 30)
    for index, sample in enumerate(samples):
        found = reader[index]
        assert torch.equal(found.ids, sample.ids)
        assert found.ids.dtype == torch.int32
        assert torch.equal(found.loss_mask, sample.loss_mask)
        assert torch.equal(found.aux, sample.states[:, :2])
        assert torch.equal(found.last, sample.states[:, 2])
        assert (found.prompt_len, found.conversation, found.split) == (
            sample.prompt_len,
            sample.conversation,
            sample.split,
        )
    assert reader.tokens.tolist() == [len(s.ids) for s in samples]
    assert reader.states.tolist() == [len(s.states) for s in samples]
    assert reader.units[2].checks == {"n": 2}
    assert [reader.split[i] for i in reader.indices("heldout")] == ["heldout"] * 4
    with pytest.raises(IndexError):
        reader[len(samples)]


def test_some_of_the_captured_layers(tmp_path):
    samples = write(tmp_path, META)
    reader = StateReader(tmp_path, aux_layers=[2])
    assert reader.aux_layers == (2,)
    assert reader.meta.aux_layers == (1, 2)
    assert torch.equal(reader[4].aux, samples[4].states[:, 1:2])
    assert torch.equal(reader[4].last, samples[4].states[:, 2])
    with refused("head.aux_layers", [3], [1, 2]):
        StateReader(tmp_path, aux_layers=[2, 3])


def test_bf16_is_exact_for_bf16_states(tmp_path):
    sample = make_sample(1)
    states = sample.states.bfloat16()
    meta = StoreMeta((1, 2), 4, 16, "bf16", 1, {})
    with StateWriter(tmp_path, meta) as writer:
        writer.submit(0, [Sample(**(vars(sample) | {"states": states}))])
    assert torch.equal(StateReader(tmp_path)[0].states, states)


def test_fp8_has_a_scale_for_each_token_and_layer(tmp_path):
    states = make_sample(2, tokens=40).states * torch.tensor([1e-3, 1.0, 1e4])[None, :, None]
    states[5] *= 1000  # a massive first token must not cost the others their precision
    states[7] = 0
    decoded = decode(encode(states, "fp8"))
    # e4m3 keeps 3 bits of mantissa: half a step is 1/16 of the value, or of the row's smallest
    # normal number (2**-6 of 448 in scale units)
    row = states.abs().amax(-1, keepdim=True)
    assert ((decoded.float() - states).abs() <= states.abs() / 15 + row * 2**-9 / 448).all()
    meta = StoreMeta((1, 2), 4, 16, "fp8", 1, {})
    sample = Sample(**(vars(make_sample(2, tokens=40)) | {"states": states}))
    with StateWriter(tmp_path, meta) as writer:
        writer.submit(0, [sample])
    found = StateReader(tmp_path)[0]
    assert found.aux.dtype == found.last.dtype == torch.bfloat16
    assert torch.equal(found.aux, decoded[:, :2])
    assert torch.equal(found.to("cpu").last, decoded[:, 2])
    assert StateReader(tmp_path).meta.bytes_per_token == 3 * (16 + 4)
    states[3, 1, 2] = float("nan")
    states[4, 0, 0] = float("inf")
    scale = encode(states, "fp8")["scale"]
    assert (~scale.isfinite()).nonzero().tolist() == [[3, 1], [4, 0]]


def test_fp8_aux_keeps_what_the_teacher_reads(tmp_path):
    sample = make_sample(2, tokens=40)
    states = sample.states.bfloat16()
    aux = decode(encode(states[:, :2], "fp8"))
    meta = StoreMeta((1, 2), 4, 16, "fp8-aux", 1, {})
    assert meta.bytes_per_token == 2 * (16 + 4) + 2 * 16
    with StateWriter(tmp_path, meta) as writer:
        writer.submit(0, [replace(sample, states=states)])
    for file in ("meta.json", "unit-000000.json"):
        assert read_json(tmp_path / file, "")["version"] == 2  # earlier ones would not know it
    found = StateReader(tmp_path)[0]
    assert torch.equal(found.last, states[:, 2])
    assert torch.equal(found.aux, aux)
    assert torch.equal(decode(found.to("cpu").stored), torch.cat([aux, states[:, 2:]], dim=1))
    some = StateReader(tmp_path, aux_layers=[2])[0]
    assert torch.equal(some.aux, aux[:, 1:])
    assert torch.equal(some.last, states[:, 2])
    # A store that is copied, not encoded anew, must be of the same kind.
    with refused("c2", [39, 2, 16]):
        write_unit(tmp_path, replace(meta, encoding="fp8"), 0, [found], {}, 1 << 20)


def test_fp8_aux_with_the_last_layer_as_an_auxiliary_one(tmp_path):
    sample = replace(make_sample(1), states=make_sample(1).states[:, :2].bfloat16())
    with StateWriter(tmp_path, StoreMeta((1, 4), 4, 16, "fp8-aux", 1, {})) as writer:
        writer.submit(0, [sample])
    for layers in (None, [1, 4], [4]):
        found = StateReader(tmp_path, aux_layers=layers)[0]
        assert torch.equal(found.aux[:, -1], sample.states[:, 1])
        assert found.aux.shape[1] == len(layers or (1, 4))


def test_a_store_of_the_first_version_is_read(tmp_path):
    """What does not need the second is written as the first, byte for byte as ever."""
    for encoding in ("bf16", "fp8", "fp32"):
        write(tmp_path / encoding, replace(META, encoding=encoding))
        meta = tmp_path / encoding / "meta.json"
        assert read_json(meta, "")["version"] == 1
        assert len(StateReader(tmp_path / encoding)) == 15
    record = read_json(meta, "")
    forged = replace(StoreMeta.load(meta.parent), encoding="fp8-aux")
    write_json(meta, record | {"encoding": "fp8-aux", "fingerprint": forged.fingerprint})
    with refused("meta.json", "version 1", "fp8-aux"):
        StoreMeta.load(meta.parent)


def test_order_is_a_seeded_shuffle_across_shards(tmp_path):
    write(tmp_path, units=12, per_unit=6)
    reader = StateReader(tmp_path)
    order = reader.order(seed=3, pool=4)
    assert sorted(order.tolist()) == list(range(72))
    assert np.array_equal(order, reader.order(seed=3, pool=4))
    assert not np.array_equal(order, reader.order(seed=4, pool=4))
    # at most `pool` shards are in play at a time, and they are mixed
    shards = order // 6
    assert all(len(set(part)) == 4 for part in np.split(shards, 3))
    assert len(set(shards[:6])) > 1
    train = reader.order(seed=3, split="train")
    assert set(train.tolist()) == set(reader.indices("train").tolist())
    names = [sample.conversation for sample in reader.stream(train, ahead=3)]
    assert names == [f"c{i}" for i in train]


def test_layers_out_of_range_or_order():
    for bad in [(2, 1), (1, 5), ()]:
        with refused("capture.aux_layers"):
            StoreMeta(bad, 4, 16, "fp32", 1, {})
    assert StoreMeta((1, 4), 4, 16, "fp32", 1, {}).layers == (1, 4)


def test_a_store_of_other_inputs_is_refused_by_field(tmp_path):
    write(tmp_path)
    with refused(tmp_path, "target"):
        StateWriter(tmp_path, StoreMeta((1, 2), 4, 16, "fp32", 3, {"target": "other"}))


def test_full_disk_says_so_and_keeps_what_was_finished(tmp_path, monkeypatch):
    samples = [make_sample(i) for i in range(4)]
    with StateWriter(tmp_path, META) as writer:
        writer.submit(0, samples[:2])
        writer.submit(1, samples[2:])
    disk.fill(monkeypatch, "unit-000002-00")
    with (
        refused("unit-000002-00.safetensors"),
        StateWriter(tmp_path, META) as writer,
    ):
        writer.submit(2, [make_sample(9)])
    monkeypatch.undo()
    with refused("1 of 3 units", "drafthead capture RECIPE"):
        StateReader(tmp_path)
    assert len(StateReader(tmp_path, partial=True)) == 4
    assert not list(tmp_path.glob(".*.tmp"))
    with StateWriter(tmp_path, META) as writer:
        assert writer.has(1)
        assert not writer.has(2)
        writer.submit(2, [make_sample(9)])
    assert len(StateReader(tmp_path)) == 5


def killed_writer(store, step):
    """Write the store in a process that kills itself at its ``step``-th fsync or rename; returns
    whether it died of that."""
    child = os.fork()
    if child == 0:
        calls = 0

        def then_kill(real):
            def call(*args):
                nonlocal calls
                calls += 1
                if calls == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args)

            return call

        os.replace, os.fsync = then_kill(os.replace), then_kill(os.fsync)
        try:
            with StateWriter(store, META, pending=1) as writer:
                for unit in range(3):
                    if not writer.has(unit):
                        writer.submit(unit, [make_sample(unit * 2), make_sample(unit * 2 + 1)])
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_at_every_step_and_started_again_the_store_is_the_same(tmp_path):
    whole = tmp_path / "whole"
    with StateWriter(whole, META) as writer:
        for unit in range(3):
            writer.submit(unit, [make_sample(unit * 2), make_sample(unit * 2 + 1)])
    store = tmp_path / "killed"
    deaths = 0
    for step in [2, 3, 4, 5, 2, 3, 6, 99]:  # before and after each fsync and rename
        deaths += killed_writer(store, step)
        if (store / "meta.json").exists():
            seen = StateReader(store, partial=True)  # whatever is visible is whole
            assert all(len(seen[i].ids) for i in range(len(seen)))
    assert deaths >= 5
    names = sorted(p.name for p in whole.iterdir())
    assert sorted(p.name for p in store.iterdir() if not p.name.startswith(".")) == names
    for name in names:
        assert (store / name).read_bytes() == (whole / name).read_bytes()


def test_a_unit_made_again_with_fewer_shards_leaves_none_of_the_others(tmp_path):
    samples = [make_sample(i) for i in range(6)]
    for most in (1, 1 << 30):  # an engine on a GPU may answer anew, and more briefly
        with StateWriter(tmp_path, replace(META, units=1), most) as writer:
            writer.submit(0, samples)
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {"unit-000000-00.safetensors"}
    assert len(StateReader(tmp_path)) == 6


def test_shards_are_opened_ahead_once_and_only_so_far(tmp_path, monkeypatch):
    write(tmp_path, shard_bytes=1 << 11)
    opened, real = [], reader_module.open_shard

    def recorded(store, meta, shard, checksum):
        opened.append(shard.file)
        if shard.file == files[3]:
            raise DraftheadError("broken")
        return real(store, meta, shard, checksum)

    monkeypatch.setattr(reader_module, "open_shard", recorded)
    monkeypatch.setattr(reader_module, "AHEAD", 2)
    reader = StateReader(tmp_path)
    files = [shard.file for shard in reader.shards]
    first = [int(np.flatnonzero(reader._shard == shard)[0]) for shard in range(len(files))]

    def opened_by_now():
        wait(reader._open.values())
        return sorted(opened)

    reader.expect(range(len(reader)))
    assert opened_by_now() == files[:2]
    reader[first[0]]
    assert opened_by_now() == files[:3]
    reader[first[0]]
    assert opened_by_now() == files[:3]
    reader.expect([first[5], first[5], first[6]])  # before what was expected so far
    reader[first[1]]
    assert opened_by_now() == [*files[:3], files[5]]
    for shard in (5, 6, 2, 0):
        reader[first[shard]]
    assert opened_by_now() == files[:7]  # the fourth is broken: no matter until it is wanted
    with pytest.raises(DraftheadError, match="broken"):
        reader[first[3]]
    reader.close()
