"""Heads of several kinds from one recipe: what each reads, where it lies, which is served."""

import re
import shutil

import pytest
import torch

from drafthead.drafters.dspark.checkpoint import save_head
from drafthead.drafters.dspark.init import new_head
from drafthead.errors import DraftheadError
from drafthead.fsio import read_json, write_json
from drafthead.kinds import each_kind
from drafthead.prove.choice import by_load, lead, to_serve
from drafthead.prove.prompts import Prompt
from drafthead.prove.proof import hash_folder, write_proof
from drafthead.prove.served import top_level
from drafthead.recipe import HeadSection, parse_recipe
from drafthead.rundir import RunDir
from drafthead.targets import load_target
from tests import tiny
from tests.prove import made_run
from tests.refused import refused
from tests.report.test_report import written


def parsed(target, **sections):
    base = {
        "name": "made",
        "target": {"path": str(target)},
        "prompts": {"sources": [{"path": "prompts.jsonl"}]},
        "head": {"kind": ["eagle3", "dspark"]},
    }
    return parse_recipe(base | sections, "test")


def test_each_kind_reads_its_own_columns_of_one_capture(tmp_path):
    llama = tiny.tiny_llama(tmp_path / "deep", layers=12)
    jobs = each_kind(parsed(llama), tmp_path)
    (eagle3, at), (dspark, beside) = jobs["eagle3"], jobs["dspark"]
    target = load_target(llama)
    spread = list(target.spread_aux_layers())
    assert eagle3.capture == dspark.capture
    assert dspark.capture.aux_layers == spread
    assert dspark.head.aux_layers is None
    assert eagle3.head.aux_layers == list(target.default_aux_layers())
    assert set(eagle3.head.aux_layers) < set(spread)
    assert at.states == beside.states == RunDir(tmp_path / "made").states
    assert at.head != beside.head
    assert at.record("capture", "done") == beside.record("capture", "done")
    assert at.record("train", "done") != beside.record("train", "done")
    few = each_kind(parsed(llama, capture={"aux_layers": [1, 4]}), tmp_path)
    assert few["eagle3"][0].head.aux_layers is None


def test_a_recipe_of_one_kind_is_left_as_it_is(llama, tmp_path):
    recipe = parsed(llama, head={"kind": ["dspark"]})
    assert each_kind(recipe, tmp_path) == {"dspark": (recipe, RunDir(tmp_path / "made"))}
    assert recipe.head.kind == "dspark"  # as recipes were recorded before


def test_settings_of_one_kind_are_no_others(llama, tmp_path):
    own = {"dspark": {"train": {"epochs": 9}, "head": {"num_hidden_layers": 2}}}
    recipe = parsed(
        llama,
        head={"kind": ["eagle3", "dspark"], "block_size": 5, "norm_before_fc": True},
        train={"epochs": 2},
        for_kind=own,
    )
    jobs = each_kind(recipe, tmp_path)
    eagle3, dspark = jobs["eagle3"][0], jobs["dspark"][0]
    assert (eagle3.train.epochs, eagle3.head.layers, eagle3.head.norm_before_fc) == (2, 1, True)
    assert (dspark.train.epochs, dspark.head.layers, dspark.head.block_size) == (9, 2, 5)
    with refused("for_kind.dspark", "train.epochs"):
        each_kind(parsed(llama, for_kind={"dspark": {"train": {"epochs": 0}}}), tmp_path)


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"head": {"kind": []}}, "head.kind"),
        ({"head": {"kind": ["dspark", "dspark"]}}, "head.kind"),
        ({"head": {"kind": "dspark", "norm_output": False}}, "head.norm_output"),
        ({"head": {"kind": "dspark"}, "train": {"ttt_steps": 2}}, "train.ttt_steps"),
        ({"head": {"kind": "dspark"}, "train": {"loss": "ce+smoothl1"}}, "train.loss"),
        ({"head": {}, "train": {"anchors": 0.5}}, "train.anchors"),
        ({"head": {}, "for_kind": {"eagle3": {}}}, "for_kind.eagle3"),
        ({"for_kind": {"dspark": {"capture": {}}}}, "for_kind.dspark.capture"),
    ],
)
def test_what_does_not_fit_the_kind_is_refused(llama, sections, field):
    with refused(field):
        parsed(llama, **sections)


