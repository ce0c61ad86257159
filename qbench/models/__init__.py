"""Architectures as descriptions. Adding one is a file of tens of lines and one line here."""

from __future__ import annotations

from qbench.registry import Registry

ARCHITECTURES = Registry(
    "architecture",
    {
        "llama": "qbench.models.llama:LLAMA",
        "mistral": "qbench.models.llama:MISTRAL",
        "qwen2": "qbench.models.llama:QWEN2",
        "qwen3": "qbench.models.llama:QWEN3",
        "opt": "qbench.models.opt:OPT",
    },
    group="qbench.architectures",
)
