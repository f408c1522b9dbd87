"""The training loop: rows in, a head out, at any moment ready to be killed."""

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from drafthead.drafters.base import Batch, Drafter, TargetSide
from drafthead.errors import DraftheadError
from drafthead.fsio import fingerprint, write_json
from drafthead.head.acceptance import Acceptance
from drafthead.head.formats import Provenance
from drafthead.ops.ceiling import matmul_rate
from drafthead.ops.losses import Teacher
from drafthead.progress import waiting
from drafthead.recipe import TrainSection
from drafthead.states import Samples
from drafthead.states.format import decode
from drafthead.train import checkpoint
from drafthead.train.batches import prefetch
from drafthead.train.evaluate import evaluate, heldout
from drafthead.train.log import Log
from drafthead.train.meter import Meter
from drafthead.train.optimizer import AdamW, AdamWSettings
from drafthead.train.parallel import World, check
from drafthead.train.plan import Plan, beyond

LOG_EVERY = 10  # steps between two questions to the device; in between it is never waited for
CHECKPOINT_SHARE = 0.02  # of the time may go into checkpoints
CHECKPOINT_SECONDS = 20.0  # and at least so much lies between two


@dataclass(frozen=True)
class Task:
    """A training job. Tensors are on the CPU, in the type they are stored in."""

    drafter: Drafter
    head: nn.Module
    """Where training starts; float32."""
    embedding: Tensor
    """[V, H]: the target's, frozen (or the head's own)."""
    teacher: Teacher
    reader: Samples
    settings: TrainSection
    k: int
    """Drafts a step when served: the best head is the one with the highest accepted length at k."""
    provenance: Provenance
    own_embedding: bool = False
    """Whether the head brings `embedding` and is saved with it."""
    name: str = "head"


