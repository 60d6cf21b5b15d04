#!/usr/bin/env bash
# Installs the packages into .venv and runs the quickstart with the given options. Relative paths are
# relative to the checkout.
#   bash launch/quickstart.sh [--workdir=DIR] [--config.PART.KEY=VALUE ...]
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment ""
cd "$root"
# On CPUs the arrays of a step come from malloc and return to it: with pages of 4 KiB a fifth of the
# time went into page faults.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec "$venv/bin/python" -m launch.quickstart "$@"
