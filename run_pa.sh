#!/usr/bin/env bash
# Chat test of PLLaVA, with the positional arguments of MindIE's LLaVA scripts. See --help.
set -euo pipefail
unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
    cat <<'EOF'
usage: bash run_pa.sh --run|--performance|--precision [OPTION...] [WEIGHTS [MEDIA [VIDEO_FRAMES [MAX_BATCH_SIZE
                            [MAX_INPUT_LENGTH [MAX_OUTPUT_LENGTH]]]]]] [-- PYTHON_OPTION...]
       bash run_pa.sh --run MEDIA    asks the tiny trained model about your own file or folder

  --run          chat test: ask about every video and image in MEDIA and print the answers
  --performance  speed test of batch sizes 1 to MAX_BATCH_SIZE: a row for each in pllava_performance.csv
  --precision    precision test: write an answer about each of them to predict_result.json, {path: text}, for the judge
                 (precision/clip_score.py); goes on where it was interrupted, except in MindIE

Arguments, each optional from the right:
  WEIGHTS            checkpoint directory           (default: the tiny trained model in examples/tiny_pllava)
  MEDIA              a file, or a folder with all its subfolders; several where they are existing files or folders,
                     as a glob gives them (W videos/*.mp4)        (default: examples/videos)
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
  other options        go to `python -m atb_pllava run` (or predict, bench sweep; in MindIE: mindie run, ...), with the word
                       after them as their value: --prompt "What happens?"; see `bash run_pa.sh --run -- --help`
  -- ...               all that follows goes there

Environment:
  ATB_PLLAVA_PYTHON          the Python to use; otherwise the active one if it has the packages, otherwise .venv,
                             which is made from requirements_pllava.txt
  ASCEND_RT_VISIBLE_DEVICES  visible NPUs, used as given
  MASTER_PORT                port for communication between devices, used as given
  ATB_LLM_BENCHMARK_ENABLE   1 with --performance: also write MindIE's benchmark.csv, to ATB_LLM_BENCHMARK_FILEPATH
EOF
}

# shellcheck source=atb_pllava/cli/script_arguments.sh
. "$root/atb_pllava/cli/script_arguments.sh"

# What the commands of Python know: options without a value, options with several, endings of videos and images.
flags="--ignore_adapter_config --ignore_eos --overwrite --quiet --trust_remote_code --verbose --video_caption --w8a16 -v"
lists="--media --image_path --batch_sizes"
endings="3g2|3gp|apng|asf|avi|avif|bmp|divx|f4v|flv|gif|heic|heif|jfif|jpe|jpeg|jpg|m2t|m2ts|m4v|mkv|mov|mp4|mpe|mpeg|mpg|mts|ogg|ogm|ogv|png|qt|tif|tiff|ts|vob|webm|webp|wmv"

is_number() { [[ $1 =~ ^[0-9]+$ ]]; }

# A text such as "--what is it?" is none.
is_option() { [[ $1 =~ ^--?[A-Za-z][A-Za-z0-9_-]*(=.*)?$ ]]; }

# Whether a folder holds a model, or a part of one. A data set's own config.json names no model_type.
holds_model() {
    compgen -G "$1/*.safetensors" >/dev/null || compgen -G "$1/*.safetensors.index.json" >/dev/null ||
        compgen -G "$1/tokenizer*" >/dev/null || [ -e "$1/adapter_config.json" ] ||
        grep -qs '"model_type"' "$1/config.json"
}

# Whether a path is media: a file or URL, or a folder with media and no model in it.
is_media() {
    if [ -d "$1" ]; then
        ! holds_model "$1" && [ -n "$(find -L "$1" ! -type d 2>/dev/null | grep -Ei -m 1 "\.($endings)\$")" ]
    else
        [[ ${1,,} =~ \.($endings)$ ]] || [[ $1 = *://* && ! ${1,,} =~ ^hf://|://(www\.)?(huggingface\.co|hf\.co)/ ]]
    fi
}

# Whether the first of the positional arguments is MEDIA: such a path, and no model after it. After a folder comes
# nothing, a number or another path that is there.
begins_with_media() {
    local word
    is_media "$1" || return 1
    [ ! -d "$1" ] || [ $# -eq 1 ] || is_number "$2" || [ -e "$2" ] || return 1
    for word in "${@:2}"; do
        ! holds_model "$word" || return 1
    done
}

mode="" engine="" positional=() passed=() extra=()
while [ $# -gt 0 ]; do
    if [[ $1 = -* && $1 != -- ]] && ! { is_option "$1" && [[ $1 = --* || ! -e $1 ]]; }; then
        [ ! -e "$1" ] || refuse "'$1' is a file whose name begins with a dash: write ./$1"
        positional+=("$1")
        shift
        continue
    fi
    name=${1%%=*}
    plain=${name#--}
    [[ $name != --?* ]] || name=--${plain//-/_}
    case $name in
    -h | --help) usage; exit 0 ;;
    --) shift; extra=("$@"); break ;;
    --run | --performance | --precision)
        [ -z "$mode" ] || refuse "two modes given, --$mode and $1"
        mode=${name#--} ;;
    --engine)
        [ -z "$engine" ] || refuse "--engine is given twice"
        if [[ $1 = *=* ]]; then
            engine=${1#*=}
        elif [ $# -lt 2 ] || is_option "$2"; then
            refuse "--engine needs a value: auto, native or mindie"
        else
            engine=$2
            shift
        fi
        case $engine in auto | native | mindie) ;; *) refuse "--engine is '$engine'; it is auto, native or mindie" ;; esac ;;
    --eng*) refuse "unknown option $1; did you mean --engine?" ;;
    -*)
        # Not ours: it goes to Python, and what follows it is its value where it takes one.
        if [[ $1 = *=* || " $flags " = *" $name "* || $# -lt 2 || $2 = -- ]] || is_option "$2"; then
            passed+=("$1")
        elif [[ " $lists " = *" $name "* ]]; then
            passed+=("$1")
            while [ $# -ge 2 ] && [[ $2 != -* ]]; do passed+=("$2"); shift; done
        else
            last="" word="$1=$2"
            [ ${#passed[@]} -eq 0 ] || last=${passed[-1]}
            if is_option "$last" && [[ $last != *=* && " $flags " != *" $last "* ]]; then
                passed+=("$1") word=$2 # the option before lacks its value, and Python's error shows this word
            fi
            passed+=("$word")
            shift
        fi ;;
    *) positional+=("$1") ;;
    esac
    shift
done
given=("${passed[@]}" "${extra[@]}") engine=${engine:-auto}
[ -n "$mode" ] || refuse "no mode given${given[0]+ (${given[0]%%=*} is none)}; use --run, --performance or --precision"

# Which of the positional arguments are WEIGHTS, MEDIA (several, from a glob) and numbers.
set -- "${positional[@]}"
options=() weights="" media=()
if [ $# -gt 0 ] && ! begins_with_media "$@"; then
    [ -n "$1" ] || refuse "WEIGHTS is empty (an unset variable?)"
    weights=$1
    shift
fi
[ $# -eq 0 ] || [ -n "$1" ] || refuse "MEDIA is empty (an unset variable?)"
while [ $# -gt 0 ] && { [ ${#media[@]} -eq 0 ] || { ! is_number "$1" && [ -e "$1" ]; }; }; do
    media+=("$1")
    shift
done
[ $# -le 4 ] || refuse "surplus argument '$5'"
places=(VIDEO_FRAMES MAX_BATCH_SIZE MAX_INPUT_LENGTH MAX_OUTPUT_LENGTH)
names=(--num_frames --max_batch_size --max_input_length --max_output_length)
for word in "$@"; do
    [ -n "$word" ] || refuse "${places[0]} is empty (an unset variable?)"
    is_number "$word" || refuse "${places[0]} is '$word', which is no whole number, and no file has this name (a text with blanks needs quotes)"
    ! named "${names[0]}" "${given[@]}" || refuse "${places[0]} is $word and ${names[0]} is given too; leave one out"
    options+=("${names[0]}=$word")
    places=("${places[@]:1}") names=("${names[@]:1}")
done
[ -z "$weights" ] || ! named --model_path "${given[@]}" ||
    refuse "WEIGHTS is $weights and --model_path is given too; leave one out"
[ ${#media[@]} -eq 0 ] || ! { named --media "${given[@]}" || named --image_path "${given[@]}"; } ||
    refuse "MEDIA is ${media[0]} and --media is given too; leave one out"

# Defaults, where nothing is named. What the tiny model was trained for: coloured shapes that move.
[ "$PWD" = "$root" ] && from="" || from=$root/
if [ "$mode" = run ] && [ ${#positional[@]} -eq 0 ] && ! named --model_path "${given[@]}" &&
    ! named --media "${given[@]}" && ! named --prompt "${given[@]}"; then
    options+=(--prompt="Describe the video." --prompt="How many objects are there?" --prompt="Is there a circle?")
fi
if ! named --shape "${given[@]}"; then # random weights, which come with frames and a question
    if [ ${#media[@]} -eq 0 ] && ! named --media "${given[@]}" && ! named --image_path "${given[@]}"; then
        media=("${from}examples/videos")
    fi
    if [ -z "$weights" ] && ! named --model_path "${given[@]}"; then weights=${from}examples/tiny_pllava; fi
fi
case ${#media[@]} in
0) ;;
1) options=("--media=${media[0]}" "${options[@]}") ;;
*) options=(--media "${media[@]}" "${options[@]}") ;;
esac
if [ -n "$weights" ]; then
    options=("--model_path=$weights" "${options[@]}")
else
    weights=$(value_of --model_path "${given[@]}")
fi
if [ -z "${RANK:-}" ] && ! named --world_size "${given[@]}"; then # torchrun has decided otherwise
    IFS=, read -r -a devices <<<"${ASCEND_RT_VISIBLE_DEVICES:-0}"
    options+=("--world_size=${#devices[@]}")
fi

# shellcheck source=atb_pllava/cli/find_python.sh
. "$root/atb_pllava/cli/find_python.sh"
find_python "$root/requirements_pllava.txt"
venv=${PYTHON%/bin/python}
if [ -z "${ATB_PLLAVA_PYTHON:-}" ] && [ -e "$venv/pyvenv.cfg" ] && ! named --quiet "${given[@]}"; then
    echo "using $venv; before \`python ...\` commands type: source ${venv#"$PWD/"}/bin/activate" >&2
fi
# A thread that spins while it waits keeps a core from the thread it waits for when other programs want the cores too.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [ "$engine" = auto ]; then
    engine=native reason="no NPU here"
    if compgen -G '/dev/davinci[0-9]*' >/dev/null; then
        reason=$("$PYTHON" -m atb_pllava mindie status --model_path "$weights" | sed -n 's/^problem: //p' | head -n 1) || true
        [ -n "$reason" ] || engine=mindie reason="an NPU and the plugin are here"
    fi
    named --quiet "${given[@]}" || echo "engine: $engine ($reason)" >&2
fi
case $engine/$mode in
mindie/*) verb=(mindie "$mode") ;;
native/run) verb=(run) ;;
native/precision) verb=(predict) ;;
native/performance) verb=(bench sweep) ;;
esac
exec "$PYTHON" -m atb_pllava "${verb[@]}" "${options[@]}" "${given[@]}"
