"""Spread generation and capture over a Ray cluster: units of work go to actors, each with its own
engine.

An actor is light: its engine lives in a child process that dies with it, so that nothing is left of
a lost worker that could still write. Units are handed out one by one. When a worker is lost, those
it had not finished go to others and another takes its place. What a unit holds does not depend on
who makes it, so neither does the store.
"""

import contextlib
import os
import queue
import shutil
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from rich.console import Console

from drafthead.capture.generate import answers_in, work
from drafthead.capture.plan import WorkPlan, plan_elsewhere
from drafthead.data.answers import part_path
from drafthead.data.chats import Chat
from drafthead.data.template import given_template
from drafthead.errors import DraftheadError
from drafthead.machine import install_command
from drafthead.process import Child, child_main
from drafthead.progress import progress
from drafthead.recipe import Recipe, parse_recipe
from drafthead.rundir import RunDir
from drafthead.states import StoreMeta
from drafthead.states.index import unit_path
from drafthead.states.remote import Location, publish_unit
from drafthead.states.writer import check_same, open_store

ATTEMPTS = 3
"""Workers that a unit may cost before it is held to be what kills them."""
_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 5.0
"""Within which a cluster's head takes a connection."""


class WorkQueue:
    """Assigns units to workers. It is an actor, so that workers ask it and not the driver.

    Ray's own retries (`max_task_retries`, as under `ray.util.ActorPool`) are not enough: they give
    a unit to the same actor again. With its machine lost it failed (ActorUnavailableError, Ray
    2.60) while another worker was free; and a pool computes no unit while it writes the one before.
    """

    def __init__(self, units: list[int]):
        self._open = deque(units)
        self._held: dict[str, list[int]] = {}
        self._lost: dict[str, int] = {}
        self._dead: set[str] = set()
        self.done: list[int] = []
        self._answers = self._tokens = 0

    def take(self, worker: str) -> int | None:
        """The next unit, now this worker's; None if there is none to give out, or if it asked
        before it was lost."""
        if not self._open or worker in self._dead:
            return None
        self._held.setdefault(worker, []).append(self._open.popleft())
        return self._held[worker][-1]

    def finish(self, worker: str, unit: int) -> None:
        """A unit is whole, where it belongs."""
        self._held[worker].remove(unit)
        self.done.append(unit)

    def worker_died(self, worker: str) -> str | None:
        """A worker is dead: its unfinished units are open again, the first to be given out.

        Returns:
            What makes it hopeless to go on, if ``ATTEMPTS`` workers went the same way.
        """
        self._dead.add(worker)
        units = self._held.pop(worker, [])
        self._open.extendleft(reversed(units))
        for what in [f"unit {unit}" for unit in units] or ["starting an engine"]:
            self._lost[what] = self._lost.get(what, 0) + 1
            if self._lost[what] >= ATTEMPTS:
                return what
        return None

    def count(self, answers: int, tokens: int) -> None:
        """Answers that ended, and their tokens."""
        self._answers += answers
        self._tokens += tokens

    def poll(self) -> tuple[int, int, int, int]:
        """Units open, units held; the answers since the last look, and their tokens."""
        answers, tokens = self._answers, self._tokens
        self._answers = self._tokens = 0
        return len(self._open), sum(map(len, self._held.values())), answers, tokens


class Worker:
    """A worker: an engine's process, and the way of its units to the run's folder or location."""

    def __init__(
        self,
        name: str,
        order: dict[str, Any],
        chats: dict[int, list],
        work_queue: Any,
        location: str | None,
    ):
        self.name, self.order, self.chats = name, order, chats
        self.work_queue = work_queue
        self.location = Location(location) if location else None
        self.scratch = _scratch() if location else None
        self.run = RunDir(self.scratch) if self.scratch else RunDir(Path(order["run"]))

    def work(self) -> None:
        """Units until there are no more.

        Raises:
            DraftheadError: what no other worker could do better: a failed check, a full disk.
        """
        import ray

        order = self.order | {"run": str(self.run.root)}
        log = self.run.root / "logs" / f"{self.order['stage']}-{self.name}.log"
        child = Child(f"worker {self.name}", "drafthead.capture.cluster", order, log)
        meta = StoreMeta.of(order["meta"])
        publishing: deque[Future] = deque()
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="publish") as pool:
                for message in child.messages():
                    while publishing and publishing[0].done():
                        publishing.popleft().result()
                    if "next" in message:
                        unit = ray.get(self.work_queue.take.remote(self.name))
                        child.send(self._asked(unit))
                    elif "unit" in message:
                        publishing.append(pool.submit(self._finish, message["unit"], meta))
                    elif "answers" in message:
                        self.work_queue.count.remote(message["answers"], message["tokens"])
                for future in publishing:
                    future.result()
        finally:
            child.close()
            if self.scratch:
                shutil.rmtree(self.scratch, ignore_errors=True)

    def _asked(self, unit: int | None) -> tuple[int, list] | None:
        """A unit with its conversations. Before it is prefilled, its answers have to be here."""
        if unit is None:
            return None
        if self.location and self.order["stage"] == "capture":
            part = part_path(self.run.answers, unit)
            self.location.get(f"answers/{part.name}", part)
        return unit, self.chats[unit]

    def _finish(self, unit: int, meta: StoreMeta) -> None:
        import ray

        if self.location:
            index, part = unit_path(self.run.states, unit), part_path(self.run.answers, unit)
            if index.exists():
                publish_unit(self.run.states, meta, unit, self.location, "states")
                for file in self.run.states.glob(f"unit-{unit:06d}*"):
                    file.unlink()
            if self.order["stage"] == "generate":
                self.location.put(part, f"answers/{part.name}")
            part.unlink()
        ray.get(self.work_queue.finish.remote(self.name, unit))


