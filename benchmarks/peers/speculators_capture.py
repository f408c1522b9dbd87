"""speculators 0.9.0 captures states in its own way: vLLM's server with the connector and the flags
of its `launch_vllm.py`, and its `generate-offline-data` over HTTP. For capture/overhead.py."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from benchmarks.lib.capture_engine import kv_tokens
from benchmarks.lib.lfm2_shapes import SPREAD
from benchmarks.peers import speculators_side

CLIENT_LIMIT = 90.0  # seconds


class Server:
    """`vllm serve` as speculators starts it for extraction; starts at once, beside the engines."""

    def __init__(self, spec: dict, layers: list[int], port: int, work: Path):
        self.spec, self.port, self.begun = spec, port, time.monotonic()
        self.folder = work / f"{spec['case']}-speculators"
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "states").mkdir(parents=True)
        self.log = work / f"{spec['case']}-speculators.log"
        speculative = {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": layers}},
        }
        transfer = {
            "kv_connector": "ExampleHiddenStatesConnector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": str(self.folder / "states")},
        }
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", spec["model"]]
        command += ["--speculative_config", json.dumps(speculative)]
        command += ["--kv_transfer_config", json.dumps(transfer)]
        command += ["--api-server-count", "4", "--renderer-num-workers", "2"]
        command += ["--port", str(port), "--max-model-len", "512"]
        command += ["--max-num-seqs", str(spec["seqs"])]
        command += ["--gpu-memory-utilization", str(spec["share"])]
        command += ["--kv-cache-memory-bytes", str(spec["kv_bytes"])]
        for flag, value in SPREAD.items() if spec["dummy"] else ():
            command += [f"--{flag.replace('_', '-')}", value]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def capture(self, ids: list[list[int]], peers: Path, limit: float) -> dict:
        """Time its client over sequences that are already written; what failed is said."""
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() - self.begun > limit:
                return {"failed": "the server did not start"} | self._trouble()
            time.sleep(0.5)
        (self.folder / "ids.json").write_text(json.dumps(ids))
        arguments = [str(a) for a in (self.folder, self.port, peers, self.spec["seqs"])]
        try:
            client = subprocess.run(
                [sys.executable, "-m", __spec__.name, *arguments],
                capture_output=True,
                text=True,
                timeout=CLIENT_LIMIT,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"its client was not done in {CLIENT_LIMIT} s"} | self._trouble()
        lines = [line for line in client.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            said = (client.stdout + client.stderr)[-1500:]
            return {"failed": "its client failed", "client": said} | self._trouble()
        files = list((self.folder / "out").glob("hs_*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        tokens = sum(len(i) for i in ids)
        return {
            "samples": len(files),
            "of": len(ids),
            "capture_s": json.loads(lines[-1][7:])["seconds"],
            "bytes": size,
            "bytes_per_token": round(size / tokens, 1),
            "kv_tokens": kv_tokens(self.log),
        } | ({} if len(files) == len(ids) else {"client": client.stderr[-1500:]} | self._trouble())

    def _healthy(self) -> bool:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2)
            return True
        return False

    def _trouble(self) -> dict:
        log = self.log.read_text(errors="replace")
        why = [line for line in log.splitlines() if re.search(r"Error|raise ", line)]
        return {"log": why[-8:] or log[-1000:]}

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def main() -> None:
    """The client: FOLDER PORT PEERS CONCURRENCY; the work of `generate-offline-data`."""
    folder, port, peers, concurrency = sys.argv[1:5]
    speculators_side.find(Path(peers))
    from datasets import Dataset
    from speculators.cli.generate_offline_data import _generate_and_save_hidden_states

    ids = json.loads((Path(folder) / "ids.json").read_text())
    data = Dataset.from_dict({"input_ids": ids, "loss_mask": [[1] * len(i) for i in ids]})
    data.set_format("torch")
    data.save_to_disk(f"{folder}/data")
    begun = time.perf_counter()
    asyncio.run(
        _generate_and_save_hidden_states(
            model=None,
            endpoint=f"http://127.0.0.1:{port}/v1",
            preprocessed_data=f"{folder}/data",
            output=f"{folder}/out",
            max_samples=None,
            concurrency=int(concurrency),
            validate_outputs=False,
            request_timeout=60.0,
            max_retries=1,
            fail_on_error=False,
            max_consecutive_errors=None,
            world_size=1,
            rank=0,
        )
    )
    print("RESULT " + json.dumps({"seconds": time.perf_counter() - begun}), flush=True)


if __name__ == "__main__":
    main()
