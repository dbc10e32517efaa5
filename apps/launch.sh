# Shared by the launch scripts of the apps: `start_torchrun PROGRAM PACKAGE [CONFIG] [key=value ...]`. The variable `here`
# is the directory of the app, with its configs in config/. The first comment of the calling script is its help.

fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

configs() { find "$here/config" -name '*.yaml' -exec basename {} .yaml \; | sort | paste -sd ' ' -; }

start_torchrun() {
    local program=$1 package=$2 script
    script=$(basename "$0")
    shift 2
    case ${1:-} in
    -h | --help)
        sed -n '2,/^set /{/^#/!d;s/^# \{0,1\}//;p}' "$0"
        printf 'Configs: %s\n' "$(configs)"
        exit 0
        ;;
    '') fail "which config? bash $script CONFIG [key=value ...], with CONFIG one of: $(configs)" ;;
    *=*) fail "'$1' is a setting, and the config comes first: bash $script CONFIG $1, with CONFIG one of: $(configs)" ;;
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
    [ "$processes" -gt 0 ] || processes=1 # no GPU: one process on the CPU

    if [ "$nodes" -gt 1 ]; then
        [ -n "${MASTER_ADDR:-}" ] || fail "cluster.num_nodes=$nodes needs MASTER_ADDR: a name or address of host 0 that all hosts reach"
        [ -n "${NODE_RANK:-}" ] || fail "cluster.num_nodes=$nodes needs NODE_RANK: 0 on the host of MASTER_ADDR, then 1 ... $((nodes - 1))"
        rendezvous=(--nnodes="$nodes" --node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}")
    else
        rendezvous=(--standalone --nnodes=1)
    fi

    # A torchrun of another environment would not find the packages.
    root=$(cd -- "$here/../.." && pwd -P)
    torchrun=$(command -v torchrun || true)
    app=$(command -v "$program" || true)
    if [ -n "$torchrun" ] && [ -n "$app" ] && [ "$(dirname "$torchrun")" = "$(dirname "$app")" ]; then
        launch=(torchrun)
    elif [ -x "$root/uvw" ]; then
        launch=("$root/uvw" run --project "$root" torchrun)
    else
        fail "torchrun is not on PATH: activate the environment that $program is installed in"
    fi

    # One thread per process unless set otherwise; torchrun would set this as well, with a warning.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    exec "${launch[@]}" "${rendezvous[@]}" --nproc-per-node="$processes" \
        -m "$package.cli" --config-name "$config" "$@"
}
