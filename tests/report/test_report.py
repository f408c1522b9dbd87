"""The report says what was measured, whatever came out, and needs nothing from outside."""

import itertools
import re
import xml.etree.ElementTree as ET

import markdown
import pytest
from rich.console import Console

from drafthead.fsio import read_json, write_json
from drafthead.prove.prompts import Prompt
from drafthead.prove.proof import write_proof
from drafthead.report import charts
from drafthead.report.page import report
from drafthead.targets import load_target
from tests.prove import made_run
from tests.prove.made_run import MACHINE
from tests.refused import refused


def written(recipe, run):
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    report(recipe, run, console=console)
    html = run.report_html.read_text()
    return html, console.export_text()


def test_every_form_quotes_the_measured_figures(tmp_path):
    recipe, run = made_run.make(tmp_path)
    bench = read_json(run.bench_json, "")
    ratio = f"{bench['speedup']:.2f}×"
    low, high = (f"{v:.2f}" for v in bench["speedup_ci95"])
    for text in written(recipe, run):
        assert ratio in text
        assert low in text
        assert high in text
        assert f"{bench['base_tokens_per_s']:.1f}" in text
        assert "63 of 64 answers identical" in text
        assert "faster with the head" in text
    assert "1.3% of the time waiting for data" in written(recipe, run)[0]


def test_page_is_self_contained_and_its_charts_are_well_formed(tmp_path):
    recipe, run = made_run.make(tmp_path)
    html, _ = written(recipe, run)
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\(|src=|href=|https?://", html)
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) == 7
    for drawing in drawings:
        root = ET.fromstring(drawing)
        assert len(root.attrib["aria-label"]) > 20
        assert "nan" not in drawing
        assert "style=" not in drawing  # colours are the page's, light or dark


def test_slower_and_not_lossless_are_said_first(tmp_path):
    recipe, run = made_run.make(tmp_path, gain=0.4, lossless=False)
    for text in written(recipe, run):
        assert "slower with the head on this machine" in text
        assert "NOT LOSSLESS" in text
        assert "faster" not in text


def test_an_interval_over_one_is_said(tmp_path):
    recipe, run = made_run.make(tmp_path)
    bench = read_json(run.bench_json, "")
    bench |= {"speedup": 1.01, "speedup_ci95": [0.97, 1.05], "verdict": "not distinguishable"}
    bench["grid"][0] |= {name: bench[name] for name in ("speedup", "speedup_ci95", "verdict")}
    write_json(run.bench_json, bench)
    html, terminal = written(recipe, run)
    for text in (html, terminal):
        assert "spans 1" in text
        assert "faster" not in text
    # The figure that tells nothing is not what the page says first, nor in its largest type.
    (headline,) = re.findall(r'<p class="(headline[^"]*)">([^<]*)</p>', html)
    assert "ratio" not in headline[0]
    assert "1.01" not in headline[1]
    assert "**1.01×**" not in (run.head / "README.md").read_text()


def test_more_than_the_tokens_a_step_can_give_is_doubted(tmp_path):
    recipe, run = made_run.make(tmp_path)
    for length, doubted in ((2.0, False), (1.2, True)):
        bench = read_json(run.bench_json, "")
        write_json(run.bench_json, bench | {"speedup": 1.68, "accepted_length": length})
        html, terminal = written(recipe, run)
        card = (run.head / "README.md").read_text()
        for text in (html, terminal, card):
            assert ("step can give" in re.sub(r"[\s│]+", " ", text)) is doubted
        assert ("1.68" in re.search(r'<p class="headline[^>]*>([^<]*)', html)[1]) is not doubted


def test_what_can_be_told_is_the_headline(tmp_path):
    recipe, run = made_run.make(tmp_path)
    ratio = f"{read_json(run.bench_json, '')['speedup']:.2f}×"
    html, _ = written(recipe, run)
    assert re.search(rf'<p class="headline ratio good">{ratio}</p>', html)


def test_a_head_without_training_here_has_a_report_too(tmp_path):
    recipe, run = made_run.make(tmp_path, ks=(3,))
    (run.train / "best.json").unlink()
    (run.train / "metrics.jsonl").unlink()
    (run.vocab / "coverage.json").unlink()
    bench = read_json(run.bench_json, "")
    bench |= {"predicted_acceptance_by_position": None, "predicted_accepted_length": None}
    write_json(run.bench_json, bench)
    html, _ = written(recipe, run)
    assert html.count("<svg") == 4
    assert "Served as predicted" not in html


