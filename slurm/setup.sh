# Sourced by every job script in the repository's root. Applies the site's settings and chooses what runs Python.
# shellcheck shell=bash
set -euo pipefail

# A job submitted from inside another job inherits that job's variables of Slurm's step, of MPI and of the launcher.
# Programs would read them and wait for ranks that do not exist.
unset "${!SLURM_STEP@}" "${!SLURM_PTY@}" "${!SLURM_SRUN@}" "${!SLURM_CPU_BIND@}" \
    SLURM_LAUNCH_NODE_IPADDR SLURM_GTIDS SLURM_PROCID SLURM_LOCALID SLURM_NODEID \
    "${!PMI_@}" "${!PMIX_RANK@}" "${!PMIX_NAMESPACE@}" "${!PMIX_SERVER@}" "${!OMPI_COMM_WORLD@}" \
    "${!TORCHELASTIC_@}" RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME WORLD_SIZE LOCAL_WORLD_SIZE \
    GROUP_WORLD_SIZE ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT
# srun would also request the outer job's resources. Without these variables a step gets all resources of this job.
unset SLURM_GPUS SLURM_GPUS_PER_TASK SLURM_GPUS_PER_SOCKET SLURM_GPU_BIND SLURM_CPUS_PER_GPU SLURM_NTASKS_PER_GPU \
    SLURM_GRES SLURM_HINT SLURM_DISTRIBUTION "${!SLURM_MEM_BIND@}" "${!SLURM_MEM_PER_@}"
# Slurm sets SLURM_RESTART_COUNT only from a job's second start on.
if [ -n "${SLURM_JOB_ID:-}" ] && restarts=$(scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null) &&
    [[ "$restarts" =~ \ Restarts=([0-9]+) ]]; then
    export SLURM_RESTART_COUNT="${BASH_REMATCH[1]}"
fi
if [ "${OMP_NUM_THREADS:-1}" = "${SRUN_CPUS_PER_TASK:-}" ]; then
    unset OMP_NUM_THREADS # this script set it in the outer job
fi

# The command that runs programs on this cluster, for example CONTAINER=(apptainer exec --nv pipeline.sif); may be empty.
# shellcheck disable=SC2034
CONTAINER=()
SITE_ENV=${SITE_ENV:-slurm/site.env}
if [ -f "$SITE_ENV" ]; then
    set +eu  # modules and conda fail under these options
    # shellcheck source=slurm/site.env.example
    source "$SITE_ENV"
    set -eu
elif [ -f .venv/bin/activate ]; then
    # shellcheck source=/dev/null
    source .venv/bin/activate
fi
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM=false
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # newer versions of srun do not inherit it from sbatch
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}"
fi
