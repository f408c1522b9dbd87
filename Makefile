# make demo   the whole job on this machine, with a real pretrained target
# make test   the whole suite, the real engine included
# Both set up everything in .venv first.

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: setup demo demo-hybrid test test-matrix lint docs clean

setup: $(READY)

$(READY): pyproject.toml tools/setup.sh
	bash tools/setup.sh $(VENV)
	touch $@

demo: $(READY)
	$(PY) recipes/demo_prompts.py build/demo/prompts.jsonl
	$(PY) recipes/smollm2.py build/demo/SmolLM2-135M-Instruct
	$(VENV)/bin/drafthead run recipes/demo.yaml

demo-hybrid: $(READY)
	$(PY) recipes/hybrid_prompts.py build/demo/hybrid_prompts.jsonl
	$(VENV)/bin/drafthead run recipes/demo-hybrid.yaml

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Workers have one thread each; on two cores the third fills in where others wait for an engine.
test: lint
	$(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Outside CI: the unit suite on the oldest and the newest PyTorch and transformers.
test-matrix:
	bash tools/test_matrix.sh

# Heads in other engines than vLLM, each in an environment of its own; not part of `test`.
test-engines: $(READY)
	$(PY) -m tests.engines --out benchmarks/results/engines.json

docs: $(READY)
	$(VENV)/bin/mkdocs build --strict

clean:
	rm -rf build site runs/demo runs/demo-hybrid
