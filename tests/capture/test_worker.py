import subprocess
import sys


def test_the_gpu_worker_leaves_cuda_events_alone():
    # vLLM's CPU worker replaces them, after which nothing compiles on a GPU.
    code = (
        "import torch; event = torch.cuda.Event\n"
        "import drafthead.capture.worker\n"
        "assert torch.cuda.Event is event, torch.cuda.Event"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
