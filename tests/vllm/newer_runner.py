"""The newer model runner, that of GPUs, on the CPU.

vLLM runs it there with Triton's CPU backend; Triton's interpreter does as well:

    python -m tests.vllm.newer_runner JOBS RESULTS      (JSON files, see run())
"""

import importlib
import json
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

from drafthead.vllm_plugin.patch import original
from tests.triton_interpreter import REPO, environment, run_tests


def run(folder: Path, jobs: dict[str, dict]) -> dict[str, dict]:
    """Run ``jobs`` one after the other, an engine each, in one process; results by name.

    A job has ``target``, ``speculative`` and ``requests``, and may have ``arguments`` (as for
    ``engines.engine``), ``known`` (sequences: drafts come from the oracle) and ``without``
    (``module:attribute`` of functions that a patch replaced, to be as vLLM has them). A result has
    ``answers``, the numbers of ``drafted`` and ``accepted`` tokens, and whether drafts were chosen
    in the ``draft_vocab`` (None without a head).
    """
    given, results = folder / "jobs.json", folder / "results.json"
    given.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(given), str(results)],
        env=environment(
            VLLM_USE_V2_MODEL_RUNNER="1",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
        ),
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(results.read_text())


@contextmanager
def _as_vllm_has_it(place: str):
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for attribute in owners:
        owner = getattr(owner, attribute)
    patched = getattr(owner, name)
    stock = original(owner, name)
    assert stock is not patched
    setattr(owner, name, stock)
    try:
        yield
    finally:
        setattr(owner, name, patched)


def _verify_twice() -> None:
    """Let the patch and vLLM's own rejection sampler judge every batch, and agree."""
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    from drafthead.vllm_plugin.greedy_verify import is_plain_greedy

    patched, stock = RejectionSampler.__call__, original(RejectionSampler, "__call__")

    def __call__(self, logits, input_batch, *rest):
        assert is_plain_greedy(self, input_batch.idx_mapping_np)
        found = patched(self, logits, input_batch, *rest)
        want = stock(self, logits, input_batch, *rest)
        for name in ("num_sampled", "num_rejected"):
            one, other = getattr(found, name), getattr(want, name)
            assert one.dtype == other.dtype
            assert one.tolist() == other.tolist(), name
        for row, count in enumerate(want.num_sampled.tolist()):
            one, other = found.sampled_token_ids[row], want.sampled_token_ids[row]
            assert one.dtype == other.dtype
            assert one[:count].tolist() == other[:count].tolist()
        return found

    RejectionSampler.__call__ = __call__


def let_vllm_interpret() -> None:
    """Before vLLM is imported: it shall take Triton's interpreter for a backend."""
    import triton.backends

    # vLLM looks for this name, and whether a driver is active; the interpreter needs neither.
    driver = SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


def run_interpreted(tmp_path: Path, *tests: str) -> None:
    """Run the tests of files but those that call this, with vLLM's kernels interpreted."""
    run_tests(
        f"--basetemp={tmp_path / 'inner'}",
        *("-k", "not interpreter", *tests),
        first=f"from {__name__} import let_vllm_interpret; let_vllm_interpret();",
    )


def main(given: str, results: str) -> None:
    let_vllm_interpret()

    from drafthead.vllm_plugin import (  # noqa: F401  (apply their patches)
        dspark,
        eagle3,
        lfm2,
        register,
    )
    from tests.vllm.engines import answers, counter, engine
    from tests.vllm.oracle import proposing

    register()
    _verify_twice()
    found = {}
    for name, job in json.loads(Path(given).read_text()).items():
        with ExitStack() as stack:
            for place in job.get("without", ()):
                stack.enter_context(_as_vllm_has_it(place))
            if "known" in job:
                stack.enter_context(proposing(job["known"]))
            arguments = job.get("arguments", {})
            target, speculative = Path(job["target"]), job["speculative"]
            llm = stack.enter_context(engine(target, speculative, **arguments))
            runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
            speculator = runner.model_runner.speculator
            found[name] = {
                "draft_vocab": getattr(speculator, "use_local_argmax_reduction", None),
                "chain": getattr(speculator, "_drafthead_chain", None) is not None,
                "answers": answers(llm, job["requests"]),
                "drafted": counter(llm, "spec_decode_num_draft_tokens"),
                "accepted": counter(llm, "spec_decode_num_accepted_tokens"),
            }
    Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