def _scratch() -> Path:
    """A folder for units on their way to a location; what killed workers left here is swept."""
    for old in Path(tempfile.gettempdir()).glob("drafthead-worker-*"):
        if not psutil.pid_exists(int(old.name.split("-")[2])):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"drafthead-worker-{os.getpid()}-"))


def spread(stage: str, plan: WorkPlan, run: RunDir, console: Console) -> None:
    """Run the missing units of a stage on the cluster of ``recipe.cluster``.

    Raises:
        DraftheadError: no Ray, no such cluster, a worker's own error, or a unit that kills workers.
    """
    recipe, cluster = plan.recipe, plan.recipe.cluster
    location = Location(cluster.location) if cluster.location else None
    if location:
        location.sweep("answers")
        location.sweep("states")
        _describe(plan, location)
    todo = _missing(stage, plan, run, location)
    if not todo:
        return
    if stage == "capture" or recipe.capture.mode == "generate":
        open_store(run.states, plan.meta)
    if stage == "capture" and location:
        published = location.names("answers")
        for part in (part_path(run.answers, number) for number in todo):
            if part.name not in published:  # the answers were written without a cluster
                location.put(part, f"answers/{part.name}")
    chats = {n: [(asdict(chat), split) for chat, split in plan.units[n]] for n in todo}
    with _connected(recipe) as ray:
        work_queue = ray.remote(**_here(ray))(WorkQueue).remote(todo)
        gpus = ray.cluster_resources().get("GPU")
        need = {"num_gpus": recipe.engine.tensor_parallel_size} if gpus else {"num_cpus": 1}
        actor_class = ray.remote(max_restarts=0, **need)(Worker)
        room = _room(ray, need)
        most_workers = min(len(todo), cluster.workers or room)
        shared, order, hired = ray.put(chats), _order(stage, plan, run), 0
        workers: dict[Any, tuple[str, Any]] = {}
        total, tokens = answers_in(stage, plan, range(len(plan.units))), 0
        done = total - answers_in(stage, plan, todo)
        bar = progress(console, stage, total, done, unit="answers")
        with _all_ended(ray, workers), bar as shown:
            while True:
                left, held, answers, more = ray.get(work_queue.poll.remote())
                tokens += more
                shown.advance(answers, note=f"{len(workers)} workers, {tokens:,} tokens")
                while len(workers) < min(most_workers, len(workers) + left):
                    name = f"{hired:03d}"
                    actor = actor_class.remote(name, order, shared, work_queue, cluster.location)
                    workers[actor.work.remote()] = (name, actor)
                    hired += 1
                    left -= 1
                if not workers and not left + held:
                    return
                ended, _ = ray.wait(list(workers), timeout=_POLL_SECONDS)
                for reference in ended:
                    name, actor = workers[reference]
                    try:
                        ray.get(reference)
                    except ray.exceptions.RayActorError as error:
                        console.print(f"[yellow]worker {name} is lost; its units go to others[/]")
                        hopeless = ray.get(work_queue.worker_died.remote(name))
                        if hopeless:
                            raise DraftheadError(
                                f"{stage}: {hopeless} killed {ATTEMPTS} workers, last: {error}"
                            ) from None
                    except ray.exceptions.RayTaskError as error:
                        if isinstance(error.cause, DraftheadError):
                            raise error.cause from None
                        raise
                    del workers[reference]
                    ray.kill(actor)


def _order(stage: str, plan: WorkPlan, run: RunDir) -> dict[str, Any]:
    """The order for workers. Folders are absolute paths: workers run where their machine's Ray was
    started."""
    recipe = plan.recipe.model_dump(mode="json")
    if Path(target := os.path.expanduser(plan.recipe.target.path)).is_dir():
        recipe["target"]["path"] = os.path.abspath(target)
    recipe["target"]["chat_template"] = given_template(plan.recipe)
    root = str(run.root.resolve())
    return {
        "stage": stage,
        "recipe": recipe,
        "meta": asdict(plan.meta),
        "run": root,
        "now": plan.template.now.isoformat(),
    }


