#!/usr/bin/env bash
# Installs what the tests need into .venv and runs everything: lint, types, unit suite, real trainings.
#   bash tests/run.sh            all of it
#   bash tests/run.sh unit       the unit suite alone (under a minute)
set -euo pipefail
cd "$(dirname "$0")/.."
export REC_R1_EXTRAS=dev
source tests/venv.sh
if [ "${1:-all}" = unit ]; then exec python -m pytest tests -m "not slow"; fi
ruff check . && ruff format --check .
mypy
python -m pytest tests --durations=8
