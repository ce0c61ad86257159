"""The command line: parse, call one function, print. Results go to stdout, everything else to stderr.

A command's module is imported when the command is used, so that `qbench --help` is instant: add a command as one line
of `COMMANDS` and one of `SUMMARIES`.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from qbench import __version__
from qbench.errors import ConfigError, QbenchError, unknown_name
from qbench.registry import Registry

COMMANDS = Registry(
    "command",
    {
        "run": "qbench.cli.run:run",
        "sweep": "qbench.cli.sweep:sweep",
        "plan": "qbench.cli.sweep:plan",
        "ablate": "qbench.cli.ablate:ablate",
        "verify": "qbench.cli.verify:verify",
        "eval": "qbench.cli.eval:evaluate",
        "compare": "qbench.cli.compare:compare",
        "export": "qbench.cli.export:export",
        "report": "qbench.cli.report:report",
        "merge": "qbench.cli.merge:merge",
        "parity": "qbench.cli.parity:parity",
        "methods": "qbench.cli.catalogue:methods",
        "models": "qbench.cli.catalogue:models",
        "bench": "qbench.cli.bench:bench",
        "check": "qbench.cli.catalogue:check",
    },
)
SUMMARIES = {
    "run": "Quantize a model by several methods and compare them.",
    "sweep": "Compute methods × schemes × models × seeds, resumable, in as few passes as possible.",
    "plan": "Predict what a sweep will cost on this machine, and whether it fits.",
    "ablate": "Measure what each switch of a method contributes and costs.",
    "verify": "Make a stored row again and report agreement.",
    "eval": "Measure any model folder as it is, and against full precision.",
    "compare": "Compare the results in one or more folders.",
    "export": "Write a row as a model folder for other programs, certified.",
    "report": "Tables and a page for papers and readers.",
    "merge": "Merge the results of several machines, losing nothing.",
    "parity": "List published numbers, run their recipes, and say which are reproduced.",
    "methods": "List the methods, or the options of one.",
    "models": "List the supported architectures and the embedded models.",
    "bench": "Time a model's linears in packed form.",
    "check": "Test that a method keeps the rules every method must keep.",
}
INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended


class _Commands(click.Group):
    """A group whose commands are imported on use, and whose errors are one sentence without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return COMMANDS.names()

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return COMMANDS.load(cmd_name) if cmd_name in COMMANDS.names() else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS.names():
            raise unknown_name("command", args[0], COMMANDS.names())
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, SUMMARIES[name]) for name in COMMANDS.names()])

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> NoReturn:
        given = list(sys.argv[1:] if args is None else args)
        arguments = [argument for argument in given if argument != "--debug"]  # allowed anywhere
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a terminal without ± or ≈ shows ? and goes on
                stream.reconfigure(errors="replace")
        try:
            if "" in given:  # a shell's unset variable: no option means anything by it
                before = given[given.index("") - 1] if given.index("") else "qbench"
                raise ConfigError(f"The argument after {before} is empty. Write its value, or leave it out.")
            extra["standalone_mode"] = False
            code = super().main(arguments or ["--help"], prog_name or "qbench", **extra)
        except (QbenchError, click.ClickException) as error:
            if "--debug" in given:
                traceback.print_exc()
            message = error.format_message() if isinstance(error, click.ClickException) else str(error)
            click.echo(
                f"Error: {' '.join(message.split())}", err=True
            )  # click lists choices in lines of their own
            sys.exit(error.exit_code)
        except click.Abort:
            click.echo("Interrupted. The same command continues after the last finished block.", err=True)
            sys.exit(INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qbench")
@click.option("--debug", is_flag=True, help="Show the traceback of an error; allowed after a command too.")
def main(debug: bool) -> None:
    """Compare post-training quantization methods for LLMs on one engine.

    `qbench run` with nothing else compares AffineQuant at W4A4 with full precision on a small embedded model.
    """
