#!/usr/bin/env bash
set -euo pipefail

help() {
    cat <<'EOF'
cluster/local.sh [RAY START OPTION ...]: a Ray cluster of one node on this machine, to try `ray job submit` on.

It has ports and a folder of its own, asks for a token as KubeRay's clusters do, listens on 127.0.0.1 alone, and runs until Ctrl-C (or
SIGTERM), which ends it and nothing else. In another terminal:

  source runs/cluster/env          # where it is, and the token
  ray job submit --working-dir . -- python jobs/train.py jobs/quickstart.yaml root="$PWD"

Options go to `ray start`, such as --num-cpus=8. Needs .venv (jobs/setup.sh).
EOF
}

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    help
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
command -v ray > /dev/null || { echo "local: error: there is no ray here: run jobs/setup.sh first" >&2; exit 2; }

shown=${GVPO_LOCAL_CLUSTER:-runs/cluster} # where the file to source is
# Ray 2.60.0 puts the path of Python into lines of bash as it is: where that has a space or the like, a link stands in for it
is_plain() { [[ $1 != *[!a-zA-Z0-9_@%+=:,./-]* ]]; }
is_plain "${TMPDIR:-}" || TMPDIR=/tmp
folder=$(mktemp -d "${TMPDIR:-/tmp}/gvpo_ray_XXXXXX") # short: Ray's sockets lie in it, and their paths must be
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$folder/token"
chmod 600 "$folder/token"
read -r port dashboard client agent agent_grpc environment metrics <<< "$(python - <<'EOF'
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(7)]
print(*(each.getsockname()[1] for each in sockets))
EOF
)"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token" RAY_USAGE_STATS_ENABLED=0
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # there is no other node to hand anything to
# A job that is stopped (`ray job stop`) has so many seconds to end by itself; by default 3, which is less than a run takes.
export RAY_JOB_STOP_WAIT_TIME_S=30
unset RAY_ADDRESS

python=$(command -v python)
is_plain "$python" || { ln -s "${python%/bin/*}" "$folder/python"; python=$folder/python/bin/python; }
"$python" -m ray.scripts.scripts start --head --block --temp-dir "$folder/ray" --node-ip-address 127.0.0.1 --port "$port" --include-dashboard true \
    --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" --ray-client-server-port "$client" --dashboard-agent-listen-port "$agent" \
    --dashboard-agent-grpc-port "$agent_grpc" --runtime-env-agent-port "$environment" --metrics-export-port "$metrics" "$@" \
    > "$folder/log" 2>&1 &
cluster=$!

end() {
    trap - EXIT INT TERM
    kill "$cluster" 2> /dev/null && echo "local: the cluster ends" || true
    wait "$cluster" 2> /dev/null || true
    rm -rf "$shown" "$folder"
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for _ in $(seq 120); do
    kill -0 "$cluster" 2> /dev/null || { cat "$folder/log" >&2; exit 1; }
    python -c "import socket; [socket.create_connection(('127.0.0.1', port), 1) for port in ($dashboard, $agent)]" 2> /dev/null && break
    sleep 0.5
done
sleep 2 # the node's agent, which starts jobs, makes itself known

mkdir -p "$shown"
cat > "$shown/env" <<EOF
export RAY_ADDRESS=http://127.0.0.1:$dashboard RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token PATH=$(printf %q "$(dirname "$(command -v ray)")"):\$PATH
EOF
cat <<EOF
dashboard: http://127.0.0.1:$dashboard (it asks for the token in $folder/token)
submit, in another terminal:
  source $shown/env
  ray job submit --working-dir . -- python jobs/train.py jobs/quickstart.yaml root=$(printf %q "$PWD")
Ctrl-C ends this cluster and nothing else.
EOF
wait "$cluster"
