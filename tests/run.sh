#!/usr/bin/env bash
# Set up, check style, rooms and types, run the tests: the same for people and CI.
#   ./tests/run.sh                  all of it
#   ./tests/run.sh unit             one tier: unit, actors, end_to_end or cluster (tests/conftest.py says which test is which)
#   ./tests/run.sh -k losses        arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
    unit | actors | end_to_end | cluster) set -- -m "$@" ;;
esac
./jobs/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
ruff check
ruff format --check
lint-imports
mypy
exec python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"  # one alone leaves a third of two cores idle