@pytest.mark.parametrize("start", [None, "a/head/of/another/run"])
def test_a_head_that_brought_its_vocabulary_is_not_told_this_runs(tmp_path, start):
    recipe, run = made_run.make(tmp_path, ks=(3,))
    given = recipe.train.model_copy(update={"start_from": start})
    html, _ = written(recipe.model_copy(update={"train": given}), run)
    card = (run.head / "README.md").read_text()
    told = "Share of the tokens that the target wrote" in html
    assert told == ("outside the draft vocabulary" in card) == (start is None)
    assert ("trained on from another head" in card) == (start is not None)
    assert "a/head/of/another/run" not in card


def test_answers_of_one_token_have_a_report_too(tmp_path):
    recipe, run = made_run.make(tmp_path, ks=(3,))
    bench = read_json(run.bench_json, "")
    write_json(run.bench_json, bench | {"acceptance_by_position": [], "accepted_length": None})
    html, _ = written(recipe, run)
    assert "Acceptance by position" not in html


def test_names_are_escaped_and_another_head_is_refused(tmp_path):
    recipe, run = made_run.make(tmp_path / "<b>&")
    bench = read_json(run.bench_json, "")
    bench["commands"]["3"] = "vllm serve '<b>&/target'"
    write_json(run.bench_json, bench)
    html, _ = written(recipe, run)
    assert "<b>&" not in html
    assert "&lt;b&gt;&amp;" in html
    write_json(run.head / "config.json", read_json(run.head / "config.json", "") | {"a": 1})
    with refused("proof.json", "config.json", field="head"):
        report(recipe, run, console=Console(quiet=True))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.31, 0.97), (2.05, 2.2), (0, 49152), (-3, 3), (5, 5), (0, 1e-4)]
)
def test_ticks_are_round_and_cover(low, high):
    found = charts.ticks(low, high)
    assert found[0] <= low + 1e-9
    assert found[-1] >= high - 1e-9
    assert 2 <= len(found) <= 8
    assert all(len(f"{tick:.10g}") <= 7 for tick in found)


def test_the_grid_and_what_stands_beside(tmp_path):
    recipe, run = made_run.make(tmp_path)
    bench = read_json(run.bench_json, "")
    unsure = bench["grid"][4]
    unsure |= {"speedup_ci95": [0.9, 1.1], "verdict": "not distinguishable: the interval spans 1"}
    write_json(run.bench_json, bench)
    html, _ = written(recipe, run)
    assert "chat: k=3, 1 at once" in html
    for cell in bench["grid"]:
        assert f"{cell['speedup']:.2f}×" in html
    assert html.count("spans 1") >= 2  # in the grid and in the table of speeds
    assert "other" in html
    assert "ngram" in html
    assert "k = 3 is the fastest of k = 1, 3, 5" in html
    assert "not proved" not in html
    assert "p = 0.43" in html


def test_every_table_of_the_card_is_one(tmp_path):
    """A blank line under its head, and it is lines of bars."""
    recipe, run = made_run.make(tmp_path)
    written(recipe, run)
    card = (run.head / "README.md").read_text()
    html = markdown.markdown(card, extensions=["tables", "fenced_code"])
    assert html.count("<table>") >= 3
    assert not re.search(r"^(<p>)?\|", html, re.MULTILINE)


def test_names_and_figures_have_room_in_the_charts():
    """At eleven units a letter is about 6.2 wide, in bold a figure 7.7 and a percent sign 11."""
    names = ["code, k = 3", "customer_support_conversations_2025, k = 3"]
    drawing = charts.intervals("t", [(name, 1.5, 1.4, 1.6) for name in names])
    labels = re.findall(r'<text x="([\d.]+)"[^>]*class="label"[^>]*>([^<]*)<', drawing)
    assert [name[-5:] for _, name in labels] == ["k = 3", "k = 3"]
    assert all(float(end) >= 6.2 * len(name) for end, name in labels)
    assert names[1] in drawing  # in words, for who does not see it
    for k in (1, 3, 5, 7):
        both = [charts.Series(n, n, range(k), [0.72] * k) for n in ("predicted", "head")]
        drawing = charts.bars("t", [f"draft {i}" for i in range(k)], both)
        values = re.findall(r'<text x="([\d.]+)"[^>]*class="value"[^>]*>([^<]*)<', drawing)
        assert len(values) == 2 * k
        middles = sorted(float(x) for x, _ in values)
        wide = 26.4 if "%" in values[0][1] else 15.4
        assert all(b - a >= wide for a, b in itertools.pairwise(middles))


def test_words_in_bars_can_be_read(tmp_path):
    """Contrast of 4.5 at least (WCAG 2.2, AA), light and dark."""
    html, _ = written(*made_run.make(tmp_path))
    assert {*re.findall(r'class="(inside[^"]*)"', html)} <= {
        *(f"inside {part}" for part in ("base", "predicted", "head"))
    }
    colours = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", css)) for css in html.split("@media", 2)[:2]
    ]

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(c * w for c, w in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))

    for page in colours:
        for words, below in (("on-pale", "base"), ("on-pale", "predicted"), ("inside", "head")):
            low, high = sorted(luminance(page[name]) for name in (words, below))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (words, below)


