"""A live server's figures, and what they are taken to mean."""

import copy
import threading
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from drafthead.data.template import Template
from drafthead.head.acceptance import Acceptance
from drafthead.prove.live_server import LiveFacts, _alone, compare_templates, conclude, share_longer
from drafthead.prove.server import Client, connections, parse_metrics, spec_counters
from drafthead.targets import load_target
from tests import templates
from tests.refused import refused

PAGE = """\
# HELP vllm:spec_decode_num_drafts_total Number of drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="a \\"b\\", c"} 30.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="a"} 12.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="a"} 126.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="a"} 4e+01
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="10"} 1.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 20.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",position="0"} 9.0
vllm:inter_token_latency_seconds_sum 3.0
vllm:inter_token_latency_seconds_count 60.0
process_start_time_seconds 1.7e+09
"""


def test_metrics_page():
    samples = parse_metrics(PAGE)
    assert spec_counters(samples) == Acceptance(42, 126, [29, 1])
    assert spec_counters([]) == Acceptance()


def test_answers_longer_than_any_of_training_are_counted_from_the_histogram():
    page = """\
# TYPE vllm:request_generation_tokens histogram
vllm:request_generation_tokens_bucket{engine="0",le="100.0"} 4.0
vllm:request_generation_tokens_bucket{engine="0",le="500.0"} 6.0
vllm:request_generation_tokens_bucket{engine="0",le="+Inf"} 8.0
vllm:request_generation_tokens_count{engine="0"} 8.0
vllm:request_generation_tokens_sum{engine="0"} 4000.0
"""
    samples = parse_metrics(page)
    assert [share_longer(samples, n) for n in (100, 200, 500, 501)] == [0.5, 0.25, 0.25, 0.0]
    assert share_longer([], 100) is None
    (found,) = [f for f in conclude(replace(GOOD, longer=0.25)) if "longer" in f.found]
    assert (found.what, found.state) == ("traffic", "warning")
    assert not [f for f in conclude(replace(GOOD, longer=0.05)) if "longer" in f.found]


def test_drafts_that_nobody_got_are_told():
    traffic = Acceptance(400, 1200, [300, 200, 100])
    facts = replace(GOOD, traffic=traffic, answers=20, tokens=20 + 400 + 590)
    (found,) = [f for f in conclude(facts) if "beyond" in f.found]
    assert found.state == "ok"
    assert "10 of 600" in found.found
    exact = replace(facts, tokens=20 + 400 + 600)
    assert not [f for f in conclude(exact) if "beyond" in f.found]


@contextmanager
def serving(page, key=None):
    """A server that answers everything with ``page``, to who has its key; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            known = key is None or self.headers["Authorization"] == f"Bearer {key}"
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_what_is_no_vllm_server_is_said():
    """Not that it drafts nothing, and no traceback."""
    with serving(PAGE) as url:
        assert Client(url).counters().drafts == 42
    with (
        serving("<style>\nmargin: 0;\n</style>") as url,
        refused(f"{url}/metrics"),
    ):
        Client(url).counters()
    with refused("http://localhost:port/metrics"):
        Client("http://localhost:port").counters()


def test_a_server_that_asks_for_a_key(monkeypatch):
    with serving(PAGE, key="s") as url:
        monkeypatch.setenv("VLLM_API_KEY", "s")
        assert Client(url).counters().drafts == 42
        assert connections(1).headers["Authorization"] == "Bearer s"
        monkeypatch.delenv("VLLM_API_KEY")
        with refused("VLLM_API_KEY"):
            Client(url).counters()
    assert "Authorization" not in connections(1).headers


def counts(first, drafts=1000):
    return Acceptance(drafts, 3 * drafts, [int(first * drafts), 0, 0])


GOOD = LiveFacts(
    traffic=counts(0.68),
    probe=counts(0.7),
    predicted=[0.71, 0.5, 0.3],
    template_agrees=True,
    head_aux_layers=[2, 12, 21],
    trained_aux_layers=[2, 12, 21],
    probe_tokens_per_s=150.0,
    base_tokens_per_s=100.0,
)


def states(**changes):
    return {f.what: f for f in conclude(replace(GOOD, **changes))}


def test_a_good_server_has_no_complaint():
    assert {f.state for f in states().values()} == {"ok"}


def test_a_head_as_poor_as_predicted_is_not_blamed_on_the_server():
    found = states(probe=counts(0.02), predicted=[0.025, 0.0, 0.0])["acceptance"]
    assert found.state == "fault"
    assert "served as training predicts" in found.mend
    assert "no cause" in states(probe=counts(0.02), predicted=None)["acceptance"].mend


NONE = counts(0, drafts=0)


@pytest.mark.parametrize(
    ("facts", "state", "mend"),
    [
        (LiveFacts(NONE, configured=False), "fault", "--speculative-config"),
        (LiveFacts(NONE), "warning", "requests"),
        (LiveFacts(NONE, probe=NONE), "fault", "bench.max_new_tokens"),
        # Structured outputs: the grammar cut every draft, and vLLM counts none.
        (LiveFacts(NONE, answers=7, tokens=700), "warning", "response_format"),
        (LiveFacts(NONE, answers=7, tokens=7), "warning", "longer answers"),
    ],
)
def test_nothing_drafted(facts, state, mend):
    (only,) = conclude(facts)
    assert (only.what, only.state) == ("speculation", state)
    assert mend in only.mend


def test_traffic_whose_drafts_a_grammar_cuts():
    """Where the probes show that the server drafts, and few of its users' tokens were."""
    assert "traffic" in states(answers=10, tokens=10 + 1000 + 680)
    assert states(answers=10, tokens=10 + 1000 + 680)["traffic"].state == "ok"
    mostly = conclude(replace(GOOD, answers=100, tokens=10_000))
    assert [f.state for f in mostly if f.what == "traffic"] == ["warning", "ok"]
    alone = conclude(replace(GOOD, traffic=NONE, answers=100, tokens=10_000))
    assert [f.state for f in alone if f.what == "traffic"] == ["warning"]
    # A server with asynchronous scheduling counts the step, and not the tokens that were cut.
    cut = conclude(replace(GOOD, traffic=Acceptance(1000, 200, [100, 0, 0])))
    assert [f.state for f in cut if f.what == "traffic"] == ["warning", "warning"]


