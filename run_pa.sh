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
  CUDA_VISIBLE_DEVICES       visible GPUs, used as given: --world_size N takes the first N of them
  MASTER_PORT                port for communication between devices, used as given
  ATB_LLM_BENCHMARK_ENABLE   1 with --performance: also write MindIE's benchmark.csv, to ATB_LLM_BENCHMARK_FILEPATH
EOF
}

for argument in "$@"; do
    case $argument in
    -h | --help) usage; exit 0 ;;
    --) break ;;
    esac
done
case " $* " in
*" --run "* | *" --performance "* | *" --precision "*) ;;
*)
    echo "error: no mode given${1:+ ($1 is none)}; use --run, --performance or --precision; see \`bash $0 --help\`" >&2
    exit 2
    ;;
esac

# shellcheck source=atb_pllava/cli/find_python.sh
. "$root/atb_pllava/cli/find_python.sh"
find_python "$root/requirements_pllava.txt"
venv=${PYTHON%/bin/python}
if [ -z "${ATB_PLLAVA_PYTHON:-}" ] && [ -e "$venv/pyvenv.cfg" ] && [[ " $* " != *" --quiet "* ]]; then
    echo "using $venv; before \`python ...\` commands type: source ${venv#"$PWD/"}/bin/activate" >&2
fi
# A thread that spins while it waits keeps a core from the thread it waits for when other programs want the cores too.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m atb_pllava.cli.run_pa "$0" "$@"
