"""What an engine's log says of memory that ran out."""

import pytest

from drafthead.plan import memory_fault

# As vLLM 0.32 and PyTorch 2.11 print them.
LOGS = {
    "ValueError: Free memory on device cuda:0 (35.2/79.2 GiB) on startup is less than desired GPU "
    "memory utilization (0.9, 71.3 GiB). Decrease": "engine.gpu_memory_utilization",
    "ValueError: Available memory on node 0 (20.1/23.4 GiB) on kv cache allocation is less than "
    "requested memory for kv (1024.0 GiB).": "engine.kv_cache_memory_bytes",
    "ValueError: No available memory for the cache blocks. Try": "serve.tensor_parallel_size",
    "ValueError: To serve at least one request with the model's max seq len (8192), (2.0 GiB KV "
    "cache is needed": "engine.max_model_len",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB": "engine.max_num_seqs",
    "RuntimeError: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 1099511627776 bytes.": "engine.kv_cache_memory_bytes",
}


@pytest.mark.parametrize("line", LOGS)
def test_memory_that_ran_out_is_named_with_the_key_to_change(tmp_path, line):
    log = tmp_path / "log"
    before = "torch.OutOfMemoryError: of an engine before\n"
    log.write_text(f"{before}(EngineCore pid=7) ERROR {line}\nRuntimeError: see root cause above\n")
    assert LOGS[line] in memory_fault(log, len(before))


def test_other_faults_are_not_blamed_on_memory(tmp_path):
    log = tmp_path / "log"
    free = "Free memory on device (70/79 GiB) on startup. Desired GPU memory utilization is (0.9)\n"
    log.write_text(f"{free}KeyError: 'layers.0.norm'\n")
    assert memory_fault(log, 0) == ""
