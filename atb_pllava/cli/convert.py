"""`python -m atb_pllava convert`: merge LoRA, quantise to W8A16."""

import argparse

from atb_pllava.convert.converter import convert_checkpoint
from atb_pllava.convert.options import QUANTIZERS, ConvertOptions
from atb_pllava.convert.options import TYPES as CONVERT_TYPES
from atb_pllava.mindie.host_files import host_files
from atb_pllava.multimodal.media import list_media
from atb_pllava.ops.int8 import GROUP_SIZES


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `convert`."""
    parser.allow_abbrev = False
    parser.set_defaults(verbose=True)  # what was found in -src decides what is made of it
    # One dash, as convert_quant_weights.sh of MindIE's models has them.
    parser.add_argument("-src", required=True, metavar="DIR", help="float checkpoint, any published layout")
    parser.add_argument("-dst", required=True, metavar="DIR", help="directory to make; it must be new or empty")
    parser.add_argument(
        "-type",
        required=True,
        choices=CONVERT_TYPES,
        help="pllava_w8a16: the decoder's linear layers in int8; pllava_merged: all in float; LoRA merged in both",
    )
    parser.add_argument("-weight_dir", "--weight_dir", metavar="DIR", help="directory with LoRA tensors on top of -src")
    parser.add_argument(
        "-lora_alpha",
        "--lora_alpha",
        type=float,
        metavar="A",
        help="LoRA strength, scale = A / rank (default: what adapter_config.json beside the LoRA says, else 4)",
    )
    parser.add_argument(
        "-ignore_adapter_config",
        "--ignore_adapter_config",
        action="store_true",
        help="scale the LoRA by -lora_alpha / rank, or 4 / rank, whatever its adapter_config.json says",
    )
    parser.add_argument(
        "-asymmetric", action="store_true", help="store zero points, for weights that are not centred on 0"
    )
    parser.add_argument(
        "-group_size",
        type=int,
        choices=GROUP_SIZES,
        default=0,
        help="columns that share a scale (default 0: a whole row, which is what MindIE's models take)",
    )
    parser.add_argument(
        "-quantizer", choices=QUANTIZERS, default="builtin", help="builtin (default), or the installed msmodelslim"
    )
    parser.add_argument(
        "-calib", metavar="DIR", help="videos for AWQ, which scales weights before rounding (default: no AWQ)"
    )


def convert(arguments: argparse.Namespace) -> int:
    """Write a converted copy of a checkpoint."""
    options = ConvertOptions(
        arguments.type,
        arguments.lora_alpha,
        ignore_adapter_config=arguments.ignore_adapter_config,
        symmetric=not arguments.asymmetric,
        group_size=arguments.group_size,
        quantizer=arguments.quantizer,
    )
    clips = list_media(arguments.calib) if arguments.calib else []
    convert_checkpoint(arguments.src, arguments.dst, options, arguments.weight_dir, clips, host_files=host_files)
    return 0
