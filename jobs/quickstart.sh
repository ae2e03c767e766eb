#!/usr/bin/env bash
set -euo pipefail

help() {
    cat <<'EOF'
jobs/quickstart.sh [KEY=VALUE ...]: train a small language model with GVPO on this machine's CPUs, from nothing.

  1. set-up: .venv with torch, vLLM, DeepSpeed and Ray (jobs/setup.sh; once, 2 to 4 minutes and 4 GB)
  2. data: arithmetic problems with worked solutions, in runs/quickstart/data (seconds, once)
  3. warm start: a small model from scratch, taught to answer some of them by supervised learning (once)
  4. training: the reward rises, step by step, in runs/quickstart

2 to 4 are `gvpo-ray train jobs/quickstart.yaml`.

All of it is a matter of minutes. Started again, it skips what is done, and training goes on where it stopped.
Arguments override keys of jobs/quickstart.yaml, for the warm start and the training alike:

  jobs/quickstart.sh seed=1 run_dir=runs/other

Needs Python 3.11 or 3.12 and g++. Paths are taken from the project's folder, whichever folder it is started from.
EOF
}

for argument in "$@"; do
    case $argument in
        -h | --help) help; exit 0 ;;
        *=*) ;;
        *) echo "quickstart: error: argument $argument is not KEY=VALUE (--help says more)" >&2; exit 2 ;;
    esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
./jobs/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
exec gvpo-ray train jobs/quickstart.yaml "$@"