def learning_rate(settings: TrainSection, step: int, steps: int) -> float:
    """Rate of `step` (from 0): linear warm-up, then a cosine that would reach zero at `steps`."""
    peak, warmup = settings.peak_learning_rate, round(settings.warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (1 + math.cos(math.pi * done)) / 2


def fit(task: Task, folder: Path, world: World, console: Console) -> dict:
    """Train, going on from a checkpoint in `folder` if there is one.

    Leaves `folder/best` (the head with the highest held-out accepted length, bf16, as vLLM reads
    it), `folder/best.json` (its evaluation), `metrics.jsonl`, `tensorboard/`, `checkpoint/`.
    Returns `best.json`'s content and how training went.

    Raises:
        DraftheadError: data that does not fit, a loss that is not finite, a full disk.
    """
    return _Fit(task, folder, world, console).run()


class _Fit:
    def __init__(self, task: Task, folder: Path, world: World, console: Console):
        self.task, self.folder, self.world, self.console = task, folder, world, console
        settings, device = task.settings, world.device
        self.resumed = checkpoint.read_progress(folder / "checkpoint")
        rows_per_step = (
            self.resumed.rows_per_step if self.resumed else settings.rows_per_step or world.size
        )
        check(settings, rows_per_step, world)
        self.heldout = heldout(task.reader)
        self.plan = Plan.make(
            task.reader, settings.epochs, settings.row_tokens, rows_per_step, settings.seed
        )
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.head = task.head.to(device, self.dtype)
        self.embedding = task.embedding.to(self.dtype)
        weight, rows = task.teacher.norm_weight, task.teacher.head
        teacher = replace(
            task.teacher,
            norm_weight=weight.to(device, self.dtype),
            head=rows.to(device, self.dtype),
        )
        self.rate = matmul_rate(device, self.dtype)
        self.target = TargetSide(self.embedding, teacher)
        self.trainer = task.drafter.trainer(self.head, self.target, settings, task.k, self.rate)
        self.optimizer = AdamW(
            [(name, p) for name, p in self.head.named_parameters() if p.requires_grad],
            AdamWSettings(
                settings.optimizer == "muon",
                *settings.betas,
                lm_head_rate=settings.lm_head_rate,
                weight_decay=settings.weight_decay,
                max_grad_norm=settings.max_grad_norm,
            ),
            self.trainer.graphs,
            task.drafter.by_muon,
        )
        every = settings.eval_every or -(-self.plan.steps // 10)
        self.eval_steps = {*range(every, self.plan.steps, every), self.plan.steps}
        inputs = fingerprint(
            [
                settings.model_copy(update={"track": []}).model_dump(mode="json"),
                self.plan.fingerprint,
                task.reader.meta.fingerprint,
            ]
        )
        self.progress = self.resumed or checkpoint.Progress(inputs, rows_per_step, k=task.k)
        if self.resumed:
            if self.resumed.inputs != inputs:
                raise DraftheadError(
                    f"{folder}/checkpoint: made with other settings or states; give this run "
                    f"another name, or delete {folder} to train anew"
                )
            checkpoint.load(folder / "checkpoint", self.resumed, self.optimizer.load_state_dict)
            if self.resumed.best_step >= 0 and self.resumed.k != task.k:
                at_k = self.acceptance(self._best(), [task.k])[0]
                self.progress.best_length = at_k.accepted_length or 0.0
            self.progress.k = task.k

    def make(self, number: int) -> Batch | None:
        """Read and pack row `number` of the plan."""
        samples = [self.task.reader[index] for index in self.plan.rows[number]]
        device = self.world.device
        row = self.trainer.pack(samples, number, pinned=device.type == "cuda")
        return None if row is None else row.batch(device, self.dtype)

    def run(self) -> dict:
        progress, world, plan = self.progress, self.world, self.plan
        log = Log(
            self.folder,
            progress.step,
            plan.steps,
            self.task.name,
            list(self.task.settings.track),
            self.console,
            quiet=not world.first,
        )
        numbers = [
            number
            for step in range(progress.step, plan.steps)
            for number in plan.row_numbers(step, world.rank, world.size)
        ]
        self.task.reader.expect(index for number in numbers for index in plan.rows[number])
        batches = prefetch(self.make, numbers, world.device)
        meter = Meter(world, self.trainer.steps, self.rate)
        waited_before = progress.waited
        # When training would have started without pauses, and in one process.
        started = time.monotonic() - progress.seconds
        save_at = time.monotonic() + CHECKPOINT_SECONDS
        lost = beyond(self.task.reader, self.task.settings.row_tokens)
        if world.first and lost >= 0.001:
            self.console.print(
                f"[yellow]{lost:.1%} of the training answers' tokens are cut off by rows of "
                f"{self.task.settings.row_tokens:,} tokens; raise train.row_tokens to train on "
                "them[/yellow]"
            )
        with log:
            try:
                while progress.step < plan.steps and not progress.stopped:
                    norm = self._step(batches, meter)
                    progress.step += 1
                    meter.update(norm, progress.step)
                    evaluating = progress.step in self.eval_steps
                    if evaluating or progress.step % LOG_EVERY == 0:
                        self._report(meter, log)
                    progress.seconds = time.monotonic() - started
                    progress.waited = waited_before + meter.waited
                    # Evaluating and saving count neither as training nor as waiting.
                    if evaluating or time.monotonic() > save_at:
                        paused = time.monotonic()
                        if evaluating:
                            self._evaluate(log)
                        begun = time.monotonic()
                        self._save()
                        saved = time.monotonic()
                        started += saved - paused
                        meter.leave_out(saved - paused)
                        # The longer a checkpoint takes, the fewer are written.
                        save_at = saved + max(
                            CHECKPOINT_SECONDS, (saved - begun) / CHECKPOINT_SHARE
                        )
            finally:
                batches.close()
        return self._finish(plan)

    def _step(self, batches: Iterator[Batch | None], meter: Meter) -> Tensor:
        """Gradients of this process's rows, summed over all, and one update."""
        device, supervised = self.world.device, 0
        for _ in self.plan.row_numbers(self.progress.step, self.world.rank, self.world.size):
            with meter.waiting():
                batch = next(batches)
            if batch is not None:
                loss, correct, counted = self.trainer.backward(batch)
                supervised += self.trainer.supervised(batch)
                meter.add(loss, correct, counted, batch, self.trainer)
        count = torch.full((), float(supervised), device=device)
        if self.world.size > 1:
            for p in self.optimizer.parameters.values():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.world.sum([*self.optimizer.gradients(), count])
        lr = learning_rate(self.task.settings, self.progress.step, self.plan.steps)
        return self.optimizer.step(lr, count)

    def _report(self, meter: Meter, log: Log) -> None:
        metrics, bad = meter.read()
        if bad is not None:
            raise DraftheadError(self._name_bad(bad - 1))
        done = self.progress.step - 1
        rate = learning_rate(self.task.settings, done, self.plan.steps)
        log.write(self.progress.step, {**metrics, "learning_rate": rate})

    def _name_bad(self, step: int) -> str:
        """Name the conversations in a step whose gradient is not finite, and the fix."""
        reader = self.task.reader
        indices = [i for number in self.plan.row_numbers(step) for i in self.plan.rows[number]]
        broken = [i for i in indices if not decode(reader[i].stored).isfinite().all()]
        names = [str(reader.conversation[i]) for i in broken or indices]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        if broken:
            return (
                f"step {step + 1}: states that are not finite, of conversation {shown}; run "
                f"`drafthead states check {reader.path} --repair`"
            )
        return (
            f"step {step + 1}: the gradient is not finite though all states are (conversations "
            f"{shown}); lower train.learning_rate. No weight was changed by this step or later "
            "ones that failed; the last checkpoint is sound"
        )

    def _evaluate(self, log: Log) -> None:
        """Held-out accepted length as served, its share on each process; keeps the best head."""
        head = self.head
        if self.dtype != torch.bfloat16:  # as it is saved, so that all figures are of one head
            head = copy.deepcopy(head).bfloat16().to(self.dtype)
        total = self.acceptance(head, [self.task.k])[0]
        progress, length = self.progress, total.accepted_length or 0.0
        better = length > progress.best_length
        progress.stale = 0 if better else progress.stale + 1
        if better:
            progress.best_length, progress.best_step = length, progress.step
            if self.world.first:
                self._save_best(head)
        patience = self.task.settings.patience
        progress.stopped = patience is not None and progress.stale >= patience
        log.write(
            progress.step,
            {
                "accepted_length": length,
                "acceptance": total.by_position,
                "conditional_acceptance": total.conditional,
                "seconds": progress.seconds,
            },
        )
        if self.world.first:
            self.console.print(
                f"step {progress.step}/{self.plan.steps}: held-out accepted length at k="
                f"{total.k}: {length:.3f}" + (" (best)" if better else "")
            )

    def acceptance(self, head: nn.Module, ks: list[int]) -> list[Acceptance]:
        """Counts over all held-out answers at each k, summed over processes."""
        reader, world = self.task.reader, self.world
        shard = self.heldout[world.rank :: world.size]
        reader.expect(shard)
        totals = [Acceptance.zeros(k) for k in ks]
        if shard:
            what = "evaluating held-out answers"
            with waiting(self.console, what, len(shard), unit="answers") as work:
                samples = (reader[int(i)] for i in work.each(shard))
                target = replace(self.target, embedding=self.embedding.to(world.device))
                totals = evaluate(self.task.drafter, head, target, samples, ks)
        summed = []
        for total in totals:
            counts = {
                name: torch.tensor(count, device=world.device)
                for name, count in asdict(total).items()
            }
            world.sum([*counts.values()])
            summed.append(Acceptance(**{name: count.tolist() for name, count in counts.items()}))
        return summed

    def _positions(self, steps: int) -> int:
        """Positions packed into the first `steps` steps."""
        rows = self.plan.rows[: steps * self.plan.rows_per_step]
        longest = self.task.settings.row_tokens
        return sum(min(int(self.task.reader.tokens[i]) - 2, longest) for row in rows for i in row)

    def _save_best(self, head: nn.Module) -> None:
        about = {"step": self.progress.step, "accepted_length": self.progress.best_length}
        provenance = self.task.provenance
        self.task.drafter.save(
            head,
            self.folder / "best",
            Provenance(
                provenance.target,
                provenance.target_fingerprint,
                provenance.target_architectures,
                trained={**about, "k": self.task.k},
            ),
            k=self.task.k,
            embedding=self.embedding if self.task.own_embedding else None,
        )

    def _save(self) -> None:
        """One process writes and none has to wait for it."""
        if self.world.first:
            state = self.optimizer.state_dict()
            checkpoint.save(self.folder / "checkpoint", self.progress, state)

    def _best(self) -> nn.Module:
        """The best head so far, from its file."""
        head, _ = self.task.drafter.load(self.folder / "best")
        return head.to(self.world.device, self.dtype)

    def _finish(self, plan: Plan) -> dict:
        """Evaluate the best head once more, from its file and at every k up to 5."""
        self.world.barrier()  # until the first process has written it
        best = self._best()
        most = self.task.drafter.most_drafts(best.config)
        ks = sorted({*(k for k in range(1, 6) if k <= most), self.task.k})
        totals = self.acceptance(best, ks)
        graphs = self.trainer.graphs
        at_k = totals[ks.index(self.task.k)]
        progress = self.progress
        summary = {
            "steps": progress.step,
            "planned_steps": plan.steps,
            "stopped_early": progress.step < plan.steps,
            "tokens": self._positions(progress.step),
            "train_seconds": round(progress.seconds, 1),
            "waiting": progress.waited / progress.seconds,
            "graphs": {"captured": graphs.captured, "seconds": round(graphs.seconds, 1)},
            "best_step": progress.best_step,
            "k": self.task.k,
            "accepted_length": at_k.accepted_length,
            "acceptance_by_position": at_k.by_position,
            "heldout": [total.summary() for total in totals],
        }
        if self.world.first:
            write_json(self.folder / "best.json", summary)
        self.world.barrier()
        return summary
