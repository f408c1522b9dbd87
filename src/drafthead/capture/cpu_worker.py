"""The capturing worker on a CPU. A module of its own: vLLM's CPU worker, once imported, puts
stand-ins in the place of ``torch.cuda.Event``, and no GPU kernel can be compiled from then on."""

from vllm.v1.worker.cpu_worker import CPUWorker

from drafthead.capture.worker import Capture


class CaptureCPUWorker(Capture, CPUWorker):
    """vLLM's CPU worker that also captures."""
