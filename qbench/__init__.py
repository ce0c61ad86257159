"""qbench compares post-training quantization methods for LLMs on one engine.

    import qbench
    results = qbench.run(qbench.RunConfig(methods=["rtn", "affinequant"], schemes=["W4A4"]))
    print(qbench.compare(results).render("markdown"))

Names are imported on first use: `import qbench` itself imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qbench.config import RunConfig
    from qbench.reports.comparison import compare
    from qbench.results import Result
    from qbench.runner import run
    from qbench.scheme import Scheme

__version__ = "0.1.0"
__all__ = ["Result", "RunConfig", "Scheme", "compare", "run"]

_HOMES = {
    "Result": "qbench.results",
    "RunConfig": "qbench.config",
    "Scheme": "qbench.scheme",
    "compare": "qbench.reports.comparison",
    "run": "qbench.runner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qbench' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