@pytest.mark.parametrize(
    ("changes", "mend"),
    [
        ({"head_problems": ("vocab_size is 1, other",)}, "the head does not fit: vocab_size is 1"),
        ({"head_aux_layers": [1, 11, 20]}, "moved by -1"),
        ({"head_aux_layers": [2, 12, 20]}, "was trained on those of [2, 12, 21]: write"),
        ({"head_notes": ("made for a target with fingerprint x",)}, "fingerprint x"),
        ({}, "no cause is to be seen"),
    ],
)
def test_near_zero_acceptance_names_its_likeliest_cause(changes, mend):
    finding = states(probe=counts(0.02), **changes)["acceptance"]
    assert finding.state == "fault"
    assert mend in finding.mend
    below = states(probe=counts(0.6), **changes)["acceptance"]
    assert below.state == "warning"
    assert mend in below.mend
    assert states(**changes)["acceptance"].state == "ok"  # served well, nothing to blame


def test_template_and_traffic_are_told_apart():
    wrong = states(traffic=counts(0.3), template_agrees=False)
    assert wrong["chat template"].state == "fault"
    assert "chat template" in wrong["traffic"].mend
    other = states(traffic=counts(0.3))
    assert "chat template" not in other
    assert "prompts.sources" in other["traffic"].mend
    assert "traffic" not in states(traffic=counts(0.3, drafts=50))  # too few to say


def test_slower_than_the_target_alone():
    slow = states(probe_tokens_per_s=80.0, best_k=1)["speed"]
    assert slow.state == "warning"
    assert "k = 1" in slow.mend


def test_probes_that_drafted_nothing_leave_what_users_sent():
    """As where no held-out prompt fits the server's context."""
    found = states(probe=Acceptance(), probe_tokens_per_s=0.0)
    assert set(found) == {"acceptance"}
    assert found["acceptance"].found.startswith("68.0%")


def test_one_request_at_a_time_is_held_against_one_at_a_time():
    """The headline's load may be another: 64 at once make many more tokens a second."""

    def cell(concurrency, temperature, speed):
        return {
            "concurrency": concurrency,
            "temperature": temperature,
            "base_tokens_per_s": speed,
        }

    crowd = cell(64, 0.0, 9000.0)
    assert _alone(crowd | {"grid": [crowd]}) is None
    assert _alone(crowd | {"grid": [crowd, cell(1, 0.7, 90.0), cell(1, 0.0, 100.0)]}) == 100.0
    assert _alone({}) is None


class TemplateServer:
    """Answers `/tokenize` by a template of its own."""

    def __init__(self, template):
        self.template = template

    def tokenize_chat(self, messages, chat_template_kwargs=None):
        asked = copy.copy(self.template)
        asked.arguments = self.template.arguments | (chat_template_kwargs or {})
        return asked.encode(messages)[0]


ASKED = [{"role": "user", "content": "What does the fox say?"}]


def of_run(llama, text, arguments=None, now=None):
    target = load_target(llama)
    return Template(target.tokenizer(), [4], "there", text=text, arguments=arguments, now=now)


def test_a_prompt_that_prints_todays_date_is_the_servers_on_any_later_day(llama):
    then = of_run(llama, templates.DATED, now=datetime(2026, 2, 3))
    ids = then.encode(ASKED)[0]
    today = TemplateServer(of_run(llama, templates.DATED))
    assert today.tokenize_chat(ASKED) != ids
    assert compare_templates(today, then, ASKED, ids) == (True, False)
    for days in (-1, 1):  # in another time zone
        elsewhere = of_run(llama, templates.DATED, now=datetime.now() + timedelta(days=days))
        assert compare_templates(TemplateServer(elsewhere), then, ASKED, ids) == (True, False)
    other = TemplateServer(of_run(llama, templates.DATED.replace("Today is", "It is")))
    assert compare_templates(other, then, ASKED, ids) == (False, False)
    # The run's prompts were made with another recipe's template.
    assert compare_templates(today, then, ASKED, ids[1:]) == (False, False)


def test_a_prompt_that_prints_the_time_of_day_is_not_compared(llama):
    timed = templates.DATED.replace("%d %b %Y", "%H:%M")
    then = of_run(llama, timed, now=datetime(2026, 2, 3, 4, 5))
    server = TemplateServer(of_run(llama, timed))
    assert compare_templates(server, then, ASKED, then.encode(ASKED)[0]) == (None, False)


def test_arguments_that_the_server_lacks_or_has_by_default(llama):
    off = {"enable_thinking": False}
    run = of_run(llama, templates.THINKING_OFF, off)
    ids = run.encode(ASKED)[0]
    plain = TemplateServer(of_run(llama, templates.THINKING_OFF))
    assert compare_templates(TemplateServer(run), run, ASKED, ids) == (True, False)
    assert compare_templates(plain, run, ASKED, ids) == (True, True)
    thinking = of_run(llama, templates.THINKING_OFF)
    ids = thinking.encode(ASKED)[0]
    assert compare_templates(TemplateServer(run), thinking, ASKED, ids) == (False, False)
    assert states(needs_arguments=True)["chat template"].state == "warning"