def test_kinds_that_are_not_known_or_not_asked_for_are_refused(llama, tmp_path):
    for recipe, kind in (
        (parsed(llama, head={"kind": "dsparc"}), None),
        (parsed(llama, head={"kind": ["eagle3", "dsparc"]}), None),
        (parsed(llama, head={"kind": "eagle3"}), "dspark"),
    ):
        with pytest.raises(DraftheadError) as error:
            each_kind(recipe, tmp_path, kind)
        assert error.value.field == "head.kind"


@pytest.fixture
def both(tmp_path):
    """A measured run of both kinds, EAGLE-3 faster at one request, DSpark at 16."""
    recipe, run = made_run.make(tmp_path / "one")
    target = load_target(recipe.target.path)
    recipe = parsed(target.path)
    top = RunDir(tmp_path / "runs" / "made")
    shutil.copytree(run.vocab, top.vocab)
    for kind, gains in (("eagle3", {1: 1.3, 16: 1.0}), ("dspark", {1: 1.0, 16: 1.3})):
        place = top.of_kind(kind)
        shutil.copytree(run.root, place.root)
        if kind == "dspark":
            shutil.rmtree(place.head)
            d2t = torch.zeros(256, dtype=torch.int64)
            head = new_head(HeadSection(kind="dspark"), target, (1, 2, 3), d2t, 0)
            save_head(head, place.head, {}, dtype=torch.float32)
        first = made_run.cell(3, 1, gains[1])
        grid = [first, made_run.cell(3, 16, gains[16]), made_run.cell(1, 16, 0.5)]
        bench = read_json(place.bench_json, "") | top_level(first)
        head = {"sha256": hash_folder(place.head)}
        write_json(place.bench_json, bench | {"grid": grid, "beside": {}, "head": head})
        served = {k: {"command": ""} for k in (1, 3)}
        verify = read_json(place.verify_json, "")
        write_proof(place, str(target.path), target, verify, served, [Prompt([1], "c", "chat")])
    return recipe, top


def test_the_faster_kind_is_served_and_each_load_is_told(both):
    recipe, top = both
    runs = {kind: top.of_kind(kind) for kind in ("dspark", "eagle3")}
    one, many = by_load(runs)
    assert (next(iter(one)), next(iter(many))) == ("eagle3", "dspark")
    assert many["dspark"]["num_speculative_tokens"] == 3
    ratio, low, high = lead(many["dspark"], many["eagle3"])
    assert 1 < low < ratio < high
    served, run = to_serve(recipe, top.root.parent)
    assert (served.head.only_kind, run) == ("eagle3", top.of_kind("eagle3"))
    named, run = to_serve(recipe, top.root.parent, "dspark")
    assert (named.head.only_kind, run) == ("dspark", top.of_kind("dspark"))


def test_a_kind_that_is_not_lossless_or_not_measured_is_not_served(both):
    recipe, top = both
    eagle3, dspark = top.of_kind("eagle3"), top.of_kind("dspark")
    (eagle3.head / "config.json").write_text("{}")  # not the head that was proved
    assert to_serve(recipe, top.root.parent)[1] == dspark
    dspark.bench_json.unlink()
    with refused("--kind"):
        to_serve(recipe, top.root.parent)


def test_each_page_shows_both_and_speaks_of_its_own_kind(both):
    recipe, top = both
    jobs = each_kind(recipe, top.root.parent)
    pages = {kind: written(*job) for kind, job in jobs.items()}
    page, printed = pages["dspark"]
    assert "Which head to serve" in page
    assert re.search(r"DSpark, 1\.\d\d× as fast", page)
    card = (top.of_kind("dspark").head / "README.md").read_text()
    assert "A DSpark draft head" in card
    assert "'method': 'dspark'" in card
    for text in (card, printed.split("which head")[0]):
        assert "EAGLE-3" not in text
        assert "test steps" not in text
    assert top.report_html.read_text() == pages["eagle3"][0]
    assert "An EAGLE-3 draft head" in (top.of_kind("eagle3").head / "README.md").read_text()
