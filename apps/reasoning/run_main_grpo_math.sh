#!/usr/bin/env bash
# GRPO on verifiable math, one process a GPU:
#
#   bash run_main_grpo_math.sh CONFIG [key=value ...]
#
# CONFIG is a file of config/math or config, without .yaml. Several hosts: run the same line on each, with
# cluster.num_nodes=N, and with MASTER_ADDR (a name or address of host 0 that all hosts reach) and NODE_RANK
# (0 ... N-1, another on each host) in the environment. MASTER_PORT is 29500 unless set.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
root=$(cd -- "$here/../.." && pwd -P)

fail() {
    printf 'run_main_grpo_math.sh: %s\n' "$*" >&2
    exit 2
}

configs() { find "$here/config" -name '*.yaml' -exec basename {} .yaml \; | sort | paste -sd ' ' -; }

case ${1:-} in
-h | --help)
    sed -n '2,/^set /{/^#/!d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    printf 'Configs: %s\n' "$(configs)"
    exit 0
    ;;
'') fail "which config? bash run_main_grpo_math.sh CONFIG [key=value ...], with CONFIG one of: $(configs)" ;;
*=*) fail "'$1' is a setting, and the config comes first: bash run_main_grpo_math.sh CONFIG $1, with CONFIG one of: $(configs)" ;;
esac
config=${1%.yaml}
shift
config=${config##*/}
[ -n "$(find "$here/config" -name "$config.yaml")" ] || fail "no config '$config'; there are: $(configs)"

nodes=${NNODES:-1}
processes=${NPROC_PER_NODE:-}
for setting in "$@"; do
    case $setting in
    cluster.num_nodes=*) nodes=${setting#*=} ;;
    launcher.nproc_per_node=*) processes=${setting#*=} ;;
    esac
done
case $nodes in '' | *[!0-9]* | 0) fail "cluster.num_nodes=$nodes is not a number of hosts" ;; esac

if [ -z "$processes" ] || [ "$processes" = null ]; then
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        processes=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
    else
        processes=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)
    fi
fi
case $processes in *[!0-9]*) fail "launcher.nproc_per_node=$processes is not a number of processes" ;; esac
[ "$processes" -gt 0 ] || processes=1 # no GPU here: one process on the CPU

if [ "$nodes" -gt 1 ]; then
    [ -n "${MASTER_ADDR:-}" ] || fail "cluster.num_nodes=$nodes needs MASTER_ADDR: a name or address of host 0 that all hosts reach"
    [ -n "${NODE_RANK:-}" ] || fail "cluster.num_nodes=$nodes needs NODE_RANK: 0 on the host of MASTER_ADDR, then 1 ... $((nodes - 1))"
    rendezvous=(--nnodes="$nodes" --node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}")
else
    rendezvous=(--standalone --nnodes=1)
fi

# A torchrun from another environment would not find the packages.
torchrun=$(command -v torchrun || true)
app=$(command -v mbridge-reasoning || true)
if [ -n "$torchrun" ] && [ -n "$app" ] && [ "$(dirname "$torchrun")" = "$(dirname "$app")" ]; then
    launch=(torchrun)
elif [ -x "$root/uvw" ]; then
    launch=("$root/uvw" run --project "$root" torchrun)
else
    fail "torchrun is not on PATH: activate the environment that mbridge-reasoning is installed in"
fi

# Each process computes with one thread unless told otherwise; torchrun would set this too, with a warning.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${launch[@]}" "${rendezvous[@]}" --nproc-per-node="$processes" \
    -m mbridge_reasoning.cli --config-name "$config" "$@"
