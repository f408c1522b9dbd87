"""What people see while a stage works: a bar in a terminal, a line a minute anywhere else.

    with progress(console, "verify", 48, unit="answers") as work:
        with waiting(console, "starting the engine"):
            ...
        work.advance(1, note="k=3")

Everything under way on one console is shown together, so a wait can stand inside a bar and two
can overlap. A quiet console shows nothing, nor does one after `hide` (`--json`).
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar
from weakref import WeakKeyDictionary

from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

LINE_SECONDS = 60.0
"""Without a terminal, a console gets at most one line in this time about work that goes on."""
SHORT_SECONDS = 3.0
"""A wait that is over sooner leaves no line."""

Clock = Callable[[], float]
Item = TypeVar("Item")


class Work:
    """One piece of work under way.

    Args:
        what: names it.
        total: units in all; None as long as nobody knows.
        done: units finished before this process began; its rate leaves them out.
        unit: what is counted; "bytes" are shown as kB, MB, ….
        clock: seconds.
    """

    def __init__(self, what: str, total: int | None, done: int, unit: str, clock: Clock):
        self.what, self.total, self.done, self.unit, self.clock = what, total, done, unit, clock
        self.note = ""
        self.done_before, self.begun = done, clock()
        self.shown = False
        """Whether a line about it was printed, or would have been without a terminal."""
        self.changed: Callable[[], None] = lambda: None
        """Called after each :meth:`advance`; the display sets it."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count ``n`` more units, not beyond the total, which may be an estimate. A ``note`` is
        shown beside the count until the next one."""
        self.done += n
        if self.total is not None:
            self.done = min(self.done, self.total)
        self.note = note or self.note
        self.changed()

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; each counts as done once the next one is asked for."""
        for item in items:
            yield item
            self.advance()

    def seconds(self) -> float:
        """Time since the work began in this process."""
        return self.clock() - self.begun

    def seconds_left(self) -> float | None:
        """Time left at the mean rate of this process; None while it has none."""
        done_here = self.done - self.done_before
        if self.total is None or done_here <= 0:
            return None
        return max(0.0, self.total - self.done) / done_here * self.seconds()

    def count(self) -> str:
        """How far: ``12 of 48 answers``; without a total ``12 answers``, or nothing yet."""
        show, unit = (decimal, "") if self.unit == "bytes" else ("{:,}".format, f" {self.unit}")
        if self.total is not None:
            return f"{show(self.done)} of {show(self.total)}{unit}".rstrip()
        return f"{show(self.done)}{unit}".rstrip() if self.done else ""

    def times(self) -> str:
        """How long so far and how long still: ``3 min, 9 min left``."""
        left = self.seconds_left()
        return span(self.seconds()) + (f", {span(left)} left" if left else "")

    def line(self) -> str:
        """All of it in one line."""
        times = self.times() if self.seconds() >= 1 else ""
        parts = [part for part in (self.count(), times, self.note) if part]
        return f"{self.what}: {', '.join(parts)}" if parts else self.what

    def last_line(self, finished: bool) -> str:
        """What stays to be read afterwards."""
        how = "done" if finished else "stopped"
        end = f"{how} after {span(self.seconds())}"
        return f"{self.what}: " + ", ".join(part for part in (self.count(), end, self.note) if part)


def span(seconds: float) -> str:
    """A time as people say it: ``45 s``, ``12 min``, ``2 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


@contextlib.contextmanager
def progress(
    console: Console,
    what: str,
    total: int | None,
    done: int = 0,
    *,
    unit: str = "",
    clock: Clock = time.monotonic,
) -> Iterator[Work]:
    """Show work of ``total`` units while the block lasts; :meth:`Work.advance` counts them.

    In a terminal this is a bar. Elsewhere it is a line at once, at most a line a minute for
    everything under way, whether or not anything advances, and a closing line.

    Args:
        console: where; nothing is shown on a quiet one.
        what: names the work.
        total: units in all; None if nobody knows.
        done: units finished before this process began.
        unit: what is counted: "answers", "steps", "bytes".
        clock: seconds.
    """
    work = Work(what, total, done, unit, clock)
    with _shown(console, work, first_line=0):
        yield work


@contextlib.contextmanager
def waiting(
    console: Console,
    what: str,
    total: int | None = None,
    *,
    unit: str = "",
    clock: Clock = time.monotonic,
) -> Iterator[Work]:
    """As :func:`progress`, for a wait that may be short or of unknown length: ``starting the
    engine``. One that is over within a moment leaves no line."""
    work = Work(what, total, 0, unit, clock)
    with _shown(console, work, first_line=SHORT_SECONDS):
        yield work


def waiting_for_library(console: Console, what: str) -> contextlib.AbstractContextManager[object]:
    """As :func:`waiting`, where a library shows a bar of its own in a terminal and nothing
    elsewhere: the hub's downloads and uploads."""
    return contextlib.nullcontext() if console.is_interactive else waiting(console, what)


