"""The target in vLLM, writing answers and handing over its states in the same pass."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drafthead.capture.tap import KEY
from drafthead.errors import DraftheadError
from drafthead.machine import this_machine
from drafthead.recipe import Recipe
from drafthead.serve import engine_plan
from drafthead.states import StoreMeta
from drafthead.targets import Target

CHECKED_POSITIONS = 8
"""Tokens of each answer that are compared with the teacher's argmax: over thousands of answers
enough for a share to a tenth of a percent, at a fiftieth of the cost of all."""


@dataclass(frozen=True)
class Written:
    """What the target wrote for one prompt."""

    ids: list[int]
    finish_reason: str


@dataclass(frozen=True)
class Wanted:
    """One sequence whose states go to the store."""

    key: int
    """As given to ``generate`` or ``prefill``."""
    ids: list[int]
    loss_mask: list[bool]
    prompt_len: int
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
        store: folder of the state store; None generates only.

    Raises:
        DraftheadError: vLLM is not installed, or refuses the target.
    """

    def __init__(self, recipe: Recipe, target: Target, meta: StoreMeta, store: Path | None):
        plan = engine_plan(recipe, head=None, target=target)
        os.environ.update(plan.environment)
        self.recipe, self.store = recipe, store
        args: dict[str, Any] = plan.args | {"seed": recipe.generate.seed}
        if store is not None:
            gpu = this_machine().vllm_device == "cuda"
            worker = "CaptureWorker" if gpu else "CaptureCPUWorker"
            args |= {
                "worker_cls": f"drafthead.capture.worker.{worker}",
                "additional_config": {KEY: {"layers": list(meta.layers)}},
                # Positions found in the cache are not computed, so they would have no states.
                "enable_prefix_caching": False,
            }
        try:
            from vllm import LLM
        except ImportError as error:
            raise DraftheadError(
                f"vLLM is not installed ({error}); pip install 'drafthead[cuda]', or "
                "'drafthead[cpu]' without a GPU"
            ) from None
        try:
            self.llm = LLM(**args)
        except (RuntimeError, ValueError, AssertionError, OSError) as error:
            raise DraftheadError(f"{target.path}: vLLM does not start: {error}") from error
        self.max_len: int = self.llm.llm_engine.vllm_config.model_config.max_model_len
        if store is not None:
            options = {
                "shard_bytes": recipe.capture.shard_bytes,
                "positions": CHECKED_POSITIONS,
                "greedy": recipe.generate.temperature == 0,
            }
            self._rpc("drafthead_open", str(store), asdict(meta), str(target.path), options)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int | None],
        seeds: Sequence[int],
        progress: Callable[[int], None] | None = None,
    ) -> list[Written]:
        """The target's answers. States are kept of those with a key; keys are never used twice.

        Args:
            prompts: token ids; each leaves room for one token at least.
            keys: one a prompt.
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
                detokenize=False,
                extra_args=None if key is None else {KEY: key},
            )
            for prompt, key, seed in zip(prompts, keys, seeds, strict=True)
        ]
        return self._run(prompts, params, progress)

    def prefill(
        self,
        sequences: Sequence[Sequence[int]],
        keys: Sequence[int],
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Compute the states of given sequences, the last token of each left out."""
        from vllm import SamplingParams

        params = [
            SamplingParams(temperature=0, max_tokens=1, detokenize=False, extra_args={KEY: key})
            for key in keys
        ]
        self._run([ids[:-1] for ids in sequences], params, progress)

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[Any],
        progress: Callable[[int], None] | None,
    ) -> list[Written]:
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        order: dict[str, int] = {}
        written: list[Written | None] = [None] * len(prompts)
        for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
            param.output_kind = RequestOutputKind.FINAL_ONLY
            order[str(index)] = index
            engine.add_request(str(index), {"prompt_token_ids": [int(i) for i in prompt]}, param)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if not output.finished:
                    continue
                index = order[output.request_id]
                if list(output.prompt_token_ids) != list(prompts[index]):
                    raise DraftheadError(f"vLLM changed the token ids of prompt {index}")
                answer = output.outputs[0]
                written[index] = Written(list(answer.token_ids), str(answer.finish_reason))
                if progress is not None:
                    progress(len(answer.token_ids))
        lost = [index for index, answer in enumerate(written) if answer is None]
        if lost:
            raise DraftheadError(f"vLLM gave no answer to prompts {lost[:5]} of this unit")
        return [answer for answer in written if answer is not None]

    def save(self, unit: int, wanted: Sequence[Wanted]) -> None:
        """Hand the states of ``wanted`` to the store as ``unit``; all else captured since the last
        call is dropped. Written in the background.

        Raises:
            DraftheadError: of this unit or an earlier one: a check failed, or the disk is full.
        """
        self._report(self._rpc("drafthead_unit", unit, [asdict(item) for item in wanted]))

    def flush(self) -> None:
        """Wait until everything saved is on disk.

        Raises:
            DraftheadError: as ``save``.
        """
        self._report(self._rpc("drafthead_flush"))

    @property
    def waits(self) -> int:
        """Times that the engine waited for room to copy states into."""
        return self._rpc("drafthead_stats")["waits"]

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
