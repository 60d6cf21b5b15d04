#!/usr/bin/env bash
# Installs what is needed into .venv and runs the quickstart; options go on to it. Relative paths in
# them are taken from the checkout.
#   bash launch/quickstart.sh [--workdir=DIR] [--config.PART.KEY=VALUE ...]
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment ""
cd "$root"
# On CPUs the arrays of a step come from malloc and go back to it: with pages of 4 KiB a fifth of
# the time went into faulting them in.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec "$venv/bin/python" -m launch.quickstart "$@"
