"""What people see while a stage works; the clock is the test's own, so nothing here waits."""

import io
import json
import re

import pytest
from rich.console import Console

from drafthead.progress import _display, hide, progress, span, waiting
from drafthead.states import StateWriter
from tests.states.test_store import META, make_sample


class Clock:
    """Seconds, moved by the test."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def recorder(**options):
    """A console that writes to memory, no terminal by default."""
    return Console(file=io.StringIO(), width=80, **{"force_terminal": False, **options})


def lines(console):
    return console.file.getvalue().splitlines()


def test_a_line_at_once_then_a_line_a_minute_and_a_closing_line(clock):
    console = recorder()
    with progress(console, "verify", 48, unit="answers", clock=clock) as work:
        assert lines(console) == ["verify: 0 of 48 answers"]
        for _ in range(12):
            clock.now += 15  # 12 answers in three minutes
            work.advance(1, note="k=3")
        told = lines(console)
        assert len(told) == 4
        for words in ("12 of 48 answers", "9 min left", "k=3"):
            assert words in told[-1]
    assert len(lines(console)) == 5
    assert "done" in lines(console)[-1]


def test_the_rate_leaves_out_what_was_done_before_this_process(clock):
    console = recorder()
    with progress(console, "generate", 1000, 900, clock=clock) as work:
        assert "900 of 1,000" in lines(console)[0]
        assert work.seconds_left() is None  # no rate yet
        clock.now += 100
        work.advance(50)
        assert work.seconds_left() == pytest.approx(100)
        assert "950 of 1,000" in lines(console)[-1]


def test_work_that_fails_is_not_called_done(clock):
    console = recorder()
    with pytest.raises(KeyError), progress(console, "train", 10, clock=clock) as work:
        work.advance(4)
        raise KeyError
    assert "4 of 10" in lines(console)[-1]
    assert "stopped" in lines(console)[-1]
    assert "done" not in lines(console)[-1]


def test_a_wait_inside_a_bar_is_told_with_it(clock):
    console = recorder()
    with progress(console, "bench", 8, clock=clock) as work:
        clock.now += 10
        with waiting(console, "starting the engine", clock=clock) as start:
            clock.now += 5
            start.advance(0)
            assert lines(console)[-1] == "starting the engine: 5 s"
            clock.now += 61
            work.advance(1)
            told = lines(console)[-1]
            assert "bench: 1 of 8" in told
            assert "starting the engine: 66 s" in told
        clock.now += 61
        work.advance(1)
        assert "starting" not in lines(console)[-1]


def test_lines_come_though_nothing_advances(monkeypatch, clock):
    """Each look of the printing thread is one the test lets it take."""
    console = recorder()
    looks = []

    class Thread:
        def __init__(self, target, daemon):
            looks.append(target)

        def start(self):
            pass

    class Over:
        def __init__(self):
            self.minutes = 3

        def wait(self, seconds):
            clock.now += seconds
            self.minutes -= 1
            return self.minutes < 0

        def set(self):
            pass

    monkeypatch.setattr("drafthead.progress.threading.Thread", Thread)
    monkeypatch.setattr("drafthead.progress.threading.Event", Over)
    with waiting(console, "starting the engine", clock=clock):
        looks[0]()
        assert lines(console) == [
            "starting the engine: 3 s",
            "starting the engine: 63 s",
            "starting the engine: 2 min",
        ]


def test_works_that_overlap_may_end_in_any_order(clock):
    """As two generators do that are closed one after the other."""
    for console in (recorder(), recorder(force_terminal=True)):
        first, second = (progress(console, name, 2, clock=clock) for name in ("first", "second"))
        first.__enter__()
        work = second.__enter__()
        first.__exit__(None, None, None)
        clock.now += 61
        work.advance(1)
        second.__exit__(None, None, None)
        assert "first: 0 of 2" in console.file.getvalue()
        assert "second: 1 of 2" in lines(console)[-1]


def test_a_quiet_console_and_json_show_nothing(clock):
    hidden = recorder()
    hide(hidden)
    for console in (hidden, recorder(quiet=True), recorder(quiet=True, force_terminal=True)):
        with progress(console, "train", 10, clock=clock) as work, waiting(console, "engine"):
            clock.now += 61
            work.advance(10)
        assert console.file.getvalue() == ""
    hide(hidden, False)
    with progress(hidden, "train", 10):
        assert hidden.file.getvalue()


@pytest.mark.parametrize("width", [80, 50])
def test_a_terminal_shows_a_bar_and_cuts_nothing_off(clock, width):
    console = recorder(force_terminal=True, color_system=None)
    console.width = width
    note = "loss 1.234 · 12,345 tokens/s · MFU 12% · waiting for data 0% · accepted length 2.34"
    with progress(console, "train", 12_000, 6_000, unit="steps", clock=clock) as work:
        clock.now += 600
        work.advance(600, note)
        _display(console)._bars.refresh()  # as its thread does ten times a second
    bar = console.file.getvalue().rpartition("train: ")[0]  # without the closing line
    told = " ".join(re.sub(r"\x1b\[[?\w]*", " ", bar).split())
    assert "━" in told
    assert note in told
    assert "6,600 of 12,000 steps, 10 min, 1 h 30 min left" in told


@pytest.mark.parametrize("terminal", [True, False])
def test_a_short_wait_leaves_no_line(clock, terminal):
    console = recorder(force_terminal=terminal, color_system=None)
    with waiting(console, "hashing the target", clock=clock):
        pass
    assert "done" not in console.file.getvalue()
    with waiting(console, "hashing the target", clock=clock):
        clock.now += 20
    if terminal:
        assert "hashing the target: done after 20 s" in lines(console)[-1]


def test_a_total_may_be_known_later(clock):
    for terminal in (True, False):
        console = recorder(force_terminal=terminal, color_system=None)
        with progress(console, "verify", None, unit="answers", clock=clock) as work:
            clock.now += 61
            work.total = 48
            work.advance(12)
        assert "12 of 48 answers" in lines(console)[-1]


def test_text_is_no_markup(clock):
    console = recorder()
    with progress(console, "starting [red]k=3[/red]", 1, clock=clock):
        pass
    assert "[red]k=3[/red]" in lines(console)[0]


def test_bytes_are_shown_in_their_units(clock):
    console = recorder()
    with progress(console, "download", 3_000_000_000, 1_500_000, unit="bytes", clock=clock):
        assert "1.5 MB of 3.0 GB" in lines(console)[0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (5400, "1 h 30 min")]
)
def test_times_are_short(seconds, text):
    assert span(seconds) == text


@pytest.fixture
def store(tmp_path):
    with StateWriter(tmp_path / "states", META) as writer:
        for unit in range(META.units):
            writer.submit(unit, [make_sample(unit)])
    return tmp_path / "states"


def test_json_hides_progress_for_that_command_only(store, drafthead):
    command = ("states", "check", str(store))
    _, _, err = drafthead(*command)
    assert "0 of 3 units" in err
    _, out, err = drafthead(*command, "--json")
    assert json.loads(out)
    assert "of 3 units" not in err
    _, _, err = drafthead(*command)
    assert "0 of 3 units" in err


def test_waits_before_the_first_stage_and_of_doctor_say_what_they_do(
    llama, tmp_path, monkeypatch, drafthead, quick_doctor
):
    monkeypatch.setattr("drafthead.progress.SHORT_SECONDS", 0.0)
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hello"}\n' * 4)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: r\ntarget: {{path: {llama}}}\nvocab: {{size: 64}}\n"
        f"prompts: {{heldout: 1, sources: [{{path: {tmp_path}/p.jsonl}}]}}\n"
    )
    runs = ("--runs", str(tmp_path / "runs"))
    _, _, err = drafthead("doctor", str(recipe), *runs)
    for what in ("importing PyTorch", "reading target and prompts", "importing vLLM"):
        assert f"{what}: done" in err
    monkeypatch.setattr("drafthead.run._load", lambda _: lambda *_, **__: {})
    _, _, err = drafthead("run", str(recipe), "--to", "generate", *runs)
    assert "hashing target and prompts: done" in err
