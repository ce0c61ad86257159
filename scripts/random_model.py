"""Make a LLaMA-shaped model folder with random weights, to measure time and memory where no checkpoint is at hand.

    python scripts/random_model.py FOLDER --blocks 8 [--shape 7b|70b]

Shapes are LLaMA's (7B: width 4096, MLP 11008, 32 heads; 70B: 8192, 28672, 64 heads in 8 groups); weights are normal
with the standard initial deviation, in bfloat16. The tokenizer is that of the embedded tiny-llama, so any text will do.
It is for time and memory; its perplexity means nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

TOKENIZER = Path(__file__).parent.parent / "qbench" / "assets" / "tiny-llama"
SHAPES = {"7b": (4096, 11008, 32, 32), "70b": (8192, 28672, 64, 8)}


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--seq-len", type=int, default=2048)
    arguments = parser.parse_args()
    hidden, mlp, heads, kv_heads = SHAPES[arguments.shape]
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=arguments.blocks,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=arguments.seq_len,
        dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(arguments.folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
