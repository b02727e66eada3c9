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

# shellcheck source=script.sh
. "$root/precision/videobench/script.sh"
read_arguments "$@"
[ ${#positional[@]} -eq 5 ] ||
    refuse "${#positional[@]} arguments given, not the 5 DATASET_NAME EVAL_QA_ROOT EVAL_VIDEO_ROOT WEIGHT_PATH OUTPUT_FOLDER"

IFS=, read -r -a devices <<<"${CUDA_VISIBLE_DEVICES:-0}"
options=()
named --dtype "${extra[@]}" || options+=(--dtype=float32)
named --world_size "${extra[@]}" || options+=("--world_size=${#devices[@]}")
answer_questions "${options[@]}" \
    "--dataset_name=${positional[0]}" "--Eval_QA_root=${positional[1]}" "--Eval_Video_root=${positional[2]}" \
    "--model_path=${positional[3]}" "--chat_conversation_output_folder=${positional[4]}"
