#!/usr/bin/env bash
# On a machine with a GPU, a CUDA torch and nvcc: build, run the GPU's tests, time the operators and whole training
# steps, and write gpu_results.json, in under nine minutes. Elsewhere: one line, and exit code 2.
#
#   tools/gpu_check.sh [--out gpu_results.json] [--budget 520] [--parts build tests ops train]
#
# PYTHON names the interpreter; left out, it is that of .venv, or else python3.
set -eu
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
exec "$PYTHON" tools/bench/gpu_check.py "$@"