@contextlib.contextmanager
def _all_ended(ray: Any, workers: dict[Any, tuple[str, Any]]) -> Iterator[None]:
    """However the work ends, no worker is left."""
    try:
        yield
    finally:
        for _, actor in workers.values():
            ray.kill(actor)


def _missing(stage: str, plan: WorkPlan, run: RunDir, location: Location | None) -> list[int]:
    """The units that have no file that says they are whole."""
    folder = "answers" if stage == "generate" else "states"
    path_of = part_path if stage == "generate" else unit_path
    local = run.answers if stage == "generate" else run.states
    finished = location.names(folder) if location else {p.name for p in local.glob("*")}
    return [n for n in range(len(plan.units)) if path_of(local, n).name not in finished]


def _describe(plan: WorkPlan, location: Location) -> None:
    """``meta.json`` at the location, which must not hold answers or states of something else."""
    name = "states/meta.json"
    with tempfile.TemporaryDirectory() as folder:
        if location.exists(name):
            location.get(name, Path(folder) / "meta.json")
            earlier = StoreMeta.load(Path(folder))
            check_same(earlier, plan.meta, location.url, "give this run another location")
        else:
            plan.meta.save(Path(folder))
            location.put(Path(folder) / "meta.json", name)


@contextlib.contextmanager
def _connected(recipe: Recipe) -> Iterator[Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise DraftheadError(
            f"cluster.address: Ray is not installed ({error}); {install_command('ray')}"
        ) from None
    already = ray.is_initialized()
    if not already:
        check_address(recipe.cluster.address)
        try:
            ray.init(address=recipe.cluster.address, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise DraftheadError(
                f"cluster.address: {recipe.cluster.address}: no Ray cluster answers: {error}; "
                "`local` starts one on this machine"
            ) from None
    try:
        yield ray
    finally:
        if not already:
            ray.shutdown()


def check_address(address: str | None) -> None:
    """Something listens at ``HOST:PORT`` or ``ray://HOST:PORT``: Ray itself would go on trying for
    more than a minute.

    Raises:
        DraftheadError: nothing does, or it is not an address.
    """
    if address in (None, "auto", "local"):
        return
    fix = "`auto` finds the cluster that this machine is in, `local` starts one here"
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise DraftheadError(f"cluster.address: {address}: not HOST:PORT of a Ray cluster; {fix}")
    try:
        socket.create_connection((host, port), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise DraftheadError(
            f"cluster.address: {address}: nothing answers there ({error}); is the head running "
            f"(`ray start --head --port {port}`), and can this machine reach it? {fix}"
        ) from None


def _here(ray: Any) -> dict[str, Any]:
    """What makes an actor live on the driver's machine. Ray puts one that needs no resources
    anywhere, and the queue must not be lost with a worker."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def _room(ray: Any, need: dict[str, int]) -> int:
    """Workers that the whole cluster has room for, one at least.

    Raises:
        DraftheadError: no machine has the GPUs of one: Ray would wait for such a machine for ever.
    """
    ((kind, count),) = need.items()
    name = {"num_gpus": "GPU", "num_cpus": "CPU"}[kind]
    has = [int(node["Resources"].get(name, 0)) for node in ray.nodes() if node["Alive"]]
    if name == "GPU" and max(has) < count:
        raise DraftheadError(
            f"engine.tensor_parallel_size: {count} GPUs; no Ray node has over {max(has)}"
        )
    return max(1, sum(n // count for n in has))


_incoming: queue.SimpleQueue = queue.SimpleQueue()


def _child(order: dict, report: Callable[[dict], None]) -> None:
    """The engine's process: asks for a unit, does it, asks for the next."""
    plan = plan_elsewhere(
        parse_recipe(order["recipe"], "recipe"),
        StoreMeta.of(order["meta"]),
        datetime.fromisoformat(order["now"]),
    )

    def asked() -> Iterator[int]:
        while True:
            report({"next": True})
            given = _incoming.get()
            if given is None:
                return
            number, chats = given
            plan.units[number] = [
                (Chat(**chat | {"turns": tuple(map(tuple, chat["turns"]))}), split)
                for chat, split in chats
            ]
            yield number

    work(order["stage"], plan, RunDir(Path(order["run"])), asked(), report)


def on_cluster(
    recipe: Recipe, address: str | None, workers: int | None, location: str | None
) -> Recipe:
    """The recipe with what the command line says of the cluster.

    Raises:
        DraftheadError: workers or a location for a cluster that nobody names.
    """
    if address is None and recipe.cluster.address is None and (workers or location):
        raise DraftheadError(
            "--workers and --location need a cluster: add --ray, or set cluster.address"
        )
    given = {"address": address, "workers": workers, "location": location}
    update = {key: value for key, value in given.items() if value is not None}
    return recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update=update)})


if __name__ == "__main__":
    child_main(_child, _incoming.put)
