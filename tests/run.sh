#!/usr/bin/env bash
# Style, types, tests, packages, and the Ascend backend on the real torch_npu; see --help.
set -euo pipefail
unset CDPATH
case ${1:-} in
-h | --help)
    cat <<'EOF'
usage: bash tests/run.sh [PYTEST_ARGUMENT...]

Runs five stages, and stops at the first that fails:
  style      ruff
  types      mypy
  tests      pytest; arguments go to it and make this the last stage
  packages   wheel and source distribution: built, installed into an empty environment, used
  ascend     the Ascend backend on the real torch_npu, without an NPU
A package that is missing is installed into .venv first. ATB_PLLAVA_PYTHON names another Python that has them all.
Packages and ascend use environments of their own, and no stage runs longer than its limit.
Example: bash tests/run.sh tests/multimodal/test_video.py -k rotation
EOF
    exit 0
    ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=atb_pllava/cli/find_python.sh
. atb_pllava/cli/find_python.sh
find_python requirements_pllava.txt tests/requirements.txt
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # see run_pa.sh

# stage NAME SECONDS COMMAND...: says what begins, and ends a command that hangs.
stage() {
    local name=$1 seconds=$2 status=0
    shift 2
    echo "== $name" >&2
    if command -v timeout >/dev/null; then
        timeout --foreground "$seconds" "$@" || status=$?
    else
        "$@" || status=$?
    fi
    [ "$status" -ne 124 ] || echo "error: the stage $name was ended after $seconds s" >&2
    return "$status"
}

stage style 120 "$PYTHON" -m ruff check .
stage types 600 "$PYTHON" -m mypy
if [ $# -gt 0 ]; then
    stage tests 1500 "$PYTHON" -m pytest "$@"
    exit 0
fi
# Several processes, each of which takes whole files.
processes=$(nproc)
stage tests 1800 "$PYTHON" -m pytest -n "$((processes < 4 ? processes : 4))" --dist loadfile
stage packages 600 "$PYTHON" tests/check_packages.py
# Where torch_npu cannot be had, one line says why.
stage ascend 600 bash tests/ascend/run.sh "$PYTHON" -q
