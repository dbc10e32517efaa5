#!/usr/bin/env bash
# Supervised fine-tuning of vision-language and text models, one process a GPU:
#
#   bash run_vlm_sft.sh CONFIG [key=value ...]
#
# CONFIG is a file of config, without .yaml. Several hosts: run the same line on each, with
# cluster.num_nodes=N, and with MASTER_ADDR (a name or address of host 0 that all hosts reach) and NODE_RANK
# (0 ... N-1, another on each host) in the environment. MASTER_PORT is 29500 unless set.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
source "$here/../launch.sh"
start_torchrun mbridge-sft mbridge_sft "$@"
