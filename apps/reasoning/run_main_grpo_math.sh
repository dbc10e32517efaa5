#!/usr/bin/env bash
# GRPO on verifiable math, one process per GPU:
#
#   bash run_main_grpo_math.sh CONFIG [key=value ...]
#
# CONFIG is the name of a file in config/math or config, without .yaml. On several hosts, run the same line on each with
# cluster.num_nodes=N, and set in the environment MASTER_ADDR (a name or address of host 0 that all hosts can reach) and
# NODE_RANK (0 ... N-1, different on each host). MASTER_PORT defaults to 29500.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
source "$here/../launch.sh"
start_torchrun mbridge-reasoning mbridge_reasoning "$@"
