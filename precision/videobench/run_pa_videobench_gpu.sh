#!/usr/bin/env bash
# The other side of the comparison: the same questions on the plain float32 path of a GPU or CPU. See --help.
set -euo pipefail
unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

usage() {
    cat <<'EOF'
usage: bash run_pa_videobench_gpu.sh DATASET_NAME EVAL_QA_ROOT EVAL_VIDEO_ROOT WEIGHT_PATH OUTPUT_FOLDER
                                     [-- PYTHON_OPTION...]

  DATASET_NAME     sampling_data, or one of Video-Bench's sets
  EVAL_QA_ROOT     the folder that holds Eval_QA, such as egs/Video-Bench
  EVAL_VIDEO_ROOT  the folder that holds Eval_video, such as egs/VideoBench
  WEIGHT_PATH      checkpoint directory, in float
  OUTPUT_FOLDER    where <set>_eval.json goes; not the folder of the other side
  -- ...           all that follows goes to answer_questions.py

Runs in float32 on the GPUs of CUDA_VISIBLE_DEVICES (default: one), or on the CPU where there is no GPU.
The same command goes on where a killed run stood.

Environment:
  ATB_PLLAVA_PYTHON     the Python to use, see run_pa.sh
  CUDA_VISIBLE_DEVICES  visible GPUs, used as given: the model is split over all of them
  MASTER_PORT           port for communication between devices, used as given
EOF
}

refuse() {
    echo "error: $1" >&2
    usage >&2
    exit 2
}

positional=() extra=()
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage; exit 0 ;;
    --) shift; extra=("$@"); break ;;
    -*) refuse "unknown option $1; options of answer_questions.py follow after --" ;;
    *) positional+=("$1") ;;
    esac
    shift
done
[ ${#positional[@]} -eq 5 ] ||
    refuse "${#positional[@]} arguments given, not the 5 DATASET_NAME EVAL_QA_ROOT EVAL_VIDEO_ROOT WEIGHT_PATH OUTPUT_FOLDER"

# shellcheck source=../../atb_pllava/find_python.sh
. "$root/atb_pllava/find_python.sh"
find_python "$root/requirements_pllava.txt"
# A thread that spins while it waits keeps a core from the thread it waits for when other programs want the cores too.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
IFS=, read -r -a devices <<<"${CUDA_VISIBLE_DEVICES:-0}"
exec "$PYTHON" "$root/precision/videobench/answer_questions.py" --dtype=float32 "--world_size=${#devices[@]}" \
    "--dataset_name=${positional[0]}" "--Eval_QA_root=${positional[1]}" "--Eval_Video_root=${positional[2]}" \
    "--model_path=${positional[3]}" "--chat_conversation_output_folder=${positional[4]}" "${extra[@]}"
