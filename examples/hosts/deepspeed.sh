#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# On one host, which reaches the others by ssh: deepspeed.sh TP [arguments of train_hosts.py]
# HOSTFILE names them, a line each: "node0 slots=8". Without ssh, on every host:
#   LAUNCHER="--no_ssh --node_rank=0 --master_addr=node0" deepspeed.sh 8
set -eu
tp=$1
shift
exec deepspeed --hostfile="${HOSTFILE:-$(dirname "$0")/hostfile}" ${LAUNCHER:-} \
    "$(dirname "$0")/../train_hosts.py" --tp "$tp" "$@"
