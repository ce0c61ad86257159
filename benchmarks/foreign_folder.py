"""Write a folder with another program's own quantizer, for benchmarks/runtimes.py: run by that program's Python.

    PYTHON -I benchmarks/foreign_folder.py "llmcompressor RTN W8A8" MODEL TEXT FOLDER

Nothing of qbench is imported. Sixteen pieces of 2000 characters from the beginning of TEXT are the calibration set.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PIECES, LENGTH = 16, 2000


def by_gptqmodel(model: str, pieces: list[str], folder: str) -> None:
    """GPTQ with columns in order of their activations."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its pool asks for two wherever it runs
    from gptqmodel import GPTQModel, QuantizeConfig

    wanted = QuantizeConfig(bits=4, group_size=128, desc_act=True, sym=True)
    quantizer = GPTQModel.load(model, wanted, device="cpu")
    quantizer.quantize(pieces)
    quantizer.save(folder)


def by_llmcompressor(model: str, pieces: list[str], folder: str, kind: str) -> None:
    """GPTQ of the weights, or rounding with quantized inputs."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    kinds = {"GPTQ": (GPTQModifier, "W4A16"), "RTN": (QuantizationModifier, "W8A8")}
    modifier, scheme = kinds[kind]
    recipe = modifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
    encoded = [
        tokenizer(piece, truncation=True, max_length=512, add_special_tokens=False) for piece in pieces
    ]
    dataset = Dataset.from_list([dict(one) for one in encoded])
    oneshot(model=loaded, dataset=dataset, recipe=recipe, max_seq_length=512, num_calibration_samples=PIECES)
    loaded.save_pretrained(folder, save_compressed=True)
    tokenizer.save_pretrained(folder)


def main(writer: str, model: str, text: str, folder: str) -> None:
    """Dispatch on the writer's first word."""
    content = Path(text).read_text()
    pieces = [content[i * LENGTH : (i + 1) * LENGTH] for i in range(PIECES)]
    program, kind, *_ = writer.split()
    if program == "gptqmodel":
        by_gptqmodel(model, pieces, folder)
    else:
        by_llmcompressor(model, pieces, folder, kind)


if __name__ == "__main__":
    main(*sys.argv[1:])
