"""AffineQuant's loop a second time, as plainly as it can be written, to hold the engine against.

    python benchmarks/naive_affinequant.py --model MODEL --calib-dataset TRAIN.txt --eval TEST.txt [--bits 2]
        [--group-size 64] [--epochs 20] [--sf 0.01] [--aug-loss] [--no-let] [--autocast] [--json FILE]

It shares no code with qbench's quantizer, transforms and engine: a LLaMA block (no grouped queries) in elementary
operations, one sample and one optimizer step after the other, dense masks, direct inverses, weights only. It computes
the published form as bytedance/AffineQuant@0f3ba93 does (its query–key scale is untied, every entry of a matrix is kept
from zero, ranges are the group's extremes), with `--autocast` in float16 under a gradient scaler, else in float32.
`--no-let` leaves weight clipping alone: OmniQuant's recipe for weights of LLaMA. Initial scales take w = max W, as the
authors' code does, or max |W| with `--absolute`, as qbench does. tests/engine/test_naive.py compares it with the engine
in float64; docs/results.md has what it gives on a reference model.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LINEARS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
SITES = {"attn": "q", "mlp": "up", "out": "o"}  # site → linear whose input and weight give its initial scale
FLOOR = 1e-2


@dataclass(frozen=True)
class Recipe:
    """What the authors' program takes as options."""

    bits: int = 2
    group_size: int | None = 64
    epochs: int = 20
    sf: float = 0.01
    aug_loss: bool = False
    let: bool = True
    alpha: float = 0.5
    let_lr: float = 5e-3
    lwc_lr: float = 1e-2
    absolute: bool = False
    autocast: bool = False


def band(size: int, epoch: int, recipe: Recipe, like: Tensor) -> Tensor:
    """Gradual mask of one epoch: 1 on the diagonal, sf inside the band, 0 outside."""
    reach = size if recipe.epochs == 1 else int((size - 1) / (recipe.epochs - 1) * epoch) + 1
    i = torch.arange(size, device=like.device)
    distance = (i[:, None] - i[None, :]).abs()
    mask = torch.where(distance < reach, recipe.sf, 0.0).to(like)
    return mask.fill_diagonal_(1.0)


