#!/usr/bin/env bash
# Installs what is needed into .venv and runs the quickstart; options go on to it.
#   bash launch/quickstart.sh [--workdir=DIR] [--config.PART.KEY=VALUE ...]
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment
cd "$root"
exec "$venv/bin/python" -m launch.quickstart "$@"
