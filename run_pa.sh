#!/usr/bin/env bash
# Chat test of PLLaVA, with the positional arguments of MindIE's LLaVA scripts. See --help.
set -euo pipefail
unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
    cat <<'EOF'
usage: bash run_pa.sh --run|--performance|--precision [OPTION...] [WEIGHTS [MEDIA [VIDEO_FRAMES [MAX_BATCH_SIZE
                            [MAX_INPUT_LENGTH [MAX_OUTPUT_LENGTH]]]]]] [-- PYTHON_OPTION...]

  --run          chat test: ask about every video and image in MEDIA and print the answers
  --performance  speed test of batch sizes 1 to MAX_BATCH_SIZE: a row for each in pllava_performance.csv
  --precision    precision test: write an answer about each of them to predict_result.json, {path: text}, for the judge
                 (precision/clip_score.py); goes on where it was interrupted, except in MindIE

Arguments, each optional from the right:
  WEIGHTS            checkpoint directory           (default: the tiny trained model in examples/tiny_pllava)
  MEDIA              a directory or one file        (default: examples/videos)
  VIDEO_FRAMES       frames taken from each video   (default: the checkpoint's, 16 for PLLaVA)
  MAX_BATCH_SIZE     requests answered at a time    (default: 8; --performance: 10)
  MAX_INPUT_LENGTH   longest prompt in tokens, video tokens included (default: what the KV cache holds)
  MAX_OUTPUT_LENGTH  most tokens of an answer       (default: 200; --performance: 256)

Options:
  --trust_remote_code  accepted as MindIE's scripts do; no code from a checkpoint is ever executed
  --engine NAME        mindie: MindIE's runner, with converted weights and the plugin (python -m atb_pllava mindie install);
                       native: this package alone; auto (default): mindie where all it needs is there, otherwise native
  --world_size N       devices to use (default: as many as ASCEND_RT_VISIBLE_DEVICES names, or 1)
  -h, --help           this text
  -- ...               all that follows goes to `python -m atb_pllava run` (or predict, bench; in MindIE: mindie run, ...); see
                       `bash run_pa.sh --run -- --help`

Environment:
  ATB_PLLAVA_PYTHON          the Python to use; otherwise the active one if it has the packages, otherwise .venv,
                             which is made from requirements_pllava.txt
  ASCEND_RT_VISIBLE_DEVICES  visible NPUs, used as given
  MASTER_PORT                port for communication between devices, used as given
  ATB_LLM_BENCHMARK_ENABLE   1 with --performance: also write MindIE's benchmark.csv, to ATB_LLM_BENCHMARK_FILEPATH
EOF
}

refuse() {
    echo "error: $1" >&2
    usage >&2
    exit 2
}

mode="" engine=auto world_size="" positional=() options=() extra=()
while [ $# -gt 0 ]; do
    case $1 in
    --run | --performance | --precision) mode=${1#--} ;;
    --engine) [ $# -ge 2 ] || refuse "--engine needs a name"; engine=$2; shift ;;
    --engine=*) engine=${1#*=} ;;
    --trust_remote_code) options+=(--trust_remote_code) ;;
    --world_size) [ $# -ge 2 ] || refuse "--world_size needs a number"; world_size=$2; shift ;;
    --world_size=*) world_size=${1#*=} ;;
    -h | --help) usage; exit 0 ;;
    --) shift; extra=("$@"); break ;;
    -*) refuse "unknown option $1" ;;
    *) positional+=("$1") ;;
    esac
    shift
done
[ -n "$mode" ] || refuse "no mode given; use --run, --performance or --precision"
case $engine in auto | native | mindie) ;; *) refuse "--engine is '$engine'; it is auto, native or mindie" ;; esac
[ ${#positional[@]} -le 6 ] || refuse "surplus argument '${positional[6]}'"

if [ -z "$world_size" ] && [ -z "${RANK:-}" ]; then # torchrun has decided otherwise
    IFS=, read -r -a devices <<<"${ASCEND_RT_VISIBLE_DEVICES:-0}"
    world_size=${#devices[@]}
fi
names=(--model_path --media --num_frames --max_batch_size --max_input_length --max_output_length)
[ "$PWD" = "$root" ] && from="" || from=$root/
values=("${from}examples/tiny_pllava" "${from}examples/videos")
for i in "${!positional[@]}"; do values[i]=${positional[i]}; done
for i in "${!values[@]}"; do options+=("${names[i]}=${values[i]}"); done
[ -z "$world_size" ] || options+=("--world_size=$world_size")
if [ "$mode" = run ] && [ ${#positional[@]} -eq 0 ] && [ ${#extra[@]} -eq 0 ]; then
    # What the tiny model was trained for: coloured shapes that move.
    extra=(--prompt "Describe the video." --prompt "How many objects are there?" --prompt "Is there a circle?")
fi

# shellcheck source=atb_pllava/find_python.sh
. "$root/atb_pllava/find_python.sh"
find_python "$root/requirements_pllava.txt"
# A thread that spins while it waits keeps a core from the thread it waits for when other programs want the cores too.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [ "$engine" = auto ]; then
    engine=native reason="no NPU here"
    if compgen -G '/dev/davinci[0-9]*' >/dev/null; then
        reason=$("$PYTHON" -m atb_pllava mindie status --model_path "${values[0]}" | sed -n 's/^problem: //p' | head -n 1) || true
        [ -n "$reason" ] || engine=mindie reason="an NPU and the plugin are here"
    fi
    echo "engine: $engine ($reason)" >&2
fi
case $engine/$mode in
mindie/*) verb=(mindie "$mode") ;;
native/run) verb=(run) ;;
native/precision) verb=(predict) ;;
native/performance) verb=(bench sweep) ;;
esac
exec "$PYTHON" -m atb_pllava "${verb[@]}" "${options[@]}" "${extra[@]}"
