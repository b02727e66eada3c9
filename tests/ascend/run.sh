#!/usr/bin/env bash
# The Ascend backend on the real torch_npu, without an NPU: `bash tests/ascend/run.sh PYTHON [pytest arguments]`, once
# for each chip. tests/run.sh does this after the other tests. Nothing is installed into PYTHON.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
case ${1:-} in
-h | --help)
    echo "usage: bash tests/ascend/run.sh PYTHON [pytest arguments]"
    echo "Tests the Ascend backend on the real torch_npu, without an NPU. PYTHON has the packages of"
    echo "requirements_pllava.txt and tests/requirements.txt."
    exit 0 ;;
esac
python=${1:?name a Python that has the packages of requirements_pllava.txt and tests/requirements.txt}
shift
export TORCH_DEVICE_BACKEND_AUTOLOAD=0 # torch would load torch_npu by itself, before its libraries are there
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
place=$("$python" tests/ascend/environment.py) || {
    status=$?
    [ "$status" -eq 77 ] && exit 0 # it has said why
    exit "$status"
}
export PYTHONPATH=$PWD/tests/ascend:$place${PYTHONPATH:+:$PYTHONPATH}
export STAND_IN_LIBRARIES=$place/lib STAND_IN_DEVICES=2
status=0
for soc in Ascend910B4 Ascend310P3; do
    echo "the Ascend backend on a stand-in for $soc"
    STAND_IN_SOC=$soc "$python" -m pytest tests/ascend "$@" || status=$?
done
exit "$status"
