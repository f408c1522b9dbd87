"""vLLM engines in child processes, driven from this one.

A process per engine gives its memory back for certain, keeps one engine's failure from the
other, and lets two engines (with and without the head) live side by side for paired timing.
"""

import abc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from drafthead.errors import DraftheadError
from drafthead.head.acceptance import Acceptance
from drafthead.process import Child

Answering = TypeVar("Answering")


@dataclass(frozen=True)
class Completion:
    """An engine's answer to one prompt. Times are seconds since the first request of its generation
    was submitted."""

    ids: list[int]
    """Generated token ids."""
    finish_reason: str
    """``stop`` (end of text) or ``length``."""
    begin_at: float = 0.0
    """When the request was given in."""
    outputs: list[tuple[float, int]] = field(default_factory=list)
    """When each output came and how many tokens it held; that of a drafted step holds several."""
    logprobs: list[dict[int, float]] = field(default_factory=list)
    """For each generated token, log-probabilities of the likeliest tokens, if asked for."""

    @property
    def first_token_at(self) -> float:
        return self.outputs[0][0] if self.outputs else self.begin_at

    @property
    def end_at(self) -> float:
        """When the last token came."""
        return self.outputs[-1][0] if self.outputs else self.begin_at

    @property
    def seconds(self) -> float:
        """From giving the request in to its last token."""
        return self.end_at - self.begin_at

    @property
    def first_token_s(self) -> float:
        """From giving the request in to its first token."""
        return self.first_token_at - self.begin_at

    @property
    def gaps_s(self) -> list[float]:
        """Between one output and the next."""
        return [b - a for (a, _), (b, _) in itertools.pairwise(self.outputs)]


@dataclass(frozen=True)
class Generation:
    """An engine's answers to a list of prompts, in order."""

    completions: list[Completion]
    wall_s: float
    """From the first request given in to the last one ended."""

    @property
    def tokens(self) -> int:
        return sum(len(completion.ids) for completion in self.completions)


class Startable(abc.ABC, Generic[Answering]):
    """A process that loads a model. As a context manager it waits until the model is ready, and
    always cleans up."""

    @abc.abstractmethod
    def start(self) -> Any:
        """Begin loading the model and return at once; :meth:`wait_ready` waits for it."""

    @abc.abstractmethod
    def wait_ready(self) -> Answering:
        """Wait until the model can answer, started first if it is not; what asks it."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the process and everything that it started."""

    def __enter__(self) -> Answering:
        try:
            return self.wait_ready()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class EngineProcess(Startable["EngineProcess"]):
    """One vLLM engine in a child process; a context manager that leaves nothing behind.

    The child dies with its parent, even when the parent is killed. What vLLM prints goes to
    ``log``; errors quote its end.

    Args:
        args: arguments of ``vllm.LLM``, from :attr:`drafthead.plan.Plan.args`.
        env: environment variables to add, from :attr:`drafthead.plan.Plan.environment`.
        log: file for what the engine prints; appended to.
        name: what errors call this engine.

    Raises:
        DraftheadError: the engine did not start, refused a request, or died.
    """

    def __init__(self, args: dict[str, Any], *, env: dict[str, str], log: Path, name: str):
        self.args, self.env, self.log, self.name = args, env, log, name
        self.info: dict[str, Any] = {}
        self.on_answer: Callable[[], None] | None = None
        """Called for each answer that ends, while :meth:`generate` still waits for the others."""
        self._child: Child | None = None

    def start(self) -> "EngineProcess":
        """Begin loading the model and return at once; :meth:`wait_ready` waits for it."""
        order = {**self.args, "disable_log_stats": False}
        module = "drafthead.prove.engine_worker"
        self._child = Child(self.name, module, order, self.log, self.env)
        return self

    def wait_ready(self) -> "EngineProcess":
        """Wait until the engine can answer."""
        if self._child is None:
            self.start()
        self.info = self._receive("did not start")
        return self

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int | Sequence[int],
        concurrency: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        ignore_eos: bool = False,
        logprobs: int | None = None,
        prefix_cache: bool = True,
    ) -> Generation:
        """Let the engine answer prompts of token ids, at most ``concurrency`` at once.

        Args:
            prompts: token ids of each prompt.
            max_tokens: one limit for all answers, or one for each.
            concurrency: requests in the engine at once.
            temperature: 0 is greedy.
            top_p: nucleus of sampling.
            seed: with its index added, each request's own; None leaves it to the engine.
            ignore_eos: go on past the end of text.
            logprobs: likeliest tokens to give log-probabilities of, at each position.
            prefix_cache: let prompts that were met before come out of the engine's cache.
        """
        answer = self._ask(
            "failed while generating",
            {
                "op": "generate",
                "prompts": [list(map(int, prompt)) for prompt in prompts],
                "max_tokens": max_tokens if isinstance(max_tokens, int) else list(max_tokens),
                "concurrency": concurrency,
                "temperature": temperature,
                "top_p": top_p,
                "seed": seed,
                "ignore_eos": ignore_eos,
                "logprobs": logprobs,
                "prefix_cache": prefix_cache,
                "report": self.on_answer is not None,
            },
        )
        completions = [
            Completion(
                ids=result["ids"],
                finish_reason=result["finish_reason"],
                begin_at=result["begin_at"],
                outputs=[(at, tokens) for at, tokens in result["outputs"]],
                logprobs=[{int(k): v for k, v in row.items()} for row in result["logprobs"]],
            )
            for result in answer["results"]
        ]
        return Generation(completions, answer["wall_s"])

    def score(self, sequences: Sequence[Sequence[int]], top: int) -> list[list[dict[int, float]]]:
        """The engine's next-token log-probabilities along given sequences of token ids, all
        positions of one in one pass.

        Returns:
            For each sequence and position the log-probabilities of its token and of the ``top``
            likeliest; nothing for the first.
        """
        ids = [list(map(int, sequence)) for sequence in sequences]
        answer = self._ask("failed while scoring", {"op": "score", "sequences": ids, "top": top})
        return [[{int(k): v for k, v in row.items()} for row in rows] for rows in answer["rows"]]

    def counters(self) -> Acceptance:
        """Speculation counters since the engine's start (all zero without speculation)."""
        return Acceptance(**self._ask("failed while reading its counters", {"op": "counters"}))

    def close(self) -> None:
        """End the engine and everything that it started."""
        child, self._child = self._child, None
        if child is not None:
            child.close()

    def _ask(self, failure: str, request: dict) -> dict:
        assert self._child is not None
        self._child.send(request)
        return self._receive(failure)

    def _receive(self, failure: str) -> dict:
        """The engine's answer. ``failure``: what errors say of the engine, or of vLLM."""
        assert self._child is not None
        answer = self._child.receive(failure)
        while answer is not None and "ended" in answer:
            if self.on_answer is not None:
                self.on_answer()
            answer = self._child.receive(failure)
        assert answer is not None, "it serves until it is killed"
        if "failed" in answer:
            cause = self._child.memory_fault() or f"vLLM {failure}"
            raise DraftheadError(f"{self.name}: {cause}: {answer['failed']} (its log: {self.log})")
        return answer["ok"]
