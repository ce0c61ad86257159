"""Backends: a quantized linear as a callable layer, computed by somebody's kernels.

A GEMM is not written here: each file adapts kernels that exist, behind the one interface of `layer.py`, and says which
requests it can serve. No layer is timed or used before `gate.py` has compared it with the exact product.
"""

from qbench.registry import Registry

BACKENDS = Registry(
    "backend",
    {
        "reference": "qbench.deploy.backends.reference:Reference",
        "torch": "qbench.deploy.backends.native:Native",
        "humming": "qbench.deploy.backends.humming:Humming",
        "gemlite": "qbench.deploy.backends.gemlite:Gemlite",
    },
)
