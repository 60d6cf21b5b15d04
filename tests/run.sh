#!/usr/bin/env bash
# Installs the test extra into .venv; runs ruff, mypy and the tests, a file of them on each core.
# With files or folders of tests it runs ruff and these tests; one file needs no second process.
# Options go on to pytest; -n 0 keeps all in one process, as --pdb and -s need it.
#   bash tests/run.sh [tests/test_X.py ...] [-k NAME ...]
# What JAX compiles is kept in .venv/compiled for a week, or in the folder VAVAE_TEST_CACHE.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
prepare_environment test
cd "$root"
"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m ruff format --check .
paths=0 workers=auto
for word in "$@"; do
  path=${word%%::*}
  case $word in
    -*) ;;
    *)
      if [ -f "$path" ]; then
        paths=$((paths + 1))
      elif [ -d "$path" ]; then
        paths=$((paths + 2))
      fi
      ;;
  esac
done
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
export VAVAE_TEST_CACHE=${VAVAE_TEST_CACHE:-$venv/compiled}
mkdir -p "$VAVAE_TEST_CACHE"
find "$VAVAE_TEST_CACHE" -name '*-cache' -mtime +7 -delete
if [ "$paths" = 0 ]; then
  "$venv/bin/python" -m mypy
elif [ "$paths" = 1 ]; then
  workers=0
fi
# The tests compare with float32 numbers of a CPU, and make devices of their own.
exec env JAX_PLATFORMS=cpu "$venv/bin/python" -m pytest -n "$workers" --maxprocesses 8 \
  --dist loadfile --no-loadscope-reorder -m "$marks" "$@"