class Block(nn.Module):
    """One decoder layer with its own copies of the weights, and what is learned on it."""

    def __init__(
        self, layer: nn.Module, config: Any, maxima: dict[str, Tensor], recipe: Recipe, dtype: torch.dtype
    ):
        super().__init__()
        self.recipe, self.heads = recipe, config.num_attention_heads
        self.eps = config.rms_norm_eps
        self.w = {name: layer.get_submodule(path).weight.detach().to(dtype) for name, path in LINEARS.items()}
        self.b: dict[str, Tensor] = {}
        self.norm = {
            "attn": layer.input_layernorm.weight.detach().to(dtype),
            "mlp": layer.post_attention_layernorm.weight.detach().to(dtype),
        }
        self.before: dict[str, tuple[Tensor, Tensor]] = {}  # norm → (what is taken off, what multiplies it)
        size = config.hidden_size
        self.clip = nn.ParameterDict()
        for name, weight in self.w.items():
            groups = weight.numel() // (recipe.group_size or weight.shape[1])
            for end in ("top", "bottom"):
                self.clip[f"{name}_{end}"] = nn.Parameter(torch.full((groups, 1), 4.0).to(weight))
        self.learned = nn.ParameterDict()
        if recipe.let:
            self.learned["qk"] = nn.Parameter(torch.ones(size).to(self.w["q"]))
            for site, name in SITES.items():
                weight = self.w[name].abs() if recipe.absolute else self.w[name]
                scale = maxima[name].to(weight).clamp(min=1e-5).pow(recipe.alpha)
                scale = scale / weight.amax(0).clamp(min=1e-5).pow(1 - recipe.alpha)
                self.learned[site] = nn.Parameter(scale.clamp(min=1e-5).diag())
                self.learned[f"{site}_shift"] = nn.Parameter(torch.zeros(size).to(weight))

    def round(self, name: str, weight: Tensor) -> Tensor:
        """Nearest levels between the clipped extremes; the gradient passes the rounding as if it were not there."""
        if self.recipe.bits >= 16:
            return weight
        groups = weight.reshape(-1, self.recipe.group_size or weight.shape[1])
        low = groups.amin(1, keepdim=True) * self.clip[f"{name}_bottom"].sigmoid()
        high = groups.amax(1, keepdim=True) * self.clip[f"{name}_top"].sigmoid()
        top = 2**self.recipe.bits - 1
        step = (high - low) / top
        zero = (-low / step).clamp(-1e4, 1e4).round()
        exact = groups / step
        codes = ((exact.round() - exact).detach() + exact + zero).clamp(0, top)
        return ((codes - zero) * step).reshape(weight.shape)

    def keep_from_zero(self) -> None:
        """Every entry of a scale or a matrix that is neither 0 nor at least FLOOR in size moves to ±FLOOR."""
        with torch.no_grad():
            for name, values in self.learned.items():
                if not name.endswith("shift"):
                    small = values.abs() < FLOOR
                    values[small] = values[small].sign() * FLOOR

    def quantized(self, wide: Tensor, narrow: Tensor) -> tuple[dict, dict, dict]:
        """Weights, biases and norm transforms of one step; `wide` and `narrow` mask the matrices."""
        w, b, before = dict(self.w), dict(self.b), dict(self.before)
        if self.recipe.let:
            p = self.learned
            for site, names in (("attn", "q k v"), ("mlp", "gate up")):
                matrix, shift = p[site] * wide, p[f"{site}_shift"]
                before[site] = (shift, matrix.inverse())
                for name in names.split():
                    b[name] = self.w[name] @ shift
                    w[name] = self.w[name] @ matrix.T
            matrix, shift = p["out"] * narrow, p["out_shift"]
            inverse = matrix.inverse()
            b["v"] = (b["v"] - shift) @ inverse
            w["v"] = inverse.T @ w["v"]
            b["o"] = self.w["o"] @ shift
            w["o"] = self.w["o"] @ matrix.T
            w["q"], b["q"] = w["q"] / p["qk"][:, None], b["q"] / p["qk"]
            w["k"], b["k"] = w["k"] * p["qk"][:, None], b["k"] * p["qk"]
        return {name: self.round(name, weight) for name, weight in w.items()}, b, before

    def forward(self, x: Tensor, w: dict, b: dict, before: dict, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """The layer on x [1, tokens, hidden] with these tensors."""

        def normed(x: Tensor, site: str) -> Tensor:
            wide = x if x.dtype == torch.float64 else x.float()
            out = (x * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.norm[
                site
            ]
            if site in before:
                shift, inverse = before[site]
                out = (out - shift) @ inverse
            return out

        def linear(x: Tensor, name: str) -> Tensor:
            return functional.linear(x, w[name], b.get(name))

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        def turned(y: Tensor) -> Tensor:
            first, second = y.chunk(2, -1)
            return y * rotary[0].to(y.dtype) + torch.cat((-second, first), -1) * rotary[1].to(y.dtype)

        h = normed(x, "attn")
        q, k, v = (split(linear(h, name)) for name in "qkv")
        logits = turned(q) @ turned(k).transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        logits = logits.masked_fill(future, -math.inf)
        maps = logits.softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
        x = x + linear((maps.to(v.dtype) @ v).transpose(1, 2).flatten(2), "o")
        h = normed(x, "mlp")
        return x + linear(functional.silu(linear(h, "gate")) * linear(h, "up"), "down")


@torch.no_grad()
def input_maxima(model: nn.Module, ids: Tensor) -> list[dict[str, Tensor]]:
    """Largest |input| per channel of each block's q, o and up over the windows, from hooks on the plain model."""
    seen: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
    hooks = []
    for found, layer in zip(seen, model.model.layers, strict=True):
        for name in SITES.values():

            def note(_: Any, args: Any, found: dict = found, name: str = name) -> None:
                top = args[0].flatten(0, -2).abs().amax(0)
                found[name] = torch.maximum(found[name], top) if name in found else top

            hooks.append(layer.get_submodule(LINEARS[name]).register_forward_pre_hook(note))
    for window in ids:
        model(window[None].to(model.device))
    for hook in hooks:
        hook.remove()
    return seen


def rotary_table(config: Any, tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [tokens, head_dim] of the half-split layout."""
    width = config.hidden_size // config.num_attention_heads
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta") or config.rope_theta
    turns = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    angles = torch.outer(torch.arange(tokens, device=device, dtype=torch.float32), 1 / theta**turns).to(dtype)
    both = torch.cat((angles, angles), -1)
    return both.cos(), both.sin()


def quantize(
    model: nn.Module, ids: Tensor, recipe: Recipe, dtype: torch.dtype = torch.float32
) -> tuple[list[tuple[Block, tuple[dict, dict, dict]]], list[list[float]]]:
    """Fit every block of a LLaMA model in turn.

    Args:
        model: Causal LLaMA model without grouped queries, on the device to work on.
        ids: Calibration windows [n, tokens].
        recipe: Options.
        dtype: Of weights, hidden states and parameters.

    Returns:
        Blocks with their finished tensors, and the mean training loss of every epoch by block.
    """
    config, device = model.config, model.device
    maxima = input_maxima(model, ids)
    rotary = rotary_table(config, ids.shape[1], device, dtype)
    with torch.no_grad():
        exact = [model.model.embed_tokens(window[None].to(device)).to(dtype) for window in ids]
    found = [x.clone() for x in exact]  # what the quantized blocks before give
    finished, curves = [], []

    def half() -> Any:
        return torch.autocast(device.type, dtype=torch.float16, enabled=recipe.autocast)

    for layer, seen in zip(model.model.layers, maxima, strict=True):
        block = Block(layer, config, seen, recipe, dtype).to(device)
        plain = (dict(block.w), {}, {})
        with torch.no_grad(), half():
            same = [block(x, *plain, rotary).to(dtype) for x in found] if recipe.aug_loss else None
            exact = [block(x, *plain, rotary).to(dtype) for x in exact]
        groups = [
            {"params": list(values.values()), "lr": rate}
            for values, rate in ((block.learned, recipe.let_lr), (block.clip, recipe.lwc_lr))
            if len(values)
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        scaler = torch.amp.GradScaler(device.type, enabled=recipe.autocast)
        curve = []
        for epoch in range(recipe.epochs):
            wide = band(config.hidden_size, epoch, recipe, block.w["q"])
            one = band(config.hidden_size // block.heads, epoch, recipe, block.w["q"])
            narrow = torch.block_diag(*[one] * block.heads)
            total = torch.zeros((), device=device, dtype=torch.float64)
            for i, x in enumerate(found):
                block.keep_from_zero()
                with half():
                    y = block(x, *block.quantized(wide, narrow), rotary)
                    loss = functional.mse_loss(y.to(dtype), exact[i])
                    if same is not None:
                        loss = loss + functional.mse_loss(y.to(dtype), same[i])
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                total += loss.detach()
            curve.append(float(total) / len(found))
        with torch.no_grad():
            block.keep_from_zero()
            tensors = block.quantized(wide, narrow)
            with half():
                found = [block(x, *tensors, rotary).to(dtype) for x in found]
        finished.append((block, tensors))
        curves.append(curve)
        print(f"block {len(curves)}: loss {curve[0]:.4g} -> {curve[-1]:.4g}", flush=True)
    return finished, curves


@torch.no_grad()
def perplexity(
    model: nn.Module, blocks: list[tuple[Block, tuple[dict, dict, dict]]], windows: Tensor
) -> float:
    """exp of the mean loss over the windows' predicted tokens."""
    rotary = rotary_table(model.config, windows.shape[1], model.device, torch.float32)
    losses = []
    for window in windows.to(model.device):
        x = model.model.embed_tokens(window[None]).float()
        for block, tensors in blocks:
            x = block(x, *tensors, rotary)
        logits = model.lm_head(model.model.norm(x))[0, :-1]
        losses.append(functional.cross_entropy(logits, window[1:]).double())
    return float(torch.stack(losses).mean().exp())


def main() -> None:
    """Fit, print the losses and the perplexity."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qbench.data.text import load_text
    from qbench.data.windows import draw_calibration, evaluation_windows

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib-dataset", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=64, help="0: per output channel")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--sf", type=float, default=0.01)
    parser.add_argument("--no-let", action="store_true")
    parser.add_argument("--limit", type=int)
    for flag in ("aug-loss", "absolute", "autocast"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).to(device).eval()
    model.requires_grad_(False)
    ids = draw_calibration(
        load_text(given.calib_dataset, "calibration"), tokenizer, given.nsamples, given.seqlen, given.seed
    ).ids
    test = evaluation_windows(load_text(given.eval, "evaluation"), tokenizer, given.seqlen, given.limit).ids
    recipe = Recipe(
        given.bits, given.group_size or None, given.epochs, given.sf, given.aug_loss, not given.no_let,
        absolute=given.absolute, autocast=given.autocast,
    )  # fmt: skip
    blocks, curves = quantize(model, ids, recipe)
    result = vars(recipe) | {"perplexity": perplexity(model, blocks, test), "losses": curves}
    print(f"{recipe}: perplexity {result['perplexity']:.2f}")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
