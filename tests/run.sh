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
# Compiling for TPUs takes libtpu. It lies apart: where it is installed, jax looks for a TPU.
marks="not torch and not gpu and not cuda_aot and not tpu_aot"
if [ "$(uname -sm)" = "Linux x86_64" ]; then
  wanted=$("$venv/bin/python" -c '
import importlib.metadata
print(next(x.split(";")[0] for x in importlib.metadata.requires("jax") if x.startswith("libtpu")))')
  if [ "$(cat "$venv/libtpu/wanted" 2>/dev/null)" != "$wanted" ]; then
    rm -rf "$venv/libtpu"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
      --target "$venv/libtpu" "$wanted"
    echo "$wanted" >"$venv/libtpu/wanted"
  fi
  export TPU_LIBRARY_PATH=$venv/libtpu/libtpu/libtpu.so
  marks="not torch and not gpu and not cuda_aot"
fi
# What the tests compile is kept for the next run, up to a gigabyte.
export VAVAE_TEST_CACHE=${VAVAE_TEST_CACHE-$venv/compiled} JAX_COMPILATION_CACHE_MAX_SIZE=1073741824
# The tests compare with float32 numbers of a CPU, and make devices of their own.
exec env JAX_PLATFORMS=cpu "$venv/bin/python" -m pytest -n auto --maxprocesses 8 --dist loadfile \
  --no-loadscope-reorder -m "$marks" "$@"
