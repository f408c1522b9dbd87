"""vLLM workers that hand over hidden states while the engine serves as it always does.

Named by `worker_cls`, a vLLM setting; nothing of vLLM is patched. The target's own EAGLE-3 outputs
(`set_aux_hidden_state_layers`) are switched on without a draft model, so no draft token is
scheduled, no KV memory is spent on states, and decoding runs the kernels that serving runs.
Works with both of vLLM's GPU model runners and with the CPU's.

The layers come in `additional_config["drafthead"]`, which is part of vLLM's compilation
cache key: a graph compiled without these outputs is never mistaken for one with them.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.v1.worker.gpu_worker import Worker

from drafthead.capture.checks import Checker
from drafthead.capture.pages import PageWriter, SharedPages
from drafthead.capture.tap import KEY, Captured, Tap
from drafthead.errors import DraftheadError
from drafthead.states import Sample, StateWriter, StoreMeta
from drafthead.targets import load_target

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class Capture:
    """What the workers share; the rank 0 of tensor parallel holds the whole residual stream."""

    _tap: Tap | None = None
    _meta: StoreMeta
    _submit: Callable[[Any, Iterator[Sample]], None]
    _flush: Callable[[], None]

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        super().load_model(load_dummy_weights=load_dummy_weights)  # type: ignore[misc]
        config, runner = self.vllm_config, self.model_runner  # type: ignore[attr-defined]
        if config.parallel_config.pipeline_parallel_size > 1:
            raise RuntimeError(
                "capture does not work with pipeline parallel: the layers lie in several "
                "processes. Mend: engine.tensor_parallel_size instead"
            )
        model = runner.get_model()
        if not supports_eagle3(model):
            raise RuntimeError(
                f"{type(model).__name__} cannot hand out its hidden states in this vLLM (no "
                "SupportsEagle3); drafthead's plugin adds it for LFM2 and LFM2-MoE"
            )
        options = config.additional_config[KEY]
        layers = tuple(options["layers"])
        model.set_aux_hidden_state_layers(layers)
        runner.use_aux_hidden_state_outputs = True
        self._keys: dict[str, Any] = {}
        if get_tensor_model_parallel_rank() == 0:
            self._tap = Tap(
                len(layers),
                config.model_config.get_hidden_size(),
                config.model_config.dtype,
                options["encoding"],
                self.device,  # type: ignore[attr-defined]
                config.scheduler_config.max_num_batched_tokens,
            )

    @torch.inference_mode()
    def execute_model(self, scheduler_output: "SchedulerOutput") -> Any:
        output = super().execute_model(scheduler_output)  # type: ignore[misc]
        if self._tap is not None and scheduler_output.total_num_scheduled_tokens:
            self._record(scheduler_output)
        return output

    def _record(self, step: "SchedulerOutput") -> None:
        known = step.scheduled_cached_reqs
        starts = dict(zip(known.req_ids, known.num_computed_tokens))
        for request in step.scheduled_new_reqs:
            starts[request.req_id] = request.num_computed_tokens
            extra = request.sampling_params and request.sampling_params.extra_args
            if extra and KEY in extra:
                self._keys[request.req_id] = extra[KEY]
        for finished in step.finished_req_ids:
            self._keys.pop(finished, None)
        counts = step.num_scheduled_tokens
        if not any(request in self._keys for request in counts):
            return
        runner = self.model_runner  # type: ignore[attr-defined]
        state = runner.execute_model_state
        # The order of rows: the newer runner's batch travels with its state, the older one's is
        # the runner's own.
        batch = getattr(state, "input_batch", None) or runner.input_batch
        order = batch.req_ids[: len(counts)]
        sequences = [(self._keys.get(r), starts[r], counts[r]) for r in order]
        assert self._tap is not None
        self._tap.record(state.aux_hidden_states, sequences)

    # What `LLM.collective_rpc` calls; ranks other than 0 have nothing to do.

    def drafthead_open(self, sink: dict, meta: dict, target: str, options: dict) -> None:
        """Write to ``sink`` from now on: ``{"store": folder}`` or ``{"pages": path}``. ``meta``: of
        ``StoreMeta``; ``options``: of the writer (``shard_bytes``) and of the checks
        (``positions``, ``greedy``, ``strict``)."""
        if self._tap is None:
            return
        # The writer's threads share the interpreter with the engine's, which would wait for it up
        # to 5 ms, a third of a step, each time it comes back from the GPU.
        sys.setswitchinterval(0.0005)
        about = self._meta = StoreMeta.of(meta)
        checker = Checker(
            load_target(target),
            options["positions"],
            options["greedy"],
            self.device,  # type: ignore[attr-defined]
            options["strict"],
        )
        if "pages" in sink:
            pages = PageWriter(SharedPages.open(sink["pages"]), about, checker)
            self._submit, self._flush = pages.submit, pages.flush
            return
        store = StateWriter(Path(sink["store"]), about, options["shard_bytes"])

        def submit(unit: int, samples: Iterator[Sample]) -> None:
            checks: dict[str, Any] = {}
            store.submit(unit, checker.watch(samples, about, checks), checks)

        self._submit, self._flush = submit, store.flush

    def drafthead_unit(
        self, place: Any, sequences: list[tuple[int, list[int]]], wanted: list[dict]
    ) -> str | None:
        """Hand the states of ``wanted`` (see ``engine.Wanted``) to the sink, to ``place`` (see
        ``CaptureEngine.save``). ``sequences``: key and token ids of all that the engine ran since
        the last call.

        Returns:
            What went wrong with this or an earlier one, or None.
        """
        if self._tap is None:
            return None
        taken, meta = self._tap.take(), self._meta
        return _trouble(lambda: self._submit(place, _samples(taken, dict(sequences), wanted, meta)))

    def drafthead_flush(self) -> str | None:
        """Wait until everything has arrived; returns what went wrong, or None."""
        return None if self._tap is None else _trouble(self._flush)

    def drafthead_stats(self) -> dict | None:
        """See ``CaptureEngine.stats``."""
        if self._tap is None:
            return None
        return {"waits": self._tap.waits, "device_bytes": self._tap.device_bytes}


def _trouble(action: Callable[[], None]) -> str | None:
    """What went wrong with an action, for the process that asked for it."""
    try:
        action()
    except DraftheadError as error:
        return str(error)
    return None


def _samples(
    captured: Captured, sequences: dict[int, list[int]], wanted: list[dict], meta: StoreMeta
) -> Iterator[Sample]:
    if not wanted:
        return
    captured.wait()
    rows = captured.resolve(sequences)
    own = [rows[item["key"]] for item in wanted]
    lengths = [len(r) for r in own]
    taken = [tensor.split(lengths) for tensor in captured.take(np.concatenate(own))]
    captured.segments.clear()
    for item, *stored in zip(wanted, *taken, strict=True):
        ids = torch.tensor(sequences[item["key"]], dtype=torch.int32)
        mask = torch.ones(len(ids), dtype=torch.bool)
        mask[: item["prompt_len"]] = torch.tensor(item["prompt_mask"], dtype=torch.bool)
        yield Sample(
            ids=ids,
            loss_mask=mask,
            num_aux=len(meta.aux_layers),
            prompt_len=item["prompt_len"],
            conversation=item["conversation"],
            split=item["split"],
            **dict(zip(meta.stored, stored, strict=True)),
        )


class CaptureWorker(Capture, Worker):
    """vLLM's GPU worker that also captures."""
