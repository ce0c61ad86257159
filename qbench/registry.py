"""Registry: names of plugins, each imported on first use, other packages' included.

A method, architecture or command is one line `"name": "module:object"`. Nothing is imported to list names, so that
`qbench --help` stays instant; other packages add theirs through an entry-point group, without any line here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import Any

from qbench.errors import ConfigError, unknown_name


class Registry:
    """Names of one kind of thing, and where each is found."""

    def __init__(self, kind: str, builtin: Mapping[str, str], group: str | None = None) -> None:
        """Remember the names; import nothing.

        Args:
            kind: What the names stand for, as error messages say it: "method".
            builtin: Name to "module:object".
            group: Entry-point group in which installed packages register more.
        """
        self.kind = kind
        self.builtin = dict(builtin)
        self.group = group

    @functools.cached_property
    def _plugins(self) -> dict[str, list[importlib.metadata.EntryPoint]]:
        """Entry points by name, without those that repeat a built-in line (qbench's own metadata may)."""
        found: dict[str, list[importlib.metadata.EntryPoint]] = {}
        for point in importlib.metadata.entry_points(group=self.group) if self.group else ():
            targets = [self.builtin.get(point.name), *(other.value for other in found.get(point.name, []))]
            if point.value not in targets:  # one distribution can be seen twice: on sys.path and installed
                found.setdefault(point.name, []).append(point)
        return found

    def names(self) -> list[str]:
        """Every known name: built-in ones in their order, then plugins alphabetically."""
        return [*self.builtin, *sorted(set(self._plugins) - set(self.builtin))]

    def origin(self, name: str) -> str:
        """Who provides a name: "built in", or the distributions that registered it."""
        owners = ["built in"] if name in self.builtin else []
        return ", ".join(owners + [_owner(point) for point in self._plugins.get(name, [])])

    def load(self, name: str) -> Any:
        """Import what a name stands for.

        Raises:
            ConfigError: If the name is unknown, claimed twice, or its plugin cannot be imported. A built-in
                that cannot be imported is a bug, and keeps its traceback.
        """
        points = self._plugins.get(name, [])
        if name not in self.builtin and not points:
            raise unknown_name(self.kind, name, self.names())
        if len(points) + (name in self.builtin) > 1:
            raise ConfigError(
                f"The {self.kind} name {name!r} is claimed more than once ({self.origin(name)}): "
                "uninstall or rename one of them."
            )
        if name in self.builtin:
            module, _, attribute = self.builtin[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        try:
            return points[0].load()
        except Exception as error:  # a foreign package may fail in any way while it is imported
            raise ConfigError(
                f"The {self.kind} {name!r} of package {_owner(points[0])} cannot be imported from "
                f"{points[0].value!r} ({type(error).__name__}: {error}). Reinstall or remove that package."
            ) from error


def _owner(point: importlib.metadata.EntryPoint) -> str:
    return point.dist.name if point.dist else point.value
