#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# On every host: torchrun.sh FIRST_HOST HOSTS RANKS_PER_HOST [arguments of train_hosts.py]
# The TP size is the number of ranks of a host, so that data parallelism goes across.
set -eu
first=$1 hosts=$2 ranks=$3
shift 3
exec torchrun --nnodes="$hosts" --nproc-per-node="$ranks" \
    --rdzv-backend=c10d --rdzv-endpoint="$first:29500" \
    "$(dirname "$0")/../train_hosts.py" --tp "$ranks" "$@"
