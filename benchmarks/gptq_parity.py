"""`gptq` beside GPTQModel: the same model, windows, grid and options, scored by the same evaluator.

    python -m venv PEER && PEER/bin/pip install torch==2.13.0 transformers==5.23.0 gptqmodel==7.6.0
    python benchmarks/gptq_parity.py --peer PEER/bin/python --model MODEL --calib TRAIN.txt --eval TEST.txt

GPTQModel pins other versions than qbench, so it runs as a process of its own, which is given the token windows and
leaves a checkpoint; its integers are unpacked here and both models' perplexity is measured by qbench. Both use
asymmetric grids (the symmetric ones differ by design: its scale is 2·max/(2ᵇ − 1)), a damping of 0.01, and calibrate
the linears of a block one behind the other (`true_sequential`); with `--act-order` both use static groups. GPTQModel on
a CPU needs GPTQMODEL_CPU_WORKERS=2, which is set here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def peer(folder: Path) -> None:
    """Inside the other environment: quantize what `request.json` asks for and save it beside it."""
    from gptqmodel import GPTQModel, QuantizeConfig

    request = json.loads((folder / "request.json").read_text())
    config = QuantizeConfig(
        bits=request["bits"], group_size=request["group_size"], desc_act=request["act_order"], sym=False,
        damp_percent=0.01, act_group_aware=False, format="gptq_v2", **request["more"],
    )  # fmt: skip
    model = GPTQModel.load(request["model"], config, device="cpu", dtype=torch.float32)
    windows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in request["windows"]]
    model.quantize(windows, batch_size=1)
    model.save(str(folder / "checkpoint"))


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes of a dense little-endian bit stream per row: int32 [rows, n·bits/32] → [rows, n]."""
    shifts = torch.arange(32, dtype=torch.int64)
    stream = (words.to(torch.int64).unsqueeze(-1) >> shifts) & 1
    return (stream.reshape(len(words), -1, bits) << shifts[:bits]).sum(-1)


def dequantized(folder: Path, bits: int) -> dict[str, Tensor]:
    """Weights [out, in] of a GPTQ v2 checkpoint by the name of their linear."""
    from safetensors.torch import load_file

    flat: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        flat |= load_file(file)
    weights = {}
    for name in (key.removesuffix(".qweight") for key in flat if key.endswith(".qweight")):
        codes = unpack(flat[f"{name}.qweight"].T, bits)  # [out, in]
        zero = unpack(flat[f"{name}.qzeros"], bits)  # [groups, out]
        group = flat[f"{name}.g_idx"].long()
        scale = flat[f"{name}.scales"].float()
        weights[name] = (codes - zero[group].T) * scale[group].T
    return weights


def ours(loaded: Any, ids: Tensor, a: argparse.Namespace, method: str) -> Any:
    """qbench's lane."""
    from qbench.engine.lane import Lane
    from qbench.engine.reconstruct import reconstruct
    from qbench.engine.settings import EngineSettings
    from qbench.methods import METHODS
    from qbench.scheme import Scheme

    options = {"act_order": a.act_order, "true_sequential": True} if method == "gptq" else {}
    scheme = Scheme.parse(a.scheme)
    planner = METHODS.load(method)(**options).resolve(scheme, loaded.spec)
    settings = EngineSettings(device=torch.device("cpu"))
    lane = Lane(method, planner, scheme)
    (result,) = reconstruct(loaded.model, list(loaded.blocks), loaded.spec, [lane], ids, settings)
    if result.error is not None:
        raise result.error
    return result


def main() -> None:
    """Quantize by both and by rounding to nearest, and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", required=True, help="python of the environment that has gptqmodel")
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--scheme", default="W4A16g128")
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--keep", help="existing folder for GPTQModel's checkpoint; default: a temporary one")
    a = parser.parse_args()

    from qbench.data.text import load_text
    from qbench.data.windows import draw_calibration, evaluation_windows
    from qbench.engine import attention
    from qbench.engine.install import quantized
    from qbench.engine.settings import EngineSettings
    from qbench.evals.perplexity import perplexity
    from qbench.models.loading import load_model
    from qbench.scheme import Scheme

    loaded = load_model(a.model, dtype="float32")
    loaded.model.set_attn_implementation(attention.register())
    calibration = draw_calibration(
        load_text(a.calib, "calibration"), loaded.tokenizer, a.samples, a.seqlen, a.seed
    )
    ids = calibration.ids
    evaluation = evaluation_windows(load_text(a.eval, "evaluation"), loaded.tokenizer, a.seqlen, a.limit).ids
    scheme, seconds, found = Scheme.parse(a.scheme), {}, {}

    def score() -> float:
        return perplexity(loaded.model, evaluation, batch_size=4, device="cpu").value

    found["full precision"] = score()
    for method in ("rtn", "gptq"):
        started = time.perf_counter()
        result = ours(loaded, ids, a, method)
        seconds[method] = time.perf_counter() - started
        with quantized(
            loaded.model, loaded.blocks, loaded.spec, result, EngineSettings(device=torch.device("cpu"))
        ):
            found[method] = score()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(a.keep or name).resolve()
        request = {
            "model": str(Path(a.model).resolve()), "bits": scheme.wbits, "group_size": scheme.group_size or -1,
            "act_order": a.act_order, "more": {"static_groups": True} if a.act_order else {},
            "windows": ids.tolist(),
        }  # fmt: skip
        (folder / "request.json").write_text(json.dumps(request))
        started = time.perf_counter()
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        subprocess.run(
            [a.peer, str(Path(__file__).resolve()), "--as-peer", str(folder)],
            check=True,
            env=environment | {"GPTQMODEL_CPU_WORKERS": "2", "CUDA_VISIBLE_DEVICES": ""},
            cwd=folder,
        )
        seconds["gptqmodel"] = time.perf_counter() - started
        weights = dequantized(folder / "checkpoint", scheme.wbits)
    assert len(weights) == len(loaded.spec.linears) * len(loaded.blocks), (
        "linears are missing in the checkpoint"
    )
    for linear, weight in weights.items():
        loaded.model.get_submodule(linear).weight.data.copy_(weight)
    found["gptqmodel"] = score()

    block = loaded.architecture.blocks
    for role, path in loaded.spec.linears.items():  # of block 0, where both see the same inputs
        mine = result.state(0).linears[role]
        step = mine.grid.split(torch.ones_like(mine.codes)) * mine.scale.float().unsqueeze(-1)
        apart = (mine.dequantize() - weights[f"{block}.0.{path}"]).abs() >= step.reshape(mine.codes.shape) / 2
        print(f"block 0 {role:8} {1 - float(apart.float().mean()):10.4f} of the codes equal")
    for method, value in found.items():
        took = f"  {seconds[method]:.0f}s" if method in seconds else ""
        print(f"{method:16} {value:10.4f}{took}")
    ratio = found["gptq"] / found["gptqmodel"]
    print(f"{'ratio':16} {ratio:10.4f}")
    print(json.dumps({"arguments": vars(a), "perplexity": found, "ratio": ratio}))


if __name__ == "__main__":
    if "--as-peer" in sys.argv:
        peer(Path(sys.argv[-1]))
    else:
        main()