@pytest.mark.parametrize(
    ("ks", "proved", "named", "served", "word"),
    [
        ((3, 1, 5), (1, 3, 5), None, 3, "recommended"),
        ((3, 1, 5), (1, 5), None, 5, "recommended"),  # 3 is faster and was not proved
        ((3, 1, 5), (1, 3, 5), 1, 1, "as served"),
        ((2,), (2,), None, 2, "as served"),
    ],
)
def test_the_report_is_of_the_k_to_serve(tmp_path, ks, proved, named, served, word):
    recipe, run = made_run.make(tmp_path, ks=ks, proved=proved)
    serve = recipe.serve.model_copy(update={"num_speculative_tokens": named})
    bench = recipe.bench.model_copy(update={"num_speculative_tokens": list(ks)})
    html, table = written(recipe.model_copy(update={"serve": serve, "bench": bench}), run)
    cells = read_json(run.bench_json, "")["grid"]
    (cell,) = (c for c in cells if (c["num_speculative_tokens"], c["concurrency"]) == (served, 1))
    assert f"<b>{served}</b><span>drafts a step, {word}" in html
    for text in (html, table):
        assert f"{cell['speedup']:.2f}×" in text
        assert f"{cell['accepted_length']:.2f}" in text
    card = (run.head / "README.md").read_text()
    # In other engines, those that serve this head: SGLang does, mlx-vlm has no hook for Llama.
    assert f"--speculative-num-steps {served} " in card
    assert "mlx_vlm" not in card
    assert "was not proved" not in html
    assert f"vllm serve measured --k {served}" in html
    assert f'"num_speculative_tokens":{served}' in card
    assert ("is the fastest of" in html) == (word == "recommended")


def test_the_serve_command_is_that_of_the_measured_machine(tmp_path):
    """Not of the one that the report is made on; without a bench it is the proved one."""
    recipe, run = made_run.make(tmp_path)
    assert "vllm serve measured --k 3" in written(recipe, run)[0]
    run.bench_json.unlink()
    assert "vllm serve proved --k 3" in written(recipe, run)[0]


def test_a_proved_head_whose_speed_was_not_measured(tmp_path):
    recipe, run = made_run.make(tmp_path)
    bench = read_json(run.bench_json, "")
    run.bench_json.unlink()
    (run.head / "README.md").unlink(missing_ok=True)
    for _ in range(2):
        html, table = written(recipe, run)
        card = (run.head / "README.md").read_text()
        for form in (html, card):
            assert "Speed was not measured" in form
            assert "63 of 64 answers identical" in form
            assert MACHINE.as_dict()["summary"] in form
            assert "tokens/s" not in form
        assert "not measured" in table
        assert "**Lossless**" in card
        assert '"num_speculative_tokens":3' in card
        # The figures of another head are not this one's.
        write_json(run.bench_json, bench | {"head": {"sha256": {"model.safetensors": "0" * 64}}})


def test_engines_that_took_turns_are_told_of(tmp_path):
    recipe, run = made_run.make(tmp_path)
    assert "A B A B" not in written(recipe, run)[0]
    bench = read_json(run.bench_json, "")
    bench["grid"] = [cell | {"engines_at_once": 1} for cell in bench["grid"]]
    write_json(run.bench_json, bench)
    html, _ = written(recipe, run)
    assert "A B A B" in html


