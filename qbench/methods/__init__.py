"""The methods, one file and one line each, and their compositions, `affinequant+gptq`, which need no line.

Installed packages add theirs through the entry-point group `qbench.methods`.
"""

from __future__ import annotations

import contextlib
from typing import Any

from qbench.errors import ConfigError
from qbench.registry import Registry


class _Methods(Registry):
    """A registry that also knows names joined by `+`."""

    def load(self, name: str) -> Any:
        """See `Registry`; a composition is put together from the methods that it names."""
        if "+" not in name:
            return super().load(name)
        from qbench.methods.composition import compose

        return compose(name)

    def origin(self, name: str) -> str:
        """See `Registry`; of a composition, each provider once."""
        return ", ".join(dict.fromkeys(super(_Methods, self).origin(part) for part in name.split("+")))

    def rounding_rules(self) -> list[str]:
        """Names of the methods that may end a composition, but for plugins that cannot be imported."""
        rules = []
        for name in self.names():
            with contextlib.suppress(ConfigError):
                rules += [name] if getattr(self.load(name), "rounds", False) else []
        return rules


METHODS = _Methods(
    "method",
    {
        "rtn": "qbench.methods.rtn:RTN",
        "smoothquant": "qbench.methods.smoothquant:SmoothQuant",
        "omniquant": "qbench.methods.omniquant:OmniQuant",
        "affinequant": "qbench.methods.affinequant:AffineQuant",
        "awq": "qbench.methods.awq:AWQ",
        "gptq": "qbench.methods.gptq:GPTQ",
        "abq": "qbench.methods.abq:ABQ",
        "signround": "qbench.methods.signround:SignRound",
    },
    group="qbench.methods",
)
