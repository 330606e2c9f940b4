#!/bin/bash
# Nodes without ssh or SLURM (pods): run this on every node, with NODE_RANK=0 on the head.
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash recipes/torchrun.sh 11 --profile paper
#   NODES=2 NODE_RANK=1                      bash recipes/torchrun.sh
# All see the project, its environment and BEYOND_DPO_ARTIFACTS under the same paths. To change: these lines.
source "${VENV:-.venv}/bin/activate"                  # or: conda activate beyond-dpo
export BEYOND_DPO_ARTIFACTS="${BEYOND_DPO_ARTIFACTS:-$PWD/artifacts}"  # on a file system that all nodes share
GPUS=${GPUS:-8}                                       # processes a node
# export BEYOND_DPO_MICRO_BATCH=2                     # if processes × micro_batch of the profile exceed its global batch
# export NCCL_SOCKET_IFNAME=eth0                      # if nodes reach each other on one network only (gloo: GLOO_...)

if [ "$NODE_RANK" != 0 ]; then
    exec python -m beyond_dpo.machine.cluster join 3600       # takes part in each training; gives up if no head comes in an hour
fi
export MASTER_ADDR                                    # of the head, as the others reach it
export BEYOND_DPO_LAUNCHER=torchrun BEYOND_DPO_NODES=$NODES BEYOND_DPO_PROCESSES=$((NODES * GPUS))
exec python -m beyond_dpo.notebook.run "$@"