def test_drafts_that_nobody_got_are_taken_off(tmp_path):
    recipe, run = made_run.make(tmp_path)
    bench = read_json(run.bench_json, "")
    corrected = f"{bench['accepted_length'] - 0.25:.2f} tokens a step"
    for beyond in (0, bench["drafts"] // 4):
        write_json(run.bench_json, bench | {"accepted_past_end": beyond})
        html, _ = written(recipe, run)
        assert (corrected in html) == (beyond > 0)


def table_row(text, name):
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_a_prediction_of_fewer_drafts_than_were_served_keeps_its_columns(tmp_path):
    """Training may have evaluated three drafts where five are served."""
    recipe, run = made_run.make(tmp_path, ks=(5, 3), proved=(5,))
    bench = read_json(run.bench_json, "")
    bench |= {"predicted_acceptance_by_position": [0.7, 0.5, 0.3], "predicted_accepted_length": 2.5}
    write_json(run.bench_json, bench)
    _, table = written(recipe, run)
    card = (run.head / "README.md").read_text()
    cells = ["70.0 %", "50.0 %", "30.0 %", "–", "–", "–"]
    assert table_row(card, "predicted on held-out states") == cells
    assert len(table_row(card, "served")) == 6
    assert "2.50" not in table
    write_json(run.bench_json, bench | {"acceptance_by_position": [], "accepted_length": None})
    written(recipe, run)
    assert table_row((run.head / "README.md").read_text(), "served") == ["–"] * 6


def test_steps_of_other_numbers_of_gpus_are_not_mixed(tmp_path):
    recipe, run = made_run.make(tmp_path)
    alone = written(recipe, run)[0]
    bench = read_json(run.bench_json, "")
    bench["grid"] += [cell | {"tensor_parallel_size": 2} for cell in bench["grid"]]
    write_json(run.bench_json, bench)
    both = written(recipe, run)[0]
    drawing = r'<svg[^>]*aria-label="Milliseconds of a decoding step.*?</svg>'
    (one,), (two,) = (re.findall(drawing, html, re.DOTALL) for html in (alone, both))
    assert one == two


def test_each_length_of_answers_has_its_rows(tmp_path):
    recipe, run = made_run.make(tmp_path, tokens=(128, 32))
    bench = read_json(run.bench_json, "")
    html, _ = written(recipe, run)
    card = (run.head / "README.md").read_text()
    for cell in bench["grid"]:
        load = f"{cell['concurrency']} at once, answers of {cell['max_new_tokens']}"
        name = f"k={cell['num_speculative_tokens']}, {load}"
        assert f"{cell['base_tokens_per_s']:.1f}" in table_row(card, name)[0]
        (row,) = re.findall(rf"<tr><td>{load}</td>.*?</tr>", html, re.DOTALL)
        assert f"<b>{cell['speedup']:.2f}×</b>" in row
    assert "| answers of 32, 128 tokens at most |" in card
    # Figures are of the headline's load: what was measured of other lengths adds nothing.
    bench["grid"] = [cell for cell in bench["grid"] if cell["max_new_tokens"] == 128]
    write_json(run.bench_json, bench)
    alone = written(recipe, run)[0]
    drawing = r'<svg[^>]*aria-label="(?:Milliseconds|Decoding|Speed).*?</svg>'
    both, one = (re.findall(drawing, page, re.DOTALL) for page in (html, alone))
    assert len(one) == 3
    assert both == one


def test_what_a_container_gives_of_the_machine_is_said(tmp_path):
    recipe, run = made_run.make(tmp_path)
    bench = read_json(run.bench_json, "")
    bench["machine"] |= {"cpu_quota": 1.5, "memory_limit_bytes": 8 << 30}
    write_json(run.bench_json, bench)
    html, _ = written(recipe, run)
    assert "16 cores, 1.5 of them given" in html
    assert "128 GiB, 8 of them given" in html


def test_heads_of_one_name_are_told_apart(tmp_path):
    recipe, run = made_run.make(tmp_path)
    bench = read_json(run.bench_json, "")
    (other, *_) = bench["beside"].values()
    bench["beside"] = {"runs/a/head": other, "runs/b/head": other}
    write_json(run.bench_json, bench)
    html, _ = written(recipe, run)
    assert "runs/a/head" in html
    assert "runs/b/head" in html


def test_the_card_of_a_head_that_is_not_lossless_claims_nothing(tmp_path):
    recipe, run = made_run.make(tmp_path, lossless=False)
    written(recipe, run)
    card = (run.head / "README.md").read_text()
    assert "**Not lossless**" in card
    assert "the text stays the target's own" not in card
    assert "as they do between any two batch shapes" not in card
    verify = read_json(run.verify_json, "")
    write_json(run.verify_json, verify | {"sampled": None})
    written(recipe, run)
    assert "was proved for greedy" not in (run.head / "README.md").read_text()


def test_samples_too_few_to_find_a_difference_found_none(tmp_path):
    recipe, run = made_run.make(tmp_path)
    assert "No difference in sampling" in written(recipe, run)[0]
    verify = read_json(run.verify_json, "")
    verify["sampled"]["detectable_shift"] = None
    write_json(run.verify_json, verify)
    html, _ = written(recipe, run)
    assert "No difference in sampling" not in html
    assert "too few answers to find a difference" in html
    assert "p = 0.43; too few to find a difference by." in html
    assert "for sampling too few answers were drawn" in (run.head / "README.md").read_text()
    claim = "; sampled output has the same distribution"
    assert claim in read_json(run.root / "proof.json", "")["claim"]
    prompt = Prompt([1], "c", "chat")
    target = load_target(recipe.target.path)
    assert claim not in write_proof(run, "t", target, verify, {1: {}}, [prompt])["claim"]


def test_a_target_in_the_folder_at_hand_has_its_name(tmp_path, monkeypatch):
    recipe, run = made_run.make(tmp_path)
    monkeypatch.chdir(recipe.target.path)
    here = recipe.model_copy(update={"target": recipe.target.model_copy(update={"path": "."})})
    html, _ = written(here, run)
    assert "<h1>SmolLM2-135M-Instruct</h1>" in html
