"""vLLM workers that also hand over hidden states; the engine serves as it always does.

Named by `worker_cls`, a vLLM setting; nothing of vLLM is patched. The target's own EAGLE-3 outputs
(`set_aux_hidden_state_layers`) are switched on without a draft model, so no draft token is
scheduled, no KV memory is spent on states, and decoding runs the kernels that serving runs.
Works with both of vLLM's GPU model runners and with the CPU's.

The layers come in `additional_config["drafthead"]`, which is part of vLLM's compilation
cache key: a graph compiled without these outputs is never mistaken for one with them.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.v1.worker.gpu_worker import Worker

from drafthead.capture.recorder import KEY, StateRecorder
from drafthead.capture.writer_process import WriterProcess

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class Capture:
    """What both workers share. Only rank 0 of tensor parallel captures: it has the whole residual
    stream."""

    _process: WriterProcess | None = None
    _recorder: StateRecorder | None = None

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        config, runner = self.vllm_config, self.model_runner  # type: ignore[attr-defined]
        if config.parallel_config.pipeline_parallel_size > 1:
            raise RuntimeError(
                "capture does not work with pipeline parallel: the layers lie in several "
                "processes. Fix: engine.tensor_parallel_size instead"
            )
        options = config.additional_config[KEY]
        layers = tuple(options["layers"])
        if get_tensor_model_parallel_rank() == 0:
            # Started first, so that it gets ready while the model loads.
            self._process = WriterProcess(
                2 * config.scheduler_config.max_num_batched_tokens,
                len(layers),
                config.model_config.get_hidden_size(),
                options["encoding"],
            )
        super().load_model(load_dummy_weights=load_dummy_weights)  # type: ignore[misc]
        model = runner.get_model()
        if not supports_eagle3(model):
            raise RuntimeError(
                f"{type(model).__name__} cannot hand out its hidden states: no SupportsEagle3 in "
                "this vLLM, nor in drafthead's plugin; `drafthead doctor` says more"
            )
        model.set_aux_hidden_state_layers(layers)
        runner.use_aux_hidden_state_outputs = True
        self._keys: dict[str, Any] = {}
        if self._process is not None:
            device: torch.device = self.device  # type: ignore[attr-defined]
            self._recorder = StateRecorder(config.model_config.dtype, device, self._process)

    @torch.inference_mode()
    def execute_model(self, scheduler_output: "SchedulerOutput") -> Any:
        output = super().execute_model(scheduler_output)  # type: ignore[misc]
        if self._recorder is not None and scheduler_output.total_num_scheduled_tokens:
            self._record(scheduler_output)
        return output

    def _record(self, step: "SchedulerOutput") -> None:
        cached = step.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens))
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
        # The order of rows: the newer model runner keeps its batch with its state, the older one
        # with itself.
        batch = getattr(state, "input_batch", None) or runner.input_batch
        order = batch.req_ids[: len(counts)]
        sequences = [(self._keys.get(r), starts[r], counts[r]) for r in order]
        assert self._recorder is not None
        self._recorder.record(state.aux_hidden_states, sequences)

    # `LLM.collective_rpc` calls the methods below; ranks other than 0 do nothing.

    def drafthead_open(self, sink: dict, meta: dict, target: str, options: dict) -> str | None:
        """Write to ``sink`` from now on: ``{"store": folder}`` or ``{"pages": path}``. ``meta``: of
        ``StoreMeta``; ``options``: of the writer (``shard_bytes``), of the checks
        (``greedy``, ``strict``) and of the target (``trust_remote_code``). Returns what went
        wrong, or None."""
        process = self._process
        return None if process is None else process.open(sink, meta, target, options)

    def drafthead_unit(
        self, place: Any, sequences: list[tuple[int, list[int]]], wanted: list[dict]
    ) -> str | None:
        """Hand the states of ``wanted`` (``SequenceToKeep``) to the sink, to ``place`` (see
        ``CaptureEngine.save``). ``sequences``: key and token ids of all that the engine ran since
        the last call.

        Returns:
            What went wrong with this or an earlier one, or None.
        """
        if self._recorder is None or self._process is None:
            return None
        self._recorder.end_unit()
        self._process.send_unit(place, dict(sequences), wanted)
        return self._process.trouble()

    def drafthead_flush(self) -> str | None:
        """Wait until all units are stored. Returns what went wrong, or None."""
        return None if self._process is None else self._process.flush()

    def drafthead_stats(self) -> dict | None:
        """See ``CaptureEngine.stats``."""
        if self._recorder is None or self._process is None:
            return None
        return {"waits": self._process.waits, "device_bytes": self._recorder.device_bytes}

    def shutdown(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
        if self._process is not None:
            self._process.close()
        super().shutdown()  # type: ignore[misc]


class CaptureWorker(Capture, Worker):
    """vLLM's GPU worker that also captures."""
