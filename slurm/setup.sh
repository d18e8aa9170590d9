# Sourced by every job script, in the repository's root: the site's settings, and what runs Python.
# shellcheck shell=bash
set -euo pipefail

# What a program is run by on this cluster, as `CONTAINER=(apptainer exec --nv pipeline.sif)` in site.env; or nothing.
# shellcheck disable=SC2034
CONTAINER=()
SITE_ENV=${SITE_ENV:-slurm/site.env}
if [ -f "$SITE_ENV" ]; then
    set +eu  # what modules and conda run was not written for these
    # shellcheck source=slurm/site.env.example
    source "$SITE_ENV"
    set -eu
elif [ -f .venv/bin/activate ]; then
    # shellcheck source=/dev/null
    source .venv/bin/activate
fi
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" TOKENIZERS_PARALLELISM=false
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun does not take it over from sbatch any more
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}"
fi
