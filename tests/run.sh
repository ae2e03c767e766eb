#!/usr/bin/env bash
# Set up, check style and types, run the tests: the same for people and CI. Arguments go to pytest: ./tests/run.sh -k losses
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./jobs/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
ruff check
ruff format --check
lint-imports
mypy
exec python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"  # one alone leaves a third of two cores idle
