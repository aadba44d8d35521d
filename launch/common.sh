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

# own_folder VARIABLE: makes the folder that it names. Compiled kernels lie in it and run as this user: ends the script
# where another user than root owns it or could write to it, or where it is a link, which others may turn elsewhere.
own_folder() {
    local folder="${!1}"
    mkdir -p -m 700 "$folder" || exit 2
    if [ -n "$(find "$folder" -maxdepth 0 \( -perm /022 -o ! -uid "$(id -u)" ! -uid 0 \))" ]; then
        echo "$0: $1: $folder is not this user's alone (its owner, its mode, or a link), and its kernels would run as" \
            "this user: remove it, or chmod go-w, or name another folder by $1" >&2
        exit 2
    fi
}
for variable in CACHE_LOCAL TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR TORCH_EXTENSIONS_DIR; do
    own_folder "$variable"
done
unset variable

# HEALTH: arguments of mols_ds.apps.launch.health, in the place of the default, or "off".
check_health() {
    if [ "${HEALTH:-}" != off ]; then
        # shellcheck disable=SC2086  # several arguments
        "$PYTHON" -m mols_ds.health ${HEALTH:-}
    fi
}
