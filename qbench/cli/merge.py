"""`qbench merge`: the stores of several machines in one."""

from __future__ import annotations

import math

import click


@click.command()
@click.argument("folders", metavar="DIR...", nargs=-1, required=True)
@click.option("-o", "--output", metavar="DIR", required=True, help="Merged store; merged into if it exists.")
def merge(folders: tuple[str, ...], output: str) -> None:
    """Merge folders of results into one, losing nothing.

    Of records with the same id but different content the newest stands; the others go to superseded/ in the output.
    """
    from qbench.reports.merge import SUPERSEDED
    from qbench.reports.merge import merge as merge_stores

    merged = merge_stores(folders, output)
    for conflict in merged.conflicts:
        stands, *others = conflict.versions
        said = (
            "the same numbers"
            if conflict.difference == 0
            else "other metrics"
            if math.isinf(conflict.difference)
            else f"up to {100 * conflict.difference:.3g}% apart"
        )
        click.echo(
            f"{stands.method} {stands.scheme_label} of {stands.model} ({stands.id[:12]}): {len(others) + 1} versions, "
            f"{said}; that of {stands.created[:19]} stands",
            err=True,
        )
    kept = (
        f", {len(merged.conflicts)} with other versions in {output}/{SUPERSEDED}" if merged.conflicts else ""
    )
    click.echo(f"{len(merged.results)} rows in {output}{kept}")
