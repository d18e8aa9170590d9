# Sourced by the training jobs on their first node. Trains $RECIPE with the job's arguments as overrides.
# shellcheck shell=bash
: "${SLURM_JOB_ID:?submit it: sbatch $0}" "${SLURM_NTASKS:?give the allocation a number of tasks: salloc --ntasks=N}"
source slurm/setup.sh

overrides=(${DATA_URL:+"data.url=$DATA_URL"} ${RUNS:+"run=$RUNS/$SLURM_JOB_NAME"} "$@")
echo "== $(date -Is)  job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST: $RECIPE ${overrides[*]}"

# Slurm signals all processes of a job that it ends. It does not requeue a job that reached its time limit: we do.
terminated=()
interrupted=
# shellcheck disable=SC2317
on_term() {
    terminated=(--terminated)
    interrupted=yes
    local reason
    for _ in 1 2 3; do # Slurm may signal again, which ends squeue or scontrol
        reason=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%r) || continue
        [ "$reason" != TimeLimit ] || scontrol requeue "$SLURM_JOB_ID" || continue
        break
    done
}
trap on_term TERM

# Run a step of the job; $code is its exit status. The step runs in the background, because bash delays a trap until the
# foreground command ends. The signal before the time limit may come before a program handles it; it must not end it.
step() {
    srun --kill-on-bad-exit=1 "$@" &
    local pid=$!
    while :; do
        interrupted=
        code=0
        wait "$pid" || code=$?
        [ -n "$interrupted" ] || break
    done
    if [ "$code" != 0 ]; then
        sleep 2 & # the signal that ended the step may reach this shell a moment later
        wait "$!" || true
    fi
}
# shellcheck disable=SC2016
python=(bash -c 'trap "" USR1; exec "$@"' bash "${CONTAINER[@]}" python -u)

step --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --gpu-bind=none \
    "${python[@]}" tools/preflight.py "$RECIPE" "${overrides[@]}" --slurm --world "$SLURM_NTASKS"
if [ "$code" = 0 ] && [ ${#terminated[@]} = 0 ]; then
    step "${python[@]}" -m pipeline.train "$RECIPE" "${overrides[@]}"
fi

verdict=0
"${CONTAINER[@]}" python -m pipeline.jobs.requeue "$RECIPE" "${overrides[@]}" --exit-code "$code" "${terminated[@]}" || verdict=$?
if [ "$verdict" = 75 ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$verdict"
