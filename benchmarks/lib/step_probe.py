"""What a step spends on the host and on the device, seen from inside the engine's process.

`Probe` is mixed into vLLM's worker (through `spread_weights.Spread`); its methods are called
through `LLM.collective_rpc` and return JSON. `summarize` reads a trace of the torch profiler.
"""

import json
import re
import time
from collections import defaultdict
from pathlib import Path

# (owner, method), owners as in `Probe._phases`. Some call others, so their times must not be added.
PHASES = (
    ("runner", "execute_model"),
    ("runner", "gather_batch_req_state"),
    ("runner", "update_requests"),
    ("runner", "prepare_inputs"),
    ("runner", "prepare_attn"),
    ("runner", "sample_tokens"),
    ("runner", "sample"),
    ("runner", "postprocess_sampled"),
    ("model", "compute_logits"),
    ("model_state", "preprocess_state"),
    ("model_state", "prepare_attn"),
    ("speculator", "propose"),
    ("speculator", "_copy_request_inputs"),
    ("speculator", "_fused_multi_step_decode"),
    ("speculator", "_multi_step_decode"),
    ("draft", "combine_hidden_states"),
    ("rejection_sampler", "__call__"),
    ("graphs", "run_fullgraph"),
    ("scheduler", "schedule"),
    ("scheduler", "update_from_output"),
    ("engine", "step_with_batch_queue"),
    ("output", "__init__"),
    ("output", "get_output"),
)

CLASSES = (
    ("experts and quantized matmuls", r"marlin|moe|fp4|nvfp4"),
    ("attention", r"flash|fmha|attention|reshape_and_cache|paged"),
    ("short convolution", r"conv"),
    ("dense matmuls", r"nvjet|gemm|gemv|cutlass|cublas|splitk|cublasLt"),
    ("sampling and argmax", r"reject|sampl|argmax|ArgMax|gumbel|logits|MaxOps|reduce_kernel"),
    ("bookkeeping (Triton)", r"^_\w+_kernel"),
    ("compiled pointwise", r"^triton_"),
    ("copies and fills", r"mem(cpy|set)|copy|fill|Fill"),
    ("small torch kernels", r"elementwise|index|scatter|gather|Cat|arange|vectorized"),
)


class Probe:
    """Worker methods; `self` is the worker, `self.model_runner` its model runner."""

    def _phases(self):
        """(name, class, method) of every phase that this engine has."""
        runner = self.model_runner
        speculator = getattr(runner, "speculator", None)
        owners = {
            "runner": type(runner),
            "model": type(runner.model),
            "model_state": type(getattr(runner, "model_state", None)),
            "speculator": type(speculator),
            "draft": type(getattr(speculator, "model", None)),
            "rejection_sampler": type(getattr(runner, "rejection_sampler", None)),
        }
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.worker.gpu.async_utils import AsyncOutput
        from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

        owners |= {"scheduler": Scheduler, "engine": EngineCore}
        owners |= {"output": AsyncOutput, "graphs": CudaGraphManager}
        for owner, method in PHASES:
            if hasattr(owners[owner], method) and owners[owner] is not type(None):
                yield f"{owner}.{method}", owners[owner], method

    def host_start(self) -> str:
        """Time the phases from now on."""
        self._probe_spent: dict[str, list] = {}
        self._probe_stock = []
        for name, owner, method in self._phases():
            stock, spent = getattr(owner, method), self._probe_spent.setdefault(name, [0, 0.0])
            own = method in vars(owner)

            def timed(*args, _stock=stock, _spent=spent, **kwargs):
                begun = time.perf_counter()
                try:
                    return _stock(*args, **kwargs)
                finally:
                    _spent[0] += 1
                    _spent[1] += time.perf_counter() - begun

            setattr(owner, method, timed)
            self._probe_stock.append((owner, method, stock, own))
        return ""

    def host_stop(self) -> str:
        """JSON: calls and milliseconds of each phase since `host_start`."""
        for owner, method, stock, own in self._probe_stock:
            if own:
                setattr(owner, method, stock)
            else:
                delattr(owner, method)
        return json.dumps({n: [c, s * 1e3] for n, (c, s) in self._probe_spent.items() if c})

    def trace_start(self) -> str:
        """Record a torch profile from now on; each forward is a range named `step`."""
        import torch
        from torch.profiler import ProfilerActivity, profile, record_function

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        runner, stock = type(self.model_runner), type(self.model_runner).execute_model

        def ranged(*args, **kwargs):
            with record_function("step"):
                return stock(*args, **kwargs)

        runner.execute_model = ranged
        self._probe_undo = lambda: setattr(runner, "execute_model", stock)
        self._probe_profile = profile(activities=activities)
        self._probe_profile.start()
        return ""

    def trace_stop(self, path: str) -> str:
        """Write the trace of the first rank to `path` (Chrome's format)."""
        self._probe_profile.stop()
        self._probe_undo()
        if self.rank == 0:
            self._probe_profile.export_chrome_trace(path)
        del self._probe_profile
        return ""

    def facts(self) -> str:
        """JSON: what decides the course of a step."""
        import vllm

        runner = self.model_runner
        speculator = getattr(runner, "speculator", None)
        groups = getattr(runner, "attn_groups", [])
        try:
            from drafthead.vllm_plugin.registry import statuses

            patches = {status.patch.name: str(status.state) for status in statuses()}
        except ImportError:  # of an older drafthead
            patches = {}
        return json.dumps(
            {
                "vllm": vllm.__version__,
                "patches": patches,
                "runner": type(runner).__module__,
                "attention": [[g.backend.get_name() for g in group] for group in groups],
                "fused_draft_loop": getattr(speculator, "supports_decode_metadata_update", None),
                "draft_argmax": getattr(speculator, "use_local_argmax_reduction", None),
                "cudagraph_mode": str(self.vllm_config.compilation_config.cudagraph_mode),
                "mamba_cache_mode": self.vllm_config.cache_config.mamba_cache_mode,
                "distinct_experts": self.distinct_experts(),
            }
        )


