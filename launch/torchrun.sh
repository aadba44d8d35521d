#!/usr/bin/env bash
# torchrun with c10d rendezvous: run it on every node, with the same settings.
#
#     NNODES=2 RDZV_ENDPOINT=node01:29400 OUT=runs/7b launch/torchrun.sh train.py --deepspeed_config configs/ds_7b_zero3.json ...
#     NNODES=2 RDZV_ENDPOINT=node01:29400 OUT=runs/70b launch/torchrun.sh train_megatron.py --config configs/megatron/...yaml
#
# The script's own --out and --resume are added (launch/rank.sh). Ranks that fail are started again, on all nodes, from
# the newest checkpoint. SIGTERM and SIGUSR1 to this process let all ranks of all nodes save and end with status 0.
#
#   NNODES         nodes, or MIN:MAX. With a range, nodes may come and go; the batch and the checkpoint must allow it
#                  (docs/launching.md), so N alone waits for N nodes again  (1)
#   NPROC          ranks on this node: a number, or gpu, cpu, auto  (auto)
#   RDZV_ENDPOINT  host:port of the rendezvous; the first node, which must be reached by all  (127.0.0.1:29400)
#   RDZV_ID        the same for all nodes, another one for every job  (mols)
#   MAX_RESTARTS   how often ranks are started again after a failure; nodes that come and go do not count  (3)
#   JOIN_TIMEOUT   seconds to wait for the other nodes, also for one that comes back  (900)
#   LOCAL_ADDR     address of this node, where its host name gives another one than that of the fast network
#   GRACE          seconds that ranks have to save after a signal  (600)
#   UNFINISHED     exit status of a run that a signal ended before its last step: 0 for a scheduler that should see no
#                  failure, others for one that should start it again  (0)
#   HEALTH         arguments of python -m mols_ds.health, which is run first, or off
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -gt 0 ] || { echo "torchrun.sh: no script; see the head of this file" >&2; exit 2; }
check_health

exec "$PYTHON" -m mols_ds.signals run --grace "${GRACE:-600}" --out "$OUT" --unfinished "${UNFINISHED:-0}" -- \
    "$PYTHON" -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --nproc-per-node "${NPROC:-auto}" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "${RDZV_ENDPOINT:-127.0.0.1:29400}" --rdzv-id "${RDZV_ID:-mols}" \
    --rdzv-conf "join_timeout=${JOIN_TIMEOUT:-900}" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
    --no-python "$ROOT/launch/rank.sh" "$@"
