# shellcheck shell=bash disable=SC2034  # read by submit.sh and stage.sbatch, on the login node and in every job
#
# All that is particular to a cluster. Change the first three lines; what follows has defaults that many clusters take.

ENVIRONMENT=venv:$(dirname "${BASH_SOURCE[0]}")/../.venv # or conda:NAME, or container:FILE.sif
PARTITION=                                               # of the stages that train; empty: the cluster's default
ACCOUNT=                                                 # who pays; empty: your default

CPU_PARTITION=$PARTITION # of the stages that use no GPU
CPUS_PER_TASK=4          # one task per GPU
MEMORY_PER_CPU=          # as Slurm writes it, 8G; empty: the cluster's default
GRACE=300                # seconds before its time limit at which a job is told to save and to queue again
OPTIONS=()               # more options of sbatch, for example --qos=long --constraint=a100
export WANDB_MODE=${WANDB_MODE:-offline} # compute nodes seldom reach the internet; sync_wandb.sh uploads later

# The option of sbatch that asks for $1 GPUs on each node; none where there are no GPUs.
gpus() { echo "--gres=gpu:$1"; }

# The time limit of a stage, by its verb. One that is not done by then goes on in the same job, queued again.
time_limit() {
  case $1 in
    fit | tune) echo 24:00:00 ;;
    encode | record) echo 12:00:00 ;;
    *) echo 04:00:00 ;;
  esac
}

# Set PYTHON to the command that runs Python here. Modules to load and variables to export (NCCL_SOCKET_IFNAME, HF_HOME,
# HF_HUB_OFFLINE=1, ...) belong into its first lines.
activate() {
  local name=${ENVIRONMENT#*:}
  case $ENVIRONMENT in
    venv:*) PYTHON=("$name/bin/python") ;;
    conda:*)
      set +u # conda's own scripts read variables that need not be set
      # shellcheck source=/dev/null
      source "$(conda info --base)/etc/profile.d/conda.sh"
      conda activate "$name"
      set -u
      PYTHON=(python)
      ;;
    container:*) PYTHON=(apptainer exec --nv --bind "$PWD" "$name" python) ;;
    *)
      echo "error: ENVIRONMENT=$ENVIRONMENT in site.sh. Write venv:FOLDER, conda:NAME or container:FILE.sif." >&2
      return 2
      ;;
  esac
}
