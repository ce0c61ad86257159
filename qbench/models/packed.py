"""Read folders of packed integer weights that other programs write: GPTQ (v1 and v2), AWQ, compressed-tensors.

The integers are unpacked and dequantized with torch alone, so that a folder can be scored where none of the formats'
own packages is installed, and so that what those packages compute can be held against the file itself. Layouts:
AutoGPTQ 0.7.1, GPTQModel 7.6.0, AutoAWQ's `gemm`, compressed-tensors 0.20.0.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qbench.errors import DataError, UnsupportedSchemeError
from qbench.quant import packing
from qbench.quant.fake import fake_quantize
from qbench.quant.grid import Grid

GPTQ_BITS = (2, 3, 4, 8)
# The tensor whose presence makes a module a packed linear, by quant_method.
READABLE = ("gptq", "awq", "compressed-tensors")
_MARKS = {"gptq": ("qweight",), "awq": ("qweight",), "compressed-tensors": ("weight_packed", "weight_scale")}


@dataclass(frozen=True)
class PackedWeight:
    """The integers of one linear as a file holds them, w = scale · (code − zero_point).

    Attributes:
        codes: uint8 [out, in], 0 … 2^bits − 1.
        scale: [out, groups], in the file's dtype.
        zero_point: int16 [out, groups].
        group_of: Group of each input channel [in]; consecutive unless columns were reordered (`desc_act`).
        bits: Of a code.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    group_of: Tensor
    bits: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in], computed in float32."""
        scale, zero = self.scale.float(), self.zero_point.float()
        if scale.shape[1] == 1:
            return ((self.codes.float() - zero) * scale).to(dtype)
        return ((self.codes.float() - zero[:, self.group_of]) * scale[:, self.group_of]).to(dtype)


@dataclass(frozen=True)
class InputQuantization:
    """Dynamic integer quantization of a linear's input, one range per token, as compressed-tensors defines it."""

    bits: int
    symmetric: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Fake-quantize [..., tokens, in]."""
        if not self.symmetric:
            return fake_quantize(x, Grid(self.bits))
        half = 2 ** (self.bits - 1)
        wide = x.float()
        # their symmetric step is the whole signed range over 2·max: max / 127.5 for 8 bits
        scale = wide.abs().amax(-1, keepdim=True) / ((2 * half - 1) / 2)
        scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
        return ((wide / scale).round().clamp(-half, half - 1) * scale).to(x.dtype)


class PackedFolder:
    """A folder of packed weights, opened but not yet read."""

    def __init__(self, folder: str | Path) -> None:
        """Find the packed linears.

        Raises:
            UnsupportedSchemeError: If it is of a kind, or has a setting, that is not read here.
            DataError: If files are missing or damaged.
        """
        self.folder = Path(folder)
        settings = packed_settings(self.folder)
        if settings is None:
            raise DataError(
                f"{str(folder)!r} is no packed folder: its config.json has no quantization_config."
            )
        self.settings = settings
        self.method = str(settings.get("quant_method"))
        if self.method not in _MARKS:
            raise UnsupportedSchemeError(
                f"{str(folder)!r} is quantized by {self.method!r}. Read here: {', '.join(_MARKS)}."
            )
        self._files = self._index()
        # an unquantized linear of a compressed-tensors folder has a weight and no scale
        marks = {m for m in _MARKS[self.method]}
        found = {n.rpartition(".")[0]: None for n in self._files if n.rpartition(".")[2] in marks}
        self.linears = list(found)
        if not self.linears:
            raise DataError(
                f"{str(folder)!r} says {self.method} in its config.json but holds no packed linear."
            )
        self.check()

    def _index(self) -> dict[str, Path]:
        """File of every tensor."""
        files: dict[str, Path] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    files |= {name: path for name in file.keys()}  # noqa: SIM118 (not a dict)
            except (SafetensorError, OSError) as error:
                raise DataError(f"Cannot read {str(path)!r}: {error}.") from None
        if not files:
            raise DataError(
                f"No *.safetensors file in {str(self.folder)!r}; other files of weights are not read."
            )
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            try:
                promised = json.loads(index.read_text())["weight_map"]
            except (OSError, ValueError, LookupError, TypeError):
                raise DataError(f"{str(index)!r} is no index of weights, or damaged.") from None
            if missing := sorted(set(promised) - set(files)):
                raise DataError(
                    f"{str(self.folder)!r} lacks {len(missing)} of the tensors in its index (first: {missing[0]})."
                )
        return files

    def check(self) -> None:
        """Refuse settings that this reader would not compute rightly.

        Raises:
            UnsupportedSchemeError: Names the setting.
        """
        settings, problems = self.settings, []
        if self.method == "gptq":
            if settings.get("bits") not in GPTQ_BITS:
                problems.append(f"bits={settings.get('bits')} (read: 2, 3, 4, 8)")
            if self.gptq_version is None:
                problems.append(
                    f"checkpoint_format={settings.get('checkpoint_format')!r} (read: gptq, gptq_v2)"
                )
            if settings.get("is_marlin_format"):
                problems.append("is_marlin_format (weights reordered for one kernel)")
            if settings.get("dynamic"):
                problems.append("different settings for different modules ('dynamic')")
        elif self.method == "awq":
            if settings.get("bits", settings.get("w_bit")) != 4:
                problems.append(f"bits={settings.get('bits')} (read: 4)")
            if str(settings.get("version", settings.get("checkpoint_format", "gemm"))).lower() != "gemm":
                problems.append(f"version={settings.get('version')!r} (read: gemm)")
        else:
            problems += self._unread_compressed()
        if problems:
            raise UnsupportedSchemeError(
                f"Cannot read the {self.method} folder {str(self.folder)!r}: {'; '.join(problems)}."
            )

    def _unread_compressed(self) -> list[str]:
        problems = []
        groups = list(self.settings.get("config_groups", {}).values())
        weights, inputs = ([group.get(key) for group in groups] for key in ("weights", "input_activations"))
        if not groups or any(w != weights[0] for w in weights) or any(i != inputs[0] for i in inputs):
            problems.append("config_groups with different settings")
        for which, args in (
            ("weights", weights[0] if weights else None),
            ("input_activations", inputs[0] if inputs else None),
        ):
            if args is not None and args.get("type", "int") != "int":
                problems.append(f"{which} of type {args['type']!r} (read: int)")
        if (
            inputs
            and inputs[0] is not None
            and (not inputs[0].get("dynamic") or inputs[0].get("strategy") != "token")
        ):
            problems.append("input_activations that are not dynamic per token")
        if (
            weights
            and weights[0] is not None
            and weights[0].get("strategy") not in ("group", "channel", "tensor")
        ):
            problems.append(f"weights per {weights[0].get('strategy')!r}")
        if self.settings.get("kv_cache_scheme"):
            problems.append("a quantized key-value cache")
        if self.settings.get("transform_config"):
            problems.append("transforms at run time")
        if self.settings.get("sparsity_config", {}).get("format") not in (None, "dense"):
            problems.append("sparsity")
        return problems

    @property
    def gptq_version(self) -> int | None:
        """1: zero points are stored minus one. 2: as they are."""
        written = self.settings.get("checkpoint_format") or self.settings.get("format") or "gptq"
        return {"gptq": 1, "gptq_v2": 2}.get(written)

    @property
    def bits(self) -> int:
        """Of a weight."""
        if self.method == "compressed-tensors":
            return int(self._weight_args["num_bits"])
        return int(self.settings.get("bits", self.settings.get("w_bit", 4)))

    @property
    def summary(self) -> str:
        """One phrase: format and bits."""
        inputs = "" if self.inputs is None else f", inputs {self.inputs.bits}"
        version = f" v{self.gptq_version}" if self.method == "gptq" else ""
        return f"{self.method}{version}, weights {self.bits} bits{inputs}"

    @property
    def inputs(self) -> InputQuantization | None:
        """How the inputs of packed linears are quantized at run time, or None where they are not."""
        if self.method != "compressed-tensors":
            return None
        args = next(iter(self.settings["config_groups"].values())).get("input_activations")
        if args is None or args["num_bits"] >= 16:
            return None
        return InputQuantization(args["num_bits"], bool(args.get("symmetric", True)))

    @cached_property
    def _weight_args(self) -> dict[str, Any]:
        return next(iter(self.settings["config_groups"].values()))["weights"]

    def tensor(self, name: str) -> Tensor:
        """One stored tensor.

        Raises:
            DataError: If it is not there.
        """
        if name not in self._files:
            raise DataError(f"{str(self.folder)!r} lacks the tensor {name!r}.")
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def _has(self, name: str) -> bool:
        return name in self._files

    def rest(self) -> list[str]:
        """Names of the tensors that are stored as they are: embeddings, norms, biases, head."""
        packed = set(self.linears)
        parts = {
            "qweight",
            "qzeros",
            "scales",
            "g_idx",
            "weight",
            "weight_packed",
            "weight_shape",
            "weight_scale",
        }
        parts |= {"weight_zero_point", "weight_g_idx"}
        return [
            name for name in self._files
            if name.rpartition(".")[0] not in packed or name.rpartition(".")[2] not in parts
        ]  # fmt: skip

    def linear(self, name: str) -> PackedWeight:
        """The integers of one packed linear.

        Raises:
            DataError: If its tensors are missing or do not fit each other.
        """
        read = {"gptq": self._gptq, "awq": self._awq, "compressed-tensors": self._compressed}[self.method]
        try:
            weight = read(name)
        except (ValueError, RuntimeError) as error:
            raise DataError(f"{name} in {str(self.folder)!r} is damaged: {error}.") from None
        groups = (weight.codes.shape[0], int(weight.group_of.max()) + 1)
        shapes = (tuple(weight.scale.shape), tuple(weight.zero_point.shape))
        if shapes != (groups, groups) or len(weight.group_of) != weight.codes.shape[1]:
            raise DataError(
                f"{name} in {str(self.folder)!r} is damaged: codes {tuple(weight.codes.shape)}, scales {shapes[0]}, "
                f"zero points {shapes[1]} and {len(weight.group_of)} group indices do not fit each other."
            )
        return weight

    def _gptq(self, name: str) -> PackedWeight:
        bits = self.bits
        words, scales = self.tensor(f"{name}.qweight"), self.tensor(f"{name}.scales")
        width, (groups, rows) = words.shape[0] * packing.WORD // bits, scales.shape
        codes = packing.unpack(words, bits, width, dim=0).T.contiguous()
        zeros = self.tensor(f"{name}.qzeros")
        if self.gptq_version == 1 and bits != 3:
            # whole words, as GPTQModel adds: a stored −1 carries into its neighbour exactly as it was borrowed
            ones = sum(1 << shift for shift in range(0, packing.WORD, bits))
            zeros = (zeros.to(torch.int64) + ones).to(torch.int32)
        zero = packing.unpack(zeros, bits, rows).to(torch.int16)
        if self.gptq_version == 1 and bits == 3:
            zero = (zero + 1) % 8
        if self._has(f"{name}.g_idx"):
            group_of = self.tensor(f"{name}.g_idx").to(torch.int64)
        else:
            group_of = torch.arange(width) // (width // groups)
        return PackedWeight(codes, scales.T.contiguous(), zero.T.contiguous(), group_of, bits)

    def _awq(self, name: str) -> PackedWeight:
        scales = self.tensor(f"{name}.scales")
        codes = packing.unpack_awq(self.tensor(f"{name}.qweight")).T.contiguous()
        zero = packing.unpack_awq(self.tensor(f"{name}.qzeros")).to(torch.int16).T.contiguous()
        group_of = torch.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[0])
        return PackedWeight(codes, scales.T.contiguous(), zero, group_of, 4)

    def _compressed(self, name: str) -> PackedWeight:
        bits, offset = self.bits, 2 ** (self.bits - 1)
        scale = self.tensor(f"{name}.weight_scale")
        scale = scale.reshape(1, 1) if scale.numel() == 1 else scale
        stored_zero = (
            self.tensor(f"{name}.weight_zero_point") if self._has(f"{name}.weight_zero_point") else None
        )
        if self._has(f"{name}.weight_packed"):
            rows, width = self.tensor(f"{name}.weight_shape").tolist()
            codes = packing.unpack(self.tensor(f"{name}.weight_packed"), bits, width)
            if stored_zero is not None and stored_zero.dtype == torch.int32:
                zero = packing.unpack(stored_zero, bits, rows, dim=0).to(torch.int16)
            else:
                zero = None if stored_zero is None else stored_zero.to(torch.int16) + offset
        else:
            signed = self.tensor(f"{name}.weight")
            rows, width = signed.shape
            codes = (signed.to(torch.int16) + offset).to(torch.uint8)
            zero = None if stored_zero is None else stored_zero.to(torch.int16) + offset
        scale = scale.expand(rows, -1)
        zero = (
            torch.full(scale.shape, offset, dtype=torch.int16) if zero is None else zero.reshape(scale.shape)
        )
        if self._has(f"{name}.weight_g_idx"):
            group_of = self.tensor(f"{name}.weight_g_idx").to(torch.int64)
        else:
            group_of = torch.arange(width) // (width // scale.shape[1])
        return PackedWeight(codes, scale, zero, group_of, bits)

    def load(self, config: Any, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
        """The model with dequantized weights, its linears quantizing their inputs where the folder says so.

        Args:
            config: The folder's transformers configuration; not changed.
            dtype: Of the model.

        Returns:
            The model on the CPU, and transformers' report of missing and unexpected tensors.
        """
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        config = copy.deepcopy(config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        state = {name: self.tensor(name).to(dtype) for name in self.rest()}
        state |= {f"{name}.weight": self.linear(name).dequantize(dtype) for name in self.linears}
        model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
        if (inputs := self.inputs) is not None:
            for name in self.linears:
                model.get_submodule(name).register_forward_pre_hook(
                    lambda module, args: (inputs(args[0]), *args[1:])
                )
        return model, report

    @property
    def n_parameters(self) -> int:
        """Parameters of the dequantized model, without reading them."""
        total = 0
        for name, path in self._files.items():
            module, _, part = name.rpartition(".")
            with safe_open(path, framework="pt") as file:
                shape = file.get_slice(name).get_shape()
            n = 1
            for size in shape:
                n *= size
            if part in ("qweight", "weight_packed"):
                total += n * packing.WORD // self.bits
            elif module not in self.linears or part in ("weight", "bias"):
                total += n
        return total


def packed_settings(folder: str | Path) -> dict[str, Any] | None:
    """How a folder's weights are packed, by its config.json or AutoGPTQ's own file; None for an ordinary model.

    Raises:
        DataError: If a file cannot be read.
    """
    for name, key in (("config.json", "quantization_config"), ("quantize_config.json", None)):
        path = Path(folder, name)
        if not path.exists():
            continue
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"Cannot read {str(path)!r}: {error}.") from None
        if key is None:
            return {"quant_method": "gptq", **content}
        if content.get(key):
            return dict(content[key])
    return None


def load_packed(folder: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A packed folder as an ordinary model that computes in `dtype` with the file's exact integers.

    Raises:
        UnsupportedSchemeError: If the folder is of a kind that is not read here.
        DataError: If files are missing or damaged.
    """
    from transformers import AutoConfig

    packed = PackedFolder(folder)
    model, report = packed.load(AutoConfig.from_pretrained(folder), dtype)
    if missing := sorted(report["missing_keys"]):
        raise DataError(f"{str(folder)!r} lacks {len(missing)} tensors of its model (first: {missing[0]}).")
    return model.eval().requires_grad_(False)
