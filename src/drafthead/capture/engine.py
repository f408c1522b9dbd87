"""The target in vLLM: it writes answers and hands over its states in the same pass."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drafthead.capture.recorder import KEY
from drafthead.capture.shared_memory import PagePool
from drafthead.errors import DraftheadError
from drafthead.machine import install_command, this_machine
from drafthead.recipe import Recipe
from drafthead.serve import engine_plan, llm_class
from drafthead.states import StoreMeta
from drafthead.targets import Target

_SETTLE_SECONDS = 600.0
"""With asynchronous scheduling a last step may still be under way for sequences that have ended."""


@dataclass(frozen=True)
class Written:
    """What the target wrote for one prompt."""

    key: int
    """Names the sequence until the unit is saved."""
    ids: list[int]
    finish_reason: str


@dataclass(frozen=True)
class SequenceToKeep:
    """One sequence whose states are written to the store."""

    key: int
    """From ``Written`` or ``prefill``."""
    prompt_len: int
    prompt_mask: list[bool]
    """True where the target wrote a token of the prompt; all after the prompt is the target's."""
    conversation: str
    split: str


class CaptureEngine:
    """One vLLM engine that runs the recipe's target as it is served, and captures.

    A batch handed to ``generate`` enters the engine whole before the first step, and on a CPU the
    engine lives in this process: so the same batch always runs the same steps and, there, gives
    the same bits.

    Args:
        recipe: names the target and how it is run.
        target: the recipe's target.
        meta: what the states are of; its layers are captured.
        sink: folder of the state store, or pages shared with who reads them; None generates only.
        strict: states that fail a check stop the work; off for dummy weights only, which no
            check can hold for.

    Raises:
        DraftheadError: vLLM is not installed, or refuses the target.
    """

    def __init__(
        self,
        recipe: Recipe,
        target: Target,
        meta: StoreMeta,
        sink: Path | PagePool | None,
        *,
        strict: bool = True,
    ):
        plan = engine_plan(recipe, head=None, target=target)
        os.environ.update(plan.environment)
        self.recipe = recipe
        args: dict[str, Any] = plan.args | {"seed": recipe.generate.seed}
        if target.multimodal:
            # Prompts are token ids here: towers would take memory and do nothing.
            args.setdefault("language_model_only", True)
        if sink is not None:
            gpu = this_machine().vllm_device == "cuda"
            worker = "worker.CaptureWorker" if gpu else "cpu_worker.CaptureCPUWorker"
            args |= {
                "worker_cls": f"drafthead.capture.{worker}",
                "additional_config": {
                    KEY: {"layers": list(meta.layers), "encoding": meta.encoding}
                },
            }
        try:
            llm = llm_class()
        except ImportError as error:
            raise DraftheadError(
                f"vLLM is not installed ({error}); {install_command('cuda')}, or with [cpu] in "
                "place of [cuda] on a machine without a GPU"
            ) from None
        try:
            self.llm = llm(**args)
        except (RuntimeError, ValueError, TypeError, AssertionError, OSError) as error:
            raise DraftheadError(f"{target.path}: vLLM does not start: {error}") from error
        self._sequences: dict[int, list[int]] = {}
        self._keys = 0
        self.max_len: int = self.llm.llm_engine.vllm_config.model_config.max_model_len
        if sink is not None:
            where = {"store": str(sink)} if isinstance(sink, Path) else {"pages": sink.path}
            options = {
                "shard_bytes": recipe.capture.shard_bytes,
                "greedy": recipe.generate.temperature == 0,
                "strict": strict,
                "trust_remote_code": target.trust_remote_code,
                "hf_overrides": recipe.engine.extra.get("hf_overrides"),
            }
            about = (where, asdict(meta), str(target.path), options)
            self._report(self._rpc("drafthead_open", *about))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        progress: Callable[[int], None] | None = None,
    ) -> list[Written]:
        """The target's answers.

        Args:
            prompts: token ids; each leaves room for one token at least.
            seeds: one a prompt, used when the recipe's temperature is above 0.
            progress: called with the number of tokens of each answer that ends.
        """
        from vllm import SamplingParams

        options = self.recipe.generate
        params = [
            SamplingParams(
                temperature=options.temperature,
                top_p=options.top_p,
                seed=seed if options.temperature > 0 else None,
                max_tokens=min(options.max_new_tokens, self.max_len - len(prompt)),
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        written = self._run(prompts, params, progress)
        for prompt, answer in zip(prompts, written, strict=True):
            self._sequences[answer.key] = [*prompt, *answer.ids]
        return written

    def prefill(
        self,
        sequences: Sequence[Sequence[int]],
        progress: Callable[[int], None] | None = None,
    ) -> list[int]:
        """Compute the states of given sequences, the last token of each left out; returns keys."""
        from vllm import SamplingParams

        params = [SamplingParams(temperature=0, max_tokens=1) for _ in sequences]
        written = self._run([ids[:-1] for ids in sequences], params, progress)
        for ids, answer in zip(sequences, written, strict=True):
            self._sequences[answer.key] = list(ids)
        return [answer.key for answer in written]

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[Any],
        progress: Callable[[int], None] | None,
    ) -> list[Written]:
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        # Never used twice: a step may still be under way for a sequence that has just ended.
        first, self._keys = self._keys, self._keys + len(prompts)
        written: dict[int, Written] = {}
        for key, (prompt, param) in enumerate(zip(prompts, params, strict=True), first):
            param.output_kind = RequestOutputKind.FINAL_ONLY
            param.detokenize = False
            param.extra_args = {KEY: key}
            engine.add_request(str(key), {"prompt_token_ids": list(prompt)}, param)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if not output.finished:
                    continue
                key = int(output.request_id)
                if output.prompt_token_ids != list(prompts[key - first]):
                    raise DraftheadError(
                        f"engine.extra: vLLM changed the token ids of a prompt of "
                        f"{len(prompts[key - first])} tokens; remove what truncates prompts"
                    )
                answer = output.outputs[0]
                ids = list(answer.token_ids)
                written[key] = Written(key, ids, str(answer.finish_reason))
                if progress is not None:
                    progress(len(ids))
        if len(written) < len(prompts):
            raise DraftheadError(
                f"vLLM answered {len(written)} of {len(prompts)} prompts and ended the others; "
                "logs/ in the run's folder says why. Finished units stay: run again"
            )
        return [written[key] for key in sorted(written)]

    def save(self, place: int | Sequence[Sequence[int]], wanted: Sequence[SequenceToKeep]) -> None:
        """Hand the states of ``wanted`` to the store as a unit, or to the pages of each; all else
        captured since the last call is dropped. Written in the background.

        Args:
            place: number of the unit, or for each wanted sequence the numbers of its pages.
            wanted: sequences that ran since the last call.

        Raises:
            DraftheadError: of this unit or an earlier one: a check failed, or the disk is full.
        """
        sequences = list(self._sequences.items())
        trouble = self._rpc("drafthead_unit", place, sequences, [asdict(item) for item in wanted])
        # A unit stands for itself: what is found in the prefix cache was computed within it.
        self._sequences.clear()
        end = time.monotonic() + _SETTLE_SECONDS
        while not self.llm.reset_prefix_cache():
            if time.monotonic() > end:
                raise DraftheadError(
                    "vLLM could not empty its prefix cache between units of work; set "
                    "`enable_prefix_caching: false` in engine.extra, and run again"
                )
            time.sleep(0.01)
        self._report(trouble)

    def flush(self) -> None:
        """Wait until everything saved is stored.

        Raises:
            DraftheadError: as ``save``.
        """
        self._report(self._rpc("drafthead_flush"))

    def stats(self) -> dict[str, int]:
        """What capturing costs the engine: ``waits``, how often a step waited for room in the ring,
        and ``device_bytes``, GPU memory that states pass through."""
        return self._rpc("drafthead_stats")

    def close(self) -> None:
        """End the engine and give its memory back."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()

    def _rpc(self, method: str, *args: Any) -> Any:
        return self.llm.collective_rpc(method, args=args)[0]

    def _report(self, trouble: str | None) -> None:
        if trouble is not None:
            raise DraftheadError(trouble)
