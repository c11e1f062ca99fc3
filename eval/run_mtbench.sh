#!/usr/bin/env bash
# MT-Bench of a model, with any judge. `eval/run_mtbench.sh --help` tells everything.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}"
[ -e "$root/pyproject.toml" ] && export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"  # a checkout, installed or not
exec "$python" -m llamba.eval.commands mt_bench "$@"
