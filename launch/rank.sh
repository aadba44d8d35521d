#!/usr/bin/env bash
# One rank: rank.sh SCRIPT ARGS... becomes `python SCRIPT ARGS... --out OUT`, with --resume where OUT has a checkpoint:
# so every start of a job but the first goes on from the newest one. The process is Python's (exec), so that signals
# reach it. RESUME=never starts anew, RESUME=always fails where there is nothing to resume.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

has_checkpoint() {
    [ -f "$1/checkpoints/latest" ] || compgen -G "$1/checkpoints/step*/manifest.json" >/dev/null
}

has_metrics() { [ -s "$1/metrics.jsonl" ]; }

resume=()
case "${RESUME:-auto}" in
    always) resume=(--resume) ;;
    never) if has_metrics "$OUT" || has_metrics "$OUT/adam"; then resume=(--overwrite); fi ;;
    # A comparison (--compare adam) keeps those of its first arm in OUT/adam
    auto)
        if has_checkpoint "$OUT" || has_checkpoint "$OUT/adam"; then
            resume=(--resume)
        elif has_metrics "$OUT" || has_metrics "$OUT/adam"; then # it failed before its first checkpoint
            resume=(--overwrite)
        fi
        ;;
    *) echo "rank.sh: RESUME=$RESUME: auto, always or never" >&2; exit 2 ;;
esac
exec "$PYTHON" -u "$@" --out "$OUT" ${resume[@]+"${resume[@]}"}
