# What the launch scripts share; sourced, not run. Sets ROOT, PYTHON and OUT and exports the settings of *.env.
ROOT="${MOLS_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
cd "$ROOT" || exit 2
if [ -z "${PYTHON:-}" ]; then
    PYTHON="$ROOT/.venv/bin/python"
    [ -x "$PYTHON" ] || PYTHON="$(command -v python3)"
fi
# The run's --out, which all nodes see.
OUT="${OUT:-runs/train}"
export ROOT PYTHON OUT

set -a
. "$ROOT/launch/nccl.env"
. "$ROOT/launch/caches.env"
set +a
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR" "$TORCH_EXTENSIONS_DIR"

# HEALTH: arguments of mols_ds.apps.launch.health, in the place of the default, or "off".
check_health() {
    if [ "${HEALTH:-}" != off ]; then
        # shellcheck disable=SC2086  # several arguments
        "$PYTHON" -m mols_ds.health ${HEALTH:-}
    fi
}
