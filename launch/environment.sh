# shellcheck shell=bash
# Sourced by launch/quickstart.sh and tests/run.sh: one virtual environment, .venv at the root.
# It is made anew when it is missing, incomplete, or made for another PYTHON or accelerator (two builds
# of jax in one environment would conflict), and updated when setup.cfg or the extras change. PYTHON
# chooses the interpreter, ACCELERATOR=cpu|cuda|tpu the build of jax.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv

choose_accelerator() {
  if [ -n "${ACCELERATOR:-}" ]; then
    accelerator=$ACCELERATOR reason="ACCELERATOR says so"
  elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
    accelerator=cuda reason="nvidia-smi lists a GPU"
  elif compgen -G "/dev/accel*" >/dev/null || [ -n "${TPU_ACCELERATOR_TYPE:-}" ]; then
    accelerator=tpu reason="this is a TPU machine"
  else
    accelerator=cpu reason="neither an NVIDIA GPU nor a TPU was found"
  fi
  case $accelerator in
    cpu | cuda | tpu) echo "jax for $accelerator: $reason" ;;
    *)
      echo "error: ACCELERATOR is '$accelerator'; choose cpu, cuda or tpu" >&2
      exit 2
      ;;
  esac
}

# What an environment was made for: the accelerator and the interpreter.
describe() {
  echo "$accelerator $("$1" -c 'import sys; print(sys.base_prefix, *sys.version.split())')"
}

# prepare_environment [EXTRA]: installs everything, including EXTRA, for "$venv/bin/python".
prepare_environment() {
  local python=${PYTHON:-python3} extras=${1:-} stamp=$venv/installed-${1:-core} wanted made=""
  choose_accelerator
  [ "$accelerator" = cpu ] || extras=$accelerator${extras:+,$extras}
  # From inside, since the checkout's own path is no pattern.
  if (cd "$venv" 2>/dev/null && compgen -G "installed-*" >/dev/null); then
    made=$(cat "$venv/made-for")
  fi
  # Without PYTHON the environment keeps the interpreter it has.
  if [ "${made%% *}" != "$accelerator" ] ||
    { [ -n "${PYTHON:-}" ] && [ "$made" != "$(describe "$PYTHON")" ]; }; then
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "error: $python is not Python 3.11 or newer; name one with PYTHON=/path/to/python" >&2
      exit 2
    fi
    echo "making the virtual environment $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
    describe "$python" >"$venv/made-for"
  fi
  wanted="$extras $(cksum <"$root/setup.cfg")"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return
  fi
  echo "installing into $venv (some minutes the first time)"
  (cd "$root" && "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --editable ".${extras:+[$extras]}")
  echo "$wanted" >"$stamp"
}
