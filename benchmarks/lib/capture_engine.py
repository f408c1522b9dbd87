"""One engine of capture/overhead.py in a process of its own: drafthead's `CaptureEngine`, asked in
JSON lines. `Engine` is the parent's side, `main` the child's."""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.lib import host_load
from benchmarks.lib.child import Child
from benchmarks.lib.lfm2_shapes import SPREAD
from benchmarks.lib.replies import replies

KEPT = ("Model loading took", "Graph capturing finished", "KV cache size")


class Engine(Child):
    """Starts a child and asks it. `spec` is that of `capture/overhead.py` for the case, with the
    format in `encoding` and the store's folder in `store` (None: plain generation). A task is
    {`compare`: prompts}, or {where the states go: prompts}, `disk`, `memory` or `nowhere`."""

    def __init__(self, name: str, spec: dict, work: Path):
        log = work / f"{spec['case']}-{name}.log"
        env = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(spec["own_process"]))}
        super().__init__(name, __name__, spec, log, env)

    def said(self) -> list[str]:
        """What vLLM logged about memory."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line.split("] ", 1)[-1] for line in lines if any(k in line for k in KEPT)]


def kv_tokens(log: Path) -> int | None:
    """The tokens that vLLM says its KV cache holds."""
    found = re.findall(r"KV cache size: ([\d,]+) tokens", log.read_text(errors="replace"))
    return int(found[-1].replace(",", "")) if found else None


def main() -> None:
    """The child: builds the engine, says so, then answers one JSON line for each on stdin."""
    out, spec = replies(), json.loads(sys.argv[1])
    side = _Side(spec)
    out.write(json.dumps(side.started) + "\n")
    for line in sys.stdin:
        ((what, prompts),) = json.loads(line).items()
        answer = side.compare(prompts) if what == "compare" else side.run(prompts, what)
        out.write(json.dumps(answer) + "\n")


class _Side:
    def __init__(self, spec: dict):
        from drafthead.capture.engine import CaptureEngine
        from drafthead.recipe import parse_recipe
        from drafthead.states import StoreMeta
        from drafthead.states.writer import open_store
        from drafthead.targets import load_target

        self.spec = spec
        self.store = Path(spec["store"]) if spec["store"] else None
        recipe = parse_recipe(
            {
                "name": "bench",
                "target": {"path": spec["model"]},
                "prompts": {"sources": [{"path": "none.jsonl"}]},
                "generate": {"max_new_tokens": spec["new_tokens"]},
                "engine": {
                    "dtype": "float32" if spec["tiny"] else "auto",
                    "max_model_len": 512,
                    "max_num_seqs": spec["seqs"],
                    "gpu_memory_utilization": spec["share"],
                    "kv_cache_memory_bytes": spec["kv_bytes"],
                    "extra": SPREAD if spec["dummy"] else {},
                },
            },
            "benchmark",
        )
        self.target = load_target(spec["weights"])
        shape = (self.target.num_layers, self.target.hidden_size)
        self.meta = StoreMeta(tuple(spec["aux"]), *shape, spec["encoding"], 1000, {})
        if self.store is not None:  # a link to where the states of a block go
            self.places = {"disk": self.store.with_name(f"{self.store.name}-disk")}
            self.places["memory"] = Path(spec["memory"]) / self.store.name
            for place in self.places.values():
                shutil.rmtree(place, ignore_errors=True)
                open_store(place, self.meta)
            self._point("disk")
        self.engine = CaptureEngine(
            recipe, self.target, self.meta, self.store, strict=not spec["dummy"]
        )
        self.started: dict[str, Any] = {"bytes_per_token": self.meta.bytes_per_token}
        if self.store is not None:
            self.started["device_bytes"] = self.engine.stats()["device_bytes"]

    def run(self, prompts: list[list[int]], to: str) -> dict:
        """Answer all, in units; what was written is weighed and thrown away."""
        size, written, ends = self.spec["chunk"], [], []
        if self.store is not None and to != "nowhere":
            self._point(to)
        before, handed = host_load.counters(os.getpid()), []
        begun = time.perf_counter()
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            answers = self.engine.generate(part, [0] * len(part))
            written += answers
            handed.append(time.time())
            if self.store is None:
                self.engine.llm.reset_prefix_cache()
            else:
                keys = [] if to == "nowhere" else [answer.key for answer in answers]
                self._save(start // size, part, keys)
            tokens = sum(len(answer.ids) for answer in answers)
            ends.append({"tokens": tokens, "end_s": time.perf_counter() - begun})
        result: dict[str, Any] = {"tokens": sum(len(a.ids) for a in written), "units": ends}
        result["generating_s"] = time.perf_counter() - begun
        result["host"] = host_load.since(before, os.getpid())
        if self.store is None:  # the sequences for speculators' side
            return result | {"ids": [[*p, *a.ids] for p, a in zip(prompts, written, strict=True)]}
        self.engine.flush()
        result |= {"total_s": time.perf_counter() - begun, "waits": self.engine.stats()["waits"]}
        result["host_whole"] = host_load.since(before, os.getpid())
        paths = sorted(self.store.glob("unit-*.json"))
        units = [json.loads(path.read_text()) for path in paths]
        result["written_s"] = [p.stat().st_mtime - at for p, at in zip(paths, handed, strict=True)]
        checks: dict[str, int] = {}
        for unit in units:
            for key, value in unit["checks"].items():
                checks[key] = checks.get(key, 0) + value
        shards = [shard for unit in units for shard in unit["shards"]]
        result |= {"checks": checks, "bytes": sum(s["bytes"] for s in shards)}
        result["state_tokens"] = sum(sum(s["states"]) for s in shards)
        self._sweep()
        return result

    def _point(self, to: str) -> None:
        """Let the store's path lead to the disk or to memory."""
        assert self.store is not None
        self.store.unlink(missing_ok=True)
        self.store.symlink_to(self.places[to])

    def compare(self, prompts: list[list[int]]) -> dict:
        """Decode a unit, prefill the very same sequences as another, and hold them together."""
        from benchmarks.capture.compare_states import compare
        from drafthead.states import StateReader

        assert self.store is not None
        self._point("disk")
        answers = self.engine.generate(prompts, [0] * len(prompts))
        self._save(0, prompts, [answer.key for answer in answers])
        sequences = [[*p, *a.ids] for p, a in zip(prompts, answers, strict=True)]
        self._save(1, prompts, self.engine.prefill(sequences))
        self.engine.flush()
        reader = StateReader(self.store, partial=True)
        half = len(reader) // 2
        result = compare(((reader[i], reader[half + i]) for i in range(half)), self.target)
        self._sweep()
        return result

    def _save(self, unit: int, prompts: list, keys: list[int]) -> None:
        """Hand over the states of ``keys``; none: they are dropped."""
        from drafthead.capture.engine import SequenceToKeep

        wanted = [
            SequenceToKeep(key, len(p), [False] * len(p), str(i), "train")
            for i, (p, key) in enumerate(zip(prompts, keys))
        ]
        self.engine.save(unit, wanted)

    def _sweep(self) -> None:
        assert self.store is not None
        for path in self.store.glob("unit-*"):
            path.unlink()


if __name__ == "__main__":
    main()
