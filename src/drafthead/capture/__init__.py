"""Generate and capture: the target answers the prompts, and its hidden states are stored.

In: a recipe. Out: the run's `answers/` and `states/`, a unit of work at a time, each checked.

The processes, with what passes between them (one machine; on a Ray cluster `cluster.py` starts the
second one on each machine):

    drafthead generate (stages.py)
      | JSON lines: order, progress                          process.py
    engine's process (generate.py, engine.py)
      | collective_rpc; on a CPU both are one process
    vLLM worker (worker.py, cpu_worker.py): recorder.py copies each step's states off the GPU
      | rows in shared memory (shared_memory.py), their numbers through a pipe
    writer's process (writer_process.py): assemble.py sorts rows by sequence, checks.py checks them
      | files: states/writer.py; with `capture.mode: online` pages that training reads (online.py)
"""
