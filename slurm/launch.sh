# Sourced by the training jobs, on their first node: trains $RECIPE, with the job's arguments as its overrides.
# shellcheck shell=bash
source slurm/setup.sh

# When Slurm ends a job it tells all its processes. This one waits for the training, and says how it ended.
terminated=()
trap 'terminated=(--terminated)' TERM

overrides=(${DATA_URL:+"data.url=$DATA_URL"} ${RUNS:+"run=$RUNS/$SLURM_JOB_NAME"} "$@")
echo "== $(date -Is)  job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST: $RECIPE ${overrides[*]}"

code=0
srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    "${CONTAINER[@]}" python -u tools/preflight.py "$RECIPE" "${overrides[@]}" --slurm --world "$SLURM_NTASKS" || code=$?
if [ "$code" = 0 ]; then
    srun --kill-on-bad-exit=1 "${CONTAINER[@]}" python -u -m pipeline.train "$RECIPE" "${overrides[@]}" || code=$?
fi

verdict=0
"${CONTAINER[@]}" python -m pipeline.requeue "$RECIPE" "${overrides[@]}" --exit-code "$code" "${terminated[@]}" || verdict=$?
if [ "$verdict" = 75 ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$verdict"
