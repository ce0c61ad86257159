"""`qbench verify ROW`: make a stored row again on this machine and say whether it stands."""

from __future__ import annotations

import json
from typing import Any

import click

# Option -> field of the request that it replaces.
ELSEWHERE = {
    "model": "model",
    "calib_dataset": "calibration.dataset",
    "evaluation": "evals.datasets",
    "device": "compute.device",
    "threads": "compute.threads",
}


@click.command()
@click.argument("row", metavar="ROW")
@click.option("--store", default="results", show_default=True, help="Folder in which an id is looked up.")
@click.option("--model", help="Where the model lies on this machine, if not where the record says.")
@click.option("--calib-dataset", help="Where the calibration text lies.")
@click.option(
    "--eval", "evaluation", multiple=True, metavar="NAME=PATH", help="Where the evaluation texts lie."
)
@click.option("--device", help="Device to compute on. Default: the record's.")
@click.option("--threads", type=int, help="CPU threads. Default: the record's.")
@click.option(
    "--format", "format_", type=click.Choice(["table", "json"]), default="table", help="Default: table."
)
def verify(row: str, store: str, format_: str, **given: Any) -> None:
    """Make a stored row again from its record and report agreement.

    ROW is a record's file, its id or the beginning of one. Compared are the contract (everything that is not the
    method), the integers and every measurement, paired item by item. Exit status 1 if the row does not stand.
    """
    from qbench import verification
    from qbench.cli.progress import listening

    stored = verification.find_row(row, store)
    overrides = {
        field: list(value) if isinstance(value, tuple) else value
        for name, field in ELSEWHERE.items()
        if (value := given[name]) not in (None, ())
    }
    with listening() as listener:
        verdict = verification.verify(stored, overrides, listener)
    if format_ == "json":
        click.echo(json.dumps(verdict.as_json(), indent=1))
    else:
        _show(verdict)
    if not verdict.agrees:
        raise SystemExit(1)


def _show(verdict: Any) -> None:
    row = verdict.row
    click.echo(f"{row.method} {row.scheme} on {row.model}, {row.id[:12]}, made {row.created[:16]}")
    if verdict.contract:
        click.echo("contract: differs")
        for name, (then, now) in verdict.contract.items():
            click.echo(f"  {name}: {then} then, {now} now")
    else:
        click.echo("contract: the same")
    for name, (then, now) in verdict.options.items():
        click.echo(f"option {name}: {then} then, {now} now")
    codes = {True: "all equal", False: "differ", None: "not in the record"}[verdict.codes]
    click.echo("integers: " + ("none, full precision" if row.is_baseline else codes))
    for check in verdict.metrics:
        now = "—" if check.now is None else f"{check.now:.6g}"
        change = "" if not check.difference else f"  difference of the mean item {check.difference:+.2g}"
        spread = "" if not check.half_width else f" ± {check.half_width:.2g}"
        click.echo(f"{check.key}: {check.then:.6g} then, {now} now{change}{spread}: {check.verdict}")
    if verdict.environment:
        click.echo("this machine differs in " + ", ".join(sorted(verdict.environment)))
    click.echo("The row stands." if verdict.agrees else "The row does not stand.")