def hide(console: Console, hidden: bool = True) -> None:
    """Show no progress on this console from now on, or show it again."""
    _display(console).hidden = hidden


@contextlib.contextmanager
def _shown(console: Console, work: Work, first_line: float) -> Iterator[None]:
    """Show a work while the block lasts. first_line: seconds until there is a line about it."""
    display = _display(console)
    if console.quiet or display.hidden:
        yield
        return
    show = display.bar if console.is_interactive else display.lines
    finished = False
    try:
        with show(console, work, first_line):
            yield
            finished = True
    finally:
        if work.shown:
            _print(console, work.last_line(finished))


def _print(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)


class _Times(ProgressColumn):
    def render(self, task: Task) -> Text:
        work: Work = task.fields["work"]
        return Text(", ".join(part for part in (work.count(), work.times()) if part))


class _Bars(Progress):
    """A bar for each work, its note in the line below: beside the bar 80 columns would cut it."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if note := task.fields["work"].note:
                yield Text(f"  {note}", style="dim")


class _Display:
    """All work under way on one console. The console is no field: it would keep itself alive in
    the table of displays."""

    def __init__(self) -> None:
        self.hidden = False
        self._lock = threading.Lock()
        self._bars: _Bars | None = None
        self._works: list[Work] = []  # shown by lines, the outer ones first
        self._last_line = 0.0  # when it was printed

    @contextlib.contextmanager
    def bar(self, console: Console, work: Work, first_line: float) -> Iterator[None]:
        """A bar in a terminal. All bars are tasks of one rich display."""
        with self._lock:
            if self._bars is None:
                columns = (TextColumn("{task.description}", markup=False), BarColumn(20), _Times())
                self._bars = _Bars(*columns, console=console, transient=True)
                self._bars.start()
            bars = self._bars
            task = bars.add_task(work.what, total=work.total, completed=work.done, work=work)
        work.changed = lambda: bars.update(task, total=work.total, completed=work.done)
        try:
            yield
        finally:
            work.shown = work.seconds() >= first_line
            with self._lock:
                bars.remove_task(task)
                if not bars.tasks:
                    bars.stop()
                    self._bars = None

    @contextlib.contextmanager
    def lines(self, console: Console, work: Work, first_line: float) -> Iterator[None]:
        """Lines without a terminal. A thread prints them also while nothing advances."""

        def seconds_to_next() -> float:
            last, pause = (
                (self._last_line, LINE_SECONDS) if work.shown else (work.begun, first_line)
            )
            return last + pause - work.clock()

        def print_if_due() -> None:
            with self._lock:
                if seconds_to_next() > 0:
                    return
                works = [each for each in self._works if each.shown] if work.shown else [work]
                self._last_line, work.shown = work.clock(), True
                line = "; ".join(each.line() for each in works)
            _print(console, line)

        def keep_printing() -> None:
            while not over.wait(max(0.1, seconds_to_next())):
                print_if_due()

        with self._lock:
            self._works.append(work)
        work.changed = print_if_due
        over = threading.Event()
        print_if_due()
        threading.Thread(target=keep_printing, daemon=True).start()
        try:
            yield
        finally:
            over.set()
            with self._lock:
                self._works.remove(work)
                if work.shown:  # its closing line follows
                    self._last_line = work.clock()


_DISPLAYS: WeakKeyDictionary[Console, _Display] = WeakKeyDictionary()


def _display(console: Console) -> _Display:
    return _DISPLAYS.setdefault(console, _Display())
