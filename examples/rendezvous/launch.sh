#!/usr/bin/env bash
# One run on several machines: start this on each of them, with the same arguments, within a few minutes.
#
#   HEAD=node1:29400 NODES=2 GPUS=4 examples/rendezvous/launch.sh pr1212 --data /shared/sp1024 --out /shared/runs/first
#
# HEAD: name of one of the machines, and a free port on it, where the launchers meet. NODES: machines. GPUS: processes on
# each; NODES x GPUS may be any number up to the recipe's lanes. RUN_ID: tells runs apart that meet at one HEAD.
# LOCAL_ADDR: how the others reach this machine, where its host name does not say so. PYTHON: the interpreter.
#
# --data and --out lie on a file system that all machines see, and --out is given: the first process, which writes the run
# folder, can be on any of them. The clock of the training budget is the first process's, for all.
set -euo pipefail

: "${HEAD:?set HEAD=host:port, where the launchers meet}" "${NODES:?set NODES=machines}" "${GPUS:?set GPUS=processes on each}"

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="$NODES" --nproc-per-node="$GPUS" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${RUN_ID:-epigram}" \
    ${LOCAL_ADDR:+--local-addr="$LOCAL_ADDR"} \
    -m epigram train "$@"
