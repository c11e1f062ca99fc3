#!/usr/bin/env bash
# lm-evaluation-harness on a model. `eval/run_lm_eval.sh --help` tells everything.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}"
[ -e "$root/pyproject.toml" ] && export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"  # a checkout, installed or not
exec "$python" -m llamba.eval.commands lm_eval "$@"
