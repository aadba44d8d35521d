# Sourced by the sbatch files: one step of the job, signals to its tasks, and the next try.

# run_step COMMAND...: runs srun in the background, so that the batch shell hears its signals at once, and passes SIGUSR1
# on: srun hands it to all tasks. Then, where the tasks ended well but not at the last step, has the job queued again.
run_step() {
    local status=0 step told
    "$@" &
    step=$!
    trap 'told=1; echo "$0: the tasks are told to save and end" >&2; kill -USR1 "$step" 2>/dev/null || true' USR1 TERM
    # A signal ends `wait` early, with a status of its own: wait again
    while
        told=''
        status=0
        wait "$step" || status=$?
        [ -n "$told" ]
    do :; done
    trap - USR1 TERM
    if [ "$status" -eq 0 ] && ! "$PYTHON" -m mols_ds.signals finished "$OUT"; then
        if [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_REQUEUES:-50}" ]; then
            echo "$0: $OUT is not at its last step: queued again" >&2
            scontrol requeue "$SLURM_JOB_ID"
        else
            echo "$0: $OUT is not at its last step after $SLURM_RESTART_COUNT restarts: not queued again" >&2
            status=1
        fi
    fi
    return "$status"
}
