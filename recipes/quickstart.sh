#!/usr/bin/env bash
# From a fresh clone to a trained policy: makes .venv, installs, trains, evaluates and plots.
#   bash recipes/quickstart.sh [key=value …]          e.g. output_dir=runs/second seed=1
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/venv.sh
rec-r1 check recipes/quickstart.yaml "$@"
rec-r1 train recipes/quickstart.yaml "$@"
