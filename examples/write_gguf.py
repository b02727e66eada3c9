"""Writes a GGUF file with random weights, for `python -m atb_pllava bench compare --gguf FILE`.

    pip install gguf llama-cpp-python
    python examples/write_gguf.py 1b q8_0 1b-q8_0.gguf

The file holds the LLaMA decoder only, because llama.cpp does not know PLLaVA's vision tower. Speed depends on sizes and
types, not on the values.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package need not be installed

from atb_pllava.doctor.required_packages import require_packages

if __name__ == "__main__":
    require_packages()

import numpy as np

from atb_pllava.bench.shapes import shape_config
from atb_pllava.cli import Parser
from atb_pllava.config import TextConfig


def main() -> None:
    """Runs the command line, which the docstring of this file describes."""
    parser = Parser(prog="python examples/write_gguf.py", description="Write a GGUF file with random weights.")
    parser.add_argument("shape", help="1b, 7b, 13b, 34b or a config.json")
    parser.add_argument("type", choices=("q8_0", "bf16", "q4_0"), help="of the matrices; norms are float32")
    parser.add_argument("file")
    arguments = parser.parse_args()
    require_packages("gguf")
    write(arguments.file, shape_config(arguments.shape).text, arguments.type, arguments.shape)


def write(path: str, text: TextConfig, kind: str, name: str) -> None:
    """Writes the file. `kind` is the type of the matrices. Norms are float32."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"{name} {kind}, random")
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_rope_dimension_count(text.head_dim)
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    add_vocabulary(writer, text.vocab_size)
    quant = getattr(gguf.GGMLQuantizationType, kind.upper())
    generator = np.random.default_rng(0)
    for tensor, shape in tensors(text):
        if len(shape) == 1:
            writer.add_tensor(tensor, np.ones(shape, np.float32))
            continue
        values = generator.standard_normal(shape, np.float32) * shape[1] ** -0.5
        writer.add_tensor(tensor, gguf.quants.quantize(values, quant), raw_dtype=quant)
        print(f"{tensor} {shape}", file=sys.stderr)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: "gguf.GGUFWriter", words: int) -> None:  # noqa: F821 -- imported where it is needed
    """Adds a vocabulary that llama.cpp loads. Its words mean nothing."""
    writer.add_tokenizer_model("llama")
    special = {0: b"<unk>", 1: b"<s>", 2: b"</s>"}
    tokens = [special.get(i, f"word{i}".encode()) for i in range(words)]
    for i in range(256):
        tokens[3 + i] = f"<0x{i:02X}>".encode()
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * words)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (words - 259)])  # unknown, control, byte, normal
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def tensors(text: TextConfig) -> list[tuple[str, tuple[int, ...]]]:
    """llama.cpp's names of LLaMA's tensors, with shapes [out, in]."""
    width = text.hidden_size
    inner = text.intermediate_size
    q_rows = text.num_attention_heads * text.head_dim
    kv_rows = text.num_key_value_heads * text.head_dim
    layer = {
        "attn_norm": (width,),
        "ffn_norm": (width,),
        "attn_q": (q_rows, width),
        "attn_k": (kv_rows, width),
        "attn_v": (kv_rows, width),
        "attn_output": (width, q_rows),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    layers = [(f"blk.{i}.{name}.weight", shape) for i in range(text.num_hidden_layers) for name, shape in layer.items()]
    words = text.vocab_size
    whole = [("token_embd.weight", (words, width)), ("output_norm.weight", (width,)), ("output.weight", (words, width))]
    return [*whole, *layers]


if __name__ == "__main__":
    main()
