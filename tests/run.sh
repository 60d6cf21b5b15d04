#!/usr/bin/env bash
# Installs the test extra into .venv; runs ruff, mypy and the tests, a file of them on each core.
# Options go on to pytest; -n 0 keeps all in one process, as --pdb and -s need it.
#   bash tests/run.sh [-k NAME ...]
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
prepare_environment test
cd "$root"
"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m ruff format --check .
"$venv/bin/python" -m mypy
# The tests compare with float32 numbers of a CPU, and make devices of their own.
exec env JAX_PLATFORMS=cpu "$venv/bin/python" -m pytest -n auto --maxprocesses 8 --dist loadfile \
  --no-loadscope-reorder "$@"
