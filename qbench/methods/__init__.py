"""The methods, one file and one line each.

Installed packages add theirs through the entry-point group `qbench.methods`.
"""

from __future__ import annotations

from qbench.registry import Registry

METHODS = Registry(
    "method",
    {
        "rtn": "qbench.methods.rtn:RTN",
        "smoothquant": "qbench.methods.smoothquant:SmoothQuant",
        "omniquant": "qbench.methods.omniquant:OmniQuant",
        "affinequant": "qbench.methods.affinequant:AffineQuant",
        "abq": "qbench.methods.abq:ABQ",
    },
    group="qbench.methods",
)
