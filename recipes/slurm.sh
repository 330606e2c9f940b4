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

# The notebooks run on the first node; each training is one srun over all tasks.
export BEYOND_DPO_LAUNCHER=srun BEYOND_DPO_PROCESSES=$SLURM_NTASKS
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
python -m beyond_dpo.notebook.run $RUN & head=$!
trap 'kill -TERM $head' TERM                          # a signal reaches a batch script only while it waits
wait $head || wait $head                              # the first one ends with the signal
