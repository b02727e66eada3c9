#!/usr/bin/env bash
# Answers a set of Video-Bench, with the positional arguments of MindIE's script. See --help.
set -euo pipefail
unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

usage() {
    cat <<'EOF'
usage: bash run_pa_videobench.sh WEIGHT_PATH VIDEO_PATH EVAL_QA_ROOT OUTPUT_FOLDER
                                 [MAX_BATCH_SIZE [MAX_INPUT_LENGTH [MAX_OUTPUT_LENGTH]]] [-- PYTHON_OPTION...]

  WEIGHT_PATH        checkpoint directory
  VIDEO_PATH         the folder of one set, such as egs/VideoBench/Eval_video/sampling_data; its name is the set's
  EVAL_QA_ROOT       the folder that holds Eval_QA, such as egs/Video-Bench
  OUTPUT_FOLDER      where <set>_eval.json goes
  MAX_BATCH_SIZE     requests answered at a time    (default: 8)
  MAX_INPUT_LENGTH   longest prompt in tokens, video tokens included (default: what the KV cache holds)
  MAX_OUTPUT_LENGTH  most tokens of an answer       (default: 200)
  -- ...             all that follows goes to answer_questions.py, such as `--dtype float32 --prompt_format videobench`

The same command goes on where a killed run stood.

Environment:
  ATB_PLLAVA_PYTHON          the Python to use, see run_pa.sh
  ASCEND_RT_VISIBLE_DEVICES  visible NPUs, used as given: the model is split over all of them
  MASTER_PORT                port for communication between devices, used as given
EOF
}

# shellcheck source=script.sh
. "$root/precision/videobench/script.sh"
read_arguments "$@"
[ ${#positional[@]} -ge 4 ] || refuse "${#positional[@]} of the arguments WEIGHT_PATH VIDEO_PATH EVAL_QA_ROOT OUTPUT_FOLDER given"
[ ${#positional[@]} -le 7 ] || refuse "surplus argument '${positional[7]}'"
video_path=${positional[1]%/}
[ -d "$video_path" ] || refuse "VIDEO_PATH $video_path is no folder"
video_path=$(cd "$video_path" && pwd)

options=(
    "--model_path=${positional[0]}" "--dataset_name=${video_path##*/}"
    "--Eval_Video_root=$(dirname "$(dirname "$video_path")")" "--Eval_QA_root=${positional[2]}"
    "--chat_conversation_output_folder=${positional[3]}"
)
names=(--max_batch_size --max_input_length --max_output_length)
for i in "${!positional[@]}"; do [ "$i" -lt 4 ] || options+=("${names[i - 4]}=${positional[i]}"); done
if [ -z "${RANK:-}" ] && ! named --world_size "${extra[@]}"; then # torchrun has decided otherwise
    IFS=, read -r -a devices <<<"${ASCEND_RT_VISIBLE_DEVICES:-0}"
    options+=("--world_size=${#devices[@]}")
fi
answer_questions "${options[@]}"
