"""`signround` beside the installed auto-round: the same model, windows, grid and budget, scored by the same evaluator.

    pip install auto-round==0.16.1
    python benchmarks/signround_parity.py --model MODEL --calib TRAIN.txt --eval TEST.txt

Both programs round the same full-precision weights with asymmetric grids (their symmetric grids differ by design), take
the same token windows, and give a model with fake-quantized weights whose perplexity qbench measures. What still
differs is their draw of windows and the float32 order of their sums; `--seeds` repeats both to show how much that is.
auto-round is not a dependency of qbench: the script stands outside the test suite.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qbench.data.text import load_text
from qbench.data.windows import draw_calibration, evaluation_windows
from qbench.engine import attention
from qbench.engine.install import quantized
from qbench.engine.lane import Lane
from qbench.engine.reconstruct import reconstruct
from qbench.engine.settings import EngineSettings
from qbench.evals.perplexity import perplexity
from qbench.methods import METHODS
from qbench.models.loading import load_model
from qbench.scheme import Scheme


class _Windows:
    """Token windows as auto-round takes them: a loader of [1, tokens] tensors."""

    def __init__(self, ids: Tensor):
        self.ids = ids

    def __iter__(self) -> Iterator[Tensor]:
        return iter(window[None] for window in self.ids)

    def __len__(self) -> int:
        return len(self.ids)


def ours(
    loaded: Any, ids: Tensor, evaluation: Tensor, method: str, a: argparse.Namespace, seed: int
) -> float:
    """Perplexity of one of qbench's methods."""
    loaded.model.set_attn_implementation(attention.register())
    scheme = Scheme.parse(a.scheme)
    options = {"iterations": a.iterations, "window_batch": a.batch} if method == "signround" else {}
    planner = METHODS.load(method)(**options).resolve(scheme, loaded.spec)
    settings = EngineSettings(device=torch.device(a.device), seed=seed)
    blocks = loaded.blocks
    (result,) = reconstruct(
        loaded.model, list(blocks), loaded.spec, [Lane(method, planner, scheme)], ids, settings
    )
    if result.error is not None:
        raise result.error
    with quantized(loaded.model, blocks, loaded.spec, result, settings):
        return _score(loaded.model, evaluation, a.device)


def theirs(loaded: Any, ids: Tensor, evaluation: Tensor, a: argparse.Namespace, seed: int) -> float:
    """Perplexity of auto-round's fake-quantized model."""
    from auto_round import AutoRound

    scheme = Scheme.parse(a.scheme)
    model: nn.Module = copy.deepcopy(loaded.model)
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    rounding = AutoRound(
        model, loaded.tokenizer, scheme="W4A16", bits=scheme.wbits, group_size=scheme.group_size or -1, sym=False,
        iters=a.iterations, seqlen=ids.shape[1], nsamples=len(ids), batch_size=a.batch, seed=seed,
        dataset=_Windows(ids), device_map=a.device, enable_torch_compile=False, amp=False,
    )  # fmt: skip
    model, _ = rounding.quantize()
    return _score(model.float(), evaluation, a.device)


def _score(model: nn.Module, evaluation: Tensor, device: str) -> float:
    return perplexity(model.to(device), evaluation, batch_size=4, device=device).value


def main() -> None:
    """Run both and print one line each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--scheme", default="W3A16g128")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    loaded = load_model(a.model, dtype="float32")
    ids = draw_calibration(load_text(a.calib, "calibration"), loaded.tokenizer, a.samples, a.seqlen, 2).ids
    evaluation = evaluation_windows(load_text(a.eval, "evaluation"), loaded.tokenizer, a.seqlen, a.limit).ids
    found: dict[str, list[float]] = {"full precision": [_score(loaded.model, evaluation, a.device)]}
    loaded.model.to("cpu")
    found["rtn"] = [ours(loaded, ids, evaluation, "rtn", a, 0)]
    for seed in range(a.seeds):
        started = time.perf_counter()
        found.setdefault("qbench signround", []).append(ours(loaded, ids, evaluation, "signround", a, seed))
        middle = time.perf_counter()
        found.setdefault("auto-round", []).append(theirs(loaded, ids, evaluation, a, seed))
        print(f"seed {seed}: {middle - started:.0f}s, {time.perf_counter() - middle:.0f}s", flush=True)
    for name, values in found.items():
        spread = f" ±{statistics.stdev(values):.3f} over {len(values)} seeds" if len(values) > 1 else ""
        print(f"{name:18} {statistics.fmean(values):10.4f}{spread}")
    ratio = math.exp(
        statistics.fmean(map(math.log, found["qbench signround"]))
        - statistics.fmean(map(math.log, found["auto-round"]))
    )
    print(f"{'ratio':18} {ratio:10.4f}")
    print(json.dumps({"arguments": vars(a), "perplexity": found, "ratio": ratio}))


if __name__ == "__main__":
    main()
