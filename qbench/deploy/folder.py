"""Write a lane's fake-quantized weights as an ordinary transformers folder, where everything could be folded."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from qbench.engine.reconstruct import LaneResult
from qbench.models.loading import LoadedModel
from qbench.transforms.tensors import BlockTensors


def folder_name(model: str, method: str, scheme: object) -> str:
    """`Model-Method-Scheme`, in the habit of model hubs."""
    return f"{model.rstrip('/').rpartition('/')[2]}-{method}-{scheme}"


def save_plain(loaded: LoadedModel, result: LaneResult, folder: Path, method: str) -> str:
    """Save the model with its dequantized weights in float32, to be loaded by plain transformers.

    Args:
        loaded: The full-precision model; unchanged.
        result: Finished blocks.
        folder: Parent of the folder that is written.
        method: For the folder's name.

    Returns:
        One sentence: where the folder is and what it leaves out, or why none was written.
    """
    states = [result.state(i).tensors("cpu") for i in range(len(result))]
    if (obstacle := _obstacle(loaded, states)) is not None:
        return f"not saved as a transformers folder: {obstacle}"
    target = folder / folder_name(loaded.name, method, result.lane.scheme)
    config = copy.deepcopy(loaded.model.config)
    switches = _switches(loaded, states)
    for switch in switches:
        setattr(config, switch, True)
    config.dtype = "float32"
    config._attn_implementation = "sdpa"
    model = type(loaded.model)(config).float()
    weights: dict[str, Tensor] = {k: v.float() for k, v in loaded.model.state_dict().items()}
    spec, prefix = loaded.spec, loaded.architecture.blocks
    for i, tensors in enumerate(states):
        for role, path in spec.linears.items():
            weights[f"{prefix}.{i}.{path}.weight"] = tensors.weight[role]
            bias = tensors.bias[role]
            if bias is None and any(role in loaded.architecture.bias_options[s] for s in switches):
                bias = torch.zeros(spec.shapes[role][0])
            if bias is not None:
                weights[f"{prefix}.{i}.{path}.bias"] = bias
        for norm, path in spec.norms.items():
            weights[f"{prefix}.{i}.{path}.weight"] = tensors.norm_weight[norm]
            if (norm_bias := tensors.norm_bias[norm]) is not None:
                weights[f"{prefix}.{i}.{path}.bias"] = norm_bias
    model.load_state_dict(weights, strict=True)
    model.save_pretrained(target)
    loaded.tokenizer.save_pretrained(target)
    sentence = f"saved to {target} (fake-quantized float32 weights"
    if result.lane.scheme.attention_bits != (16, 16):
        sentence += "; plain transformers does not quantize its activations"
    return sentence + ")"


def _switches(loaded: LoadedModel, states: list[BlockTensors]) -> list[str]:
    """Configuration switches needed for biases that folding created."""
    created = {role for tensors in states for role, bias in tensors.bias.items() if bias is not None}
    created -= set(loaded.spec.biased)
    return [switch for switch, roles in loaded.architecture.bias_options.items() if created & set(roles)]


def _obstacle(loaded: LoadedModel, states: list[BlockTensors]) -> str | None:
    """What plain transformers cannot represent, with the option to change."""
    if any(matrix is not None for t in states for matrix in t.norm_matrix.values()):
        return "full matrices remain after the norms at run time (--no-use-ln-matrix folds everything)"
    if not loaded.spec.norm_bias and any(bias is not None for t in states for bias in t.norm_bias.values()):
        return "shifts leave a bias behind each RMSNorm (--no-shift folds everything)"
    allowed = {
        role for roles in loaded.architecture.bias_options.values() for role in roles
    } | loaded.spec.biased
    extra = sorted({r for t in states for r, b in t.bias.items() if b is not None} - allowed)
    if extra:
        return f"{loaded.architecture.name} has no bias on {', '.join(extra)} (--no-shift folds everything)"
    return None
