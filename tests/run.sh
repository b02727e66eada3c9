#!/usr/bin/env bash
# Style, types and tests. Arguments go to pytest: `bash tests/run.sh -k video`.
set -euo pipefail
case ${1:-} in
-h | --help)
    cat <<'END'
usage: bash tests/run.sh [PYTEST_ARGUMENT...]

Runs ruff, mypy and pytest, and without arguments then the Ascend backend's tests on the real torch_npu.
Packages that are missing are installed into .venv first (see run_pa.sh --help, ATB_PLLAVA_PYTHON).
  bash tests/run.sh -k video    only the tests with "video" in their names
END
    exit 0
    ;;
esac
unset CDPATH
case ${1:-} in
-h | --help)
    cat <<'EOF'
usage: bash tests/run.sh [PYTEST_ARGUMENT...]

Checks style (ruff) and types (mypy), runs the tests, and, without arguments, those of the Ascend backend on torch_npu.
What is missing of requirements_pllava.txt and tests/requirements.txt is installed into .venv first; ATB_PLLAVA_PYTHON
names another Python that has it. Arguments go to pytest, for example: bash tests/run.sh tests/multimodal/test_video.py -k rotation
EOF
    exit 0
    ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=atb_pllava/cli/find_python.sh
. atb_pllava/cli/find_python.sh
find_python requirements_pllava.txt tests/requirements.txt
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # see run_pa.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest "$@"
# The Ascend backend on the real torch_npu; where that cannot be had, one line says why.
[ $# -gt 0 ] || bash tests/ascend/run.sh "$PYTHON" -q
