"""The published cells: facts from the papers' tables and the authors' READMEs, with their source, found by name.

`published.csv` beside this file is the data: one line per cell, values as printed, "W2*" for weights with five levels.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from qbench.errors import ConfigError, suggest, unknown_name

FULL_PRECISION = "FP16"
AVERAGE = "avg"
# The tables' names for models, and the hub's for the weights that the authors' scripts load.
HUB_NAMES = {
    **{f"opt-{size}": f"facebook/opt-{size}" for size in ("125m", "1.3b", "2.7b", "6.7b", "13b", "30b")},
    **{f"llama-{size}": f"huggyllama/llama-{size}" for size in ("7b", "13b", "30b", "65b")},
    **{f"llama-2-{size}": f"meta-llama/Llama-2-{size}-hf" for size in ("7b", "13b", "70b")},
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
}


@dataclass(frozen=True)
class Published:
    """One number of a table.

    Attributes:
        printed: The value as it stands in the table: its decimals say how far it was rounded; nan where the table says
            that the method broke down.
        metric: ppl, or acc in percent.
    """

    source: str
    table: str
    model: str
    method: str
    scheme: str
    dataset: str
    metric: str
    printed: str

    @property
    def value(self) -> float:
        """The number."""
        return float(self.printed)

    @property
    def rounding(self) -> float:
        """Half a unit of the last printed digit: of 30.56 it is 0.005, of 1.2e3 it is 50."""
        digits, _, power = self.printed.lower().partition("e")
        return 0.5 * 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))

    @property
    def paper(self) -> str:
        """Who published it: `AffineQuant`."""
        return self.source.partition(" (")[0]

    @property
    def name(self) -> str:
        """What `qbench parity` calls the table: `AffineQuant Table 1`."""
        return f"{self.paper} {self.table}"

    @property
    def hub_name(self) -> str:
        """Where the model's weights are."""
        return HUB_NAMES[self.model]


@cache
def cells() -> tuple[Published, ...]:
    """All of them, in the order of the file."""
    text = (files("qbench.reports") / "published.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return tuple(Published(printed=row.pop("value"), **row) for row in rows)


def find(
    table: str | None = None,
    papers: Sequence[str] = (),
    models: Sequence[str] = (),
    methods: Sequence[str] = (),
    schemes: Sequence[str] = (),
    datasets: Sequence[str] = (),
) -> list[Published]:
    """Cells that agree with everything given; names in any case, models by the table's or the hub's name.

    Args:
        table: `AffineQuant Table 1`, or a beginning of one table's name.
        papers: `AffineQuant`.
        models: `opt-125m` or `facebook/opt-125m`.
        methods: `OmniQuant`, `FP16`.
        schemes: `W3A16g128`, `W2*A8`.
        datasets: `wikitext2`, `piqa`.

    Raises:
        ConfigError: If a name is unknown, or nothing agrees with all of them.
    """
    found = cells()
    if table is not None:
        name = _table(table)
        found = tuple(cell for cell in found if cell.name == name)
    hub = {hub_name.lower(): model for model, hub_name in HUB_NAMES.items()}
    wanted = {
        "paper": papers,
        "model": [hub.get(model.lower(), model) for model in models],
        "method": methods,
        "scheme": schemes,
        "dataset": datasets,
    }
    for field, given in wanted.items():
        known = list(dict.fromkeys(getattr(cell, field) for cell in cells()))
        chosen = {_known(name, known, field) for name in given}
        found = tuple(cell for cell in found if not chosen or getattr(cell, field) in chosen)
    if not found:
        said = [f"{field} {', '.join(given)}" for field, given in wanted.items() if given]
        raise ConfigError(
            f"No published cell has {' and '.join([*([table] if table else []), *said])}. "
            "`qbench parity list` has all of them; name fewer things."
        )
    return list(found)


def tables(found: Iterable[Published]) -> dict[str, list[Published]]:
    """Cells by the name of their table."""
    grouped: dict[str, list[Published]] = {}
    for cell in found:
        grouped.setdefault(cell.name, []).append(cell)
    return grouped


def full_precision(cell: Published) -> Published | None:
    """What full precision scored on the same thing: in the same table, the same paper, or any."""
    same = [
        other
        for other in cells()
        if other.method == FULL_PRECISION
        and (other.model, other.dataset, other.metric) == (cell.model, cell.dataset, cell.metric)
    ]
    same.sort(key=lambda other: (other.name != cell.name, other.source != cell.source))
    return same[0] if same else None


def _table(text: str) -> str:
    names = list(tables(cells()))
    plain = {_plain(name): name for name in names}
    matching = [name for key, name in plain.items() if key.startswith(_plain(text))]
    if _plain(text) in plain:
        return plain[_plain(text)]
    if len(matching) == 1:
        return matching[0]
    raise ConfigError(
        f"{text!r} is {'the beginning of several tables' if matching else 'no published table'}."
        f"{suggest(text, names)} There are: {'; '.join(matching or names)}."
    )


def _known(name: str, known: Sequence[str], what: str) -> str:
    for candidate in known:
        if _plain(candidate) == _plain(name):
            return candidate
    raise unknown_name(f"published {what}", name, known)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9.*]+", "", text.lower())
