#!/usr/bin/env bash
# Set up, check style, rooms and types, run the tests: the same for people and CI.
#   ./tests/run.sh                  all of it
#   ./tests/run.sh unit             one tier: unit, components, actors, end_to_end or cluster (tests/conftest.py says which is which)
#   ./tests/run.sh -k losses        arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
workers=3 # two leave a fifth of two cores idle, but unit tests, which wait for nothing
[[ ${1:-} != unit ]] || workers=2
case "${1:-}" in
    unit | components | actors | end_to_end | cluster) set -- -m "$@" ;;
esac
./jobs/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
python -m compileall -q gvpo_ray tests # each of the hundreds of processes that tests start would do it, under PYTHONDONTWRITEBYTECODE
ruff check
ruff format --check
lint-imports
mypy & # beside the tests, because one core's work for a minute or two where it has no cache
types=$! status=0
trap 'kill "$types" 2> /dev/null || true' EXIT
python -m pytest --numprocesses "$workers" --dist loadfile --no-loadscope-reorder "$@" || status=$?
wait "$types" || status=1
exit "$status"
