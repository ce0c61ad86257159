"""`qbench eval`: options into one ScoreConfig, handed to the scorer; prints what `qbench run` prints."""

from __future__ import annotations

from typing import Any

import click

from qbench.cli.options import CONFIG_OPTIONS, Command, config_option, file_option, fill, format_option, put
from qbench.config import ScoreConfig, read_mapping, validated
from qbench.errors import ConfigError

OPTIONS: dict[str, list[tuple[str, str]]] = {
    "Model": [
        ("--revision", "revision"),
        ("--trust-remote-code", "trust_remote_code"),
        ("--dtype", "compute.model_dtype"),
        ("--fidelity-to --base", "fidelity_to"),
    ],
    "Evaluation": [
        (f"--seqlen --seq-len {flags}", path) if path == "evals.seq_len" else (flags, path)
        for flags, path in CONFIG_OPTIONS["Evaluation"]
    ],
    "Computation": [("--device", "compute.device"), ("--threads", "compute.threads")],
    "Output": [("--output -o --output-dir", "output"), ("--restart", "restart")],
}


def _eval(model: str | None, config: str | None, format_: str, **given: Any) -> None:
    """Measure any model as it is: full precision, exported by qbench, or quantized by somebody else.

    MODEL is a folder, a hub name or an embedded model that transformers loads. With --fidelity-to, the full-precision
    model it was made from is measured too: recovery, and KL divergence and top-1 agreement unless only --generate is
    asked for. The rows go to the output folder, for `qbench compare`.
    """
    request = read_mapping(config) if config else {}
    if model is not None:
        request["model"] = model
    fill(request, given, (path for rows in OPTIONS.values() for _, path in rows))
    if request.get("fidelity_to") and not given["evals__generate"]:
        put(request, "evals.fidelity", True)
    if "model" not in request:
        raise ConfigError(
            "No model to measure: give a folder, a hub name or an embedded model, or --config FILE."
        )
    resolved = validated(ScoreConfig, request, "the evaluation's configuration")

    from qbench import scoring
    from qbench.cli.compare import echo_generations, show
    from qbench.cli.progress import listening
    from qbench.reports.comparison import compare

    with listening() as listener:
        results = scoring.score_model(resolved, listener)
    echo_generations(results)
    show(compare(results, allow_mixed=True), format_)


evaluate = Command(
    "eval",
    _eval,
    [
        click.Argument(["model"], required=False),
        *(
            config_option(title, flags, path, ScoreConfig)
            for title, rows in OPTIONS.items()
            for flags, path in rows
        ),
        format_option(),
        file_option(),
    ],
)
