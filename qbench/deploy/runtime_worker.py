"""Load a folder in one runtime and write down what it computes. Run by another Python, which may not have qbench.

`python -I runtime_worker.py REQUEST.json`: the request names the runtime, the folder, a safetensors file with the
probe (token ids; one input per width for the linears) and the file for the answer. The answer holds the logits, the
response of every linear to its input, and the output of every block on the first window; so a parent can tell which
linear is wrong without knowing how the runtime computes. Only torch, safetensors and the runtime itself are imported.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import warnings
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PACKAGES = ("torch", "transformers", "compressed-tensors", "optimum", "gptqmodel", "auto-gptq")


HALVED = (
    "loaded with dequantize=True, which rounds weights to the scales' float16: this compressed-tensors does not load "
    "packed zero points otherwise"
)
WIDENED = "the model is cast to float32 after loading, so that only the kernels' weights are in float16"


def load(runtime: str, folder: str, dtype: str) -> Any:
    """The folder as this runtime's transformers-like model, on the CPU; `model.qbench_note` says what was special.

    Args:
        runtime: Its name.
        folder: What to load.
        dtype: `auto`: as the folder says; `float32`: what does not run in the format's kernels computes in float32.
    """
    wide = dtype == "float32"
    if runtime == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        # AUTO takes a fused kernel that is wrong for asymmetric weights in 7.6.0; TORCH refuses float32 on loading
        model = GPTQModel.load(folder, device="cpu", dtype=torch.float16, backend=BACKEND.TORCH).model
        return _widened(model) if wide else model
    if runtime == "auto-gptq":
        _shim_for_transformers_5()
        from auto_gptq import AutoGPTQForCausalLM

        model = AutoGPTQForCausalLM.from_quantized(
            folder,
            device="cpu",
            use_triton=False,
            disable_exllama=True,
            disable_exllamav2=True,
            inject_fused_attention=False,
            inject_fused_mlp=False,
            use_safetensors=True,
        ).model
        return _widened(model) if wide else model
    return _load_transformers(folder, dtype)


def _widened(model: Any) -> Any:
    torch.nn.Module.float(model)  # transformers' own float() refuses quantized models
    model.qbench_note = WIDENED
    return model


def _load_transformers(folder: str, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    settings = _settings(folder)
    if settings.get("quant_method") == "gptq":
        from transformers import GPTQConfig

        # gptqmodel's default kernel on a CPU turns scales and inputs into bfloat16
        plain = GPTQConfig(bits=settings["bits"], backend="torch")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # as below
            model = AutoModelForCausalLM.from_pretrained(
                folder, device_map="cpu", dtype=torch.float16, quantization_config=plain
            )
        return _widened(model) if dtype == "float32" else model
    wanted = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    try:
        return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **wanted)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error) or not _weights_alone(settings):
            raise
    # compressed-tensors 0.20.0 forgets to pack zero points of the meta model that the file's are loaded into
    from transformers import CompressedTensorsConfig

    dense = CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # "already has a quantization_config": that is what is wanted
        model = AutoModelForCausalLM.from_pretrained(
            folder, device_map="cpu", quantization_config=dense, **wanted
        )
    model.qbench_note = HALVED
    return model


def _settings(folder: str) -> dict[str, Any]:
    """The folder's quantization_config."""
    with open(f"{folder}/config.json") as file:
        return json.load(file).get("quantization_config") or {}


def _weights_alone(settings: dict[str, Any]) -> bool:
    """Whether a compressed-tensors folder quantizes no inputs, which dequantize=True would drop."""
    groups = settings.get("config_groups", {}).values()
    return bool(groups) and all(group.get("input_activations") is None for group in groups)


def _shim_for_transformers_5() -> None:
    """Four names that AutoGPTQ 0.7.1 imports and transformers 5 and peft 0.21 moved; nothing where they exist."""
    import huggingface_hub
    import peft.peft_model
    import transformers.modeling_utils
    import transformers.utils.hub

    if not hasattr(transformers.modeling_utils, "no_init_weights"):
        import transformers.initialization

        transformers.modeling_utils.no_init_weights = lambda _enable=True: (
            transformers.initialization.no_init_weights()
        )
    for name in ("create_commit", "create_repo"):
        if not hasattr(transformers.utils.hub, name):
            setattr(transformers.utils.hub, name, getattr(huggingface_hub, name))
    if not hasattr(peft.peft_model, "PEFT_TYPE_TO_MODEL_MAPPING"):
        peft.peft_model.PEFT_TYPE_TO_MODEL_MAPPING = {}


@torch.no_grad()
def compute(
    model: Any, probe: dict[str, torch.Tensor], blocks: str, linears: list[str]
) -> dict[str, torch.Tensor]:
    """Logits first, since some runtimes finish loading in their first forward pass; then every linear by itself."""
    answer: dict[str, torch.Tensor] = {}
    model.eval()
    model.config.use_cache = False

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            answer.setdefault(name, hidden.detach().float().reshape(-1, hidden.shape[-1]).clone())

        return hook

    dimensions: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            dimensions[name] = args[0].ndim

        return hook

    handles = [
        block.register_forward_hook(keep(f"block.{i}")) for i, block in enumerate(model.get_submodule(blocks))
    ]
    handles += [model.get_submodule(name).register_forward_pre_hook(count(name)) for name in linears]
    logits = [model(input_ids=window[None]).logits[0].float() for window in probe["ids"]]
    for handle in handles:
        handle.remove()
    answer["logits"] = torch.stack(logits)
    dtype = next(p.dtype for p in model.get_input_embeddings().parameters())
    for name in linears:
        module = model.get_submodule(name)
        x = probe[f"input.{int(probe[f'width.{name}'])}"].to(dtype)
        # as inside its block: most inputs have a batch dimension, some models flatten it away
        found = module(x) if dimensions.get(name) == 2 else module(x[None])[0]
        answer[f"linear.{name}"] = found.float()
    return {name: tensor.contiguous() for name, tensor in answer.items()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(request_file: str) -> None:
    """Do what the request says; an error goes into the answer's place as one line of JSON on stdout."""
    with open(request_file) as file:
        request = json.load(file)
    torch.set_num_threads(request["threads"])
    try:
        model = load(request["runtime"], request["folder"], request["dtype"])
        answer = compute(model, load_file(request["probe"]), request["blocks"], request["linears"])
    except Exception as error:  # whatever a foreign runtime raises is its verdict on the folder
        first = (str(error).strip() or "no message").splitlines()[0]
        print(json.dumps({"error": f"{type(error).__name__}: {first}"}))
        return
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    dtype = str(next(model.get_input_embeddings().parameters()).dtype).removeprefix("torch.")
    save_file(answer, request["answer"])
    note = getattr(model, "qbench_note", None)
    kernel = type(model.get_submodule(request["linears"][0])).__name__
    if note in (HALVED, WIDENED):
        dtype = "float16"
    elif kernel.startswith("TorchAten"):
        dtype, note = "bfloat16", f"GPTQModel's CPU kernel {kernel} turns scales and inputs into bfloat16"
    print(json.dumps({"versions": versions, "dtype": dtype, "note": note}))


if __name__ == "__main__":
    main(sys.argv[1])