def summarize(path: Path, skip: int = 6) -> dict:
    """Milliseconds a step, by kernel class, kernel, launch call and operator.

    The window runs from the start of step ``skip`` to the start of the third step from the end,
    on the host's clock; a kernel belongs to it when it starts there.
    """
    events = json.loads(path.read_text())["traceEvents"]
    spans = [e for e in events if e.get("ph") == "X"]
    steps = sorted(
        e["ts"] for e in spans if e["name"] == "step" and e.get("cat") == "user_annotation"
    )
    if len(steps) < skip + 6:
        return {"error": f"only {len(steps)} steps in the trace"}
    begin, end, count = steps[skip], steps[-3], len(steps) - 3 - skip
    inside = [e for e in spans if begin <= e["ts"] < end]
    device = [e for e in inside if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    calls = [e for e in inside if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    operators = [e for e in inside if e.get("cat") == "cpu_op"]

    def table(rows, key, top) -> dict:
        totals: dict[str, list] = defaultdict(lambda: [0, 0.0])
        for row in rows:
            entry = totals[key(row)]
            entry[0] += 1
            entry[1] += row["dur"]
        best = sorted(totals.items(), key=lambda item: -item[1][1])[:top]
        return {
            name: {"per_step": round(n / count, 2), "us_per_step": round(us / count, 2)}
            for name, (n, us) in best
        }

    return {
        "steps": count,
        "ms_per_step": round((end - begin) / count / 1e3, 4),
        "device_busy_ms_per_step": round(busy(device) / count / 1e3, 4),
        "device_busy_share": round(busy(device) / (end - begin), 4),
        "classes": table(device, kernel_class, 20),
        "kernels": table(device, lambda e: e["name"][:110], 60),
        "calls": table(calls, lambda e: e["name"], 20),
        "operators": table(operators, lambda e: e["name"], 40),
    }


def kernel_class(event: dict) -> str:
    if event["cat"] != "kernel":
        return "copies and fills"
    return next((name for name, p in CLASSES if re.search(p, event["name"])), "other")


def busy(device: list[dict]) -> float:
    """Microseconds in which at least one kernel runs."""
    total, until = 0.0, float("-inf")
    for event in sorted(device, key=lambda e: e["ts"]):
        stop = event["ts"] + event["dur"]
        total += max(0.0, stop - max(event["ts"], until))
        until = max(until, stop)
    return total
