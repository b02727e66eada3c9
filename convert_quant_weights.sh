#!/usr/bin/env bash
# Converts a PLLaVA checkpoint: LoRA merged, and if wanted the decoder's linear layers in 8 bits. See -h.
set -euo pipefail
unset CDPATH
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
    cat <<'TEXT'
usage: bash convert_quant_weights.sh -src FLOAT_DIR -dst NEW_DIR -type TYPE [OPTION...]

  -src DIR           float checkpoint in any published layout, LoRA included or in -weight_dir
  -dst DIR           directory to make; it must be new or empty
  -type TYPE         pllava_w8a16   the decoder's linear layers in int8, all else in float
                     pllava_merged  everything in float, LoRA merged

Options:
  -weight_dir DIR    directory with LoRA tensors on top of -src
  -lora_alpha A      LoRA strength (default: what adapter_config.json beside the LoRA says, else 4, as published)
  -ignore_adapter_config
                     scale the LoRA by -lora_alpha, or 4, whatever its adapter_config.json says
  -asymmetric        zero points: finer steps where a row's weights are not spread around 0
  -group_size N      64 or 128 columns share a scale (default: 0, a whole row, which is what MindIE takes)
  -quantizer NAME    builtin (default), or msmodelslim if it is installed: the same files, one layer in memory at a time
  -calib DIR         videos on which the rounding is tuned (AWQ): a few typical clips; needs the vision tower, the
                     embedding and one decoder layer in memory in float32, and minutes
  -h, --help         this text

The result is complete: weights in shards of at most 4 GiB, tokenizer, preprocessor, config.json and, for W8A16,
msModelSlim's quant_model_description.json. It is written to DST.partial and renamed when it is whole; run the same
command again to go on with a conversion that was interrupted. Memory: a few hundred MB, whatever the model's size,
where neither -calib nor -quantizer msmodelslim is given.

Environment:
  ATB_PLLAVA_PYTHON  the Python to use; otherwise the active one if it has the packages, otherwise .venv, which is made
                     from requirements_pllava.txt
TEXT
}

for argument in "$@"; do
    case $argument in
    -h | --help) usage; exit 0 ;;
    esac
done
if [ $# -eq 0 ]; then
    echo "error: nothing given; -src, -dst and -type are needed; see \`bash $0 --help\`" >&2
    exit 2
fi

# shellcheck source=atb_pllava/cli/find_python.sh
. "$root/atb_pllava/cli/find_python.sh"
find_python "$root/requirements_pllava.txt"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # see run_pa.sh
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m atb_pllava convert "$@"
