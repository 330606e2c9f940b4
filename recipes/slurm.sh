#!/bin/bash
# sbatch recipes/slurm.sh        (from the project's folder, which all nodes see under the same path)
#SBATCH --job-name=beyond-dpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8      # one task a GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0                  # all of a node's
#SBATCH --time=24:00:00          # a rerun goes on from the last checkpoint
#SBATCH --signal=B:TERM@120      # two minutes before the end: checkpoints stay, processes end
#SBATCH --output=slurm-%j.out
# To change: the numbers above, --partition and --account as your cluster has them, and these lines:
source "${VENV:-.venv}/bin/activate"                  # or: conda activate beyond-dpo
export BEYOND_DPO_ARTIFACTS="${BEYOND_DPO_ARTIFACTS:-$PWD/artifacts}"  # on a file system that all nodes share
RUN=${RUN:-11 --profile paper}                        # as after `python -m beyond_dpo.notebook.run`
# export BEYOND_DPO_MICRO_BATCH=2                     # if tasks × micro_batch of the profile exceed its global batch
# export NCCL_SOCKET_IFNAME=ib0                       # if nodes reach each other on one network only

export BEYOND_DPO_PROCESSES=$SLURM_NTASKS SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
if [ "${WAY:-srun}" = srun ]; then                    # notebooks run on the first node; each training is one srun
    export BEYOND_DPO_LAUNCHER=srun
else                                                  # WAY=torchrun: one agent a node, which starts that node's tasks
    export BEYOND_DPO_LAUNCHER=torchrun BEYOND_DPO_NODES=$SLURM_NNODES
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) && export MASTER_ADDR
    srun --overlap --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --ntasks-per-node=1 --relative=1 \
        python -m beyond_dpo.machine.cluster join &
fi
python -m beyond_dpo.notebook.run $RUN & head=$!
trap 'kill -TERM $head' TERM                          # a signal reaches a batch script only while it waits
wait $head || wait $head
status=$?
wait                                                  # for the followers, which end with the head
exit $status
