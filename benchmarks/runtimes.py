"""Environments of the runtimes that do not live beside current transformers, and what they compute from exports.

AutoGPTQ 0.7.1 (end of life) needs transformers 4, GPTQModel 7.6.0 pins numpy, llm-compressor 0.14 pins transformers;
each gets a virtual environment of its own. `qbench export --runtime NAME=PYTHON` then tries a folder there, through
qbench/deploy/runtime_worker.py, which needs nothing of qbench. Needs the package index; set PIP_FIND_LINKS to a folder
with the torch wheel to take that one.

    python benchmarks/runtimes.py make /tmp/runtimes
    python benchmarks/runtimes.py export /tmp/runtimes RESULTS --format gptq --method rtn --scheme W4A16g128
    python benchmarks/runtimes.py figures /tmp/runtimes WORK MODELS DATA
    python benchmarks/runtimes.py render

`make` prints the options; `export` passes everything after the folder on to `qbench export`, with those options.
`figures` makes the rows, exports, certificates and scores of docs/export.md (MODELS and DATA: folders of the reference
models and of WikiText-2), leaves out what WORK already holds, and keeps experiments/exports.json as it goes; `render`
puts them into the page.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
PAGE, DATA = REPO / "docs" / "export.md", REPO / "experiments" / "exports.json"
TORCH = "torch==2.13.0"
# Name -> packages that were installed and tried together on 2026-11-22, and the module that must import.
ENVIRONMENTS = {
    "auto-gptq": (["transformers==4.57.6", "peft==0.17.1", "auto-gptq==0.7.1", "setuptools"], "auto_gptq"),
    "gptqmodel": (
        [
            "transformers==5.23.0", "optimum==2.3.0", "gptqmodel==7.6.0", "setuptools",
            "compressed-tensors==0.20.0", "loguru==0.7.3",
        ],
        "gptqmodel",
    ),
    "llmcompressor": (["llmcompressor==0.14.0.1"], "llmcompressor"),
}  # fmt: skip
# transformers reads GPTQ where optimum and gptqmodel are installed, compressed-tensors where that is
RUNTIMES = {"auto-gptq": "auto-gptq", "gptqmodel": "gptqmodel", "transformers": "gptqmodel"}


def make(folder: Path) -> None:
    """Create the environments that are missing."""
    uv = shutil.which("uv")
    links = os.environ.get("PIP_FIND_LINKS", "").split()
    local = [wheel for link in links for wheel in Path(link).glob("torch-2.13.0*.whl")]
    torch = str(local[0]) if local else TORCH
    for name, (packages, module) in ENVIRONMENTS.items():
        python = folder / name / "bin" / "python"
        if not python.exists():
            if uv:
                subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(folder / name)], check=True)
                install = [uv, "pip", "install", "-q", "--python", str(python)]
            else:
                subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
                install = [str(python), "-m", "pip", "install", "-q"]
            subprocess.run([*install, torch, *packages], check=True)
        subprocess.run(
            [str(python), "-I", "-c", f"import importlib.util as u; assert u.find_spec('{module}')"],
            check=True,
        )
    print(" ".join(options(folder)))


def options(folder: Path) -> list[str]:
    """`--runtime` options for `qbench export`."""
    return [
        part
        for name, environment in RUNTIMES.items()
        for part in ("--runtime", f"{name}={folder / environment / 'bin' / 'python'}")
    ]


MODELS = {"llama": "ref-llama-14m", "opt": "ref-opt-14m"}
# Of AffineQuant what a folder can hold: no matrix behind a norm, and no shift behind an RMSNorm.
FOLDED = {"llama": ["--no-use-ln-matrix", "--no-shift"], "opt": ["--no-use-ln-matrix"]}
WEIGHTS = ("W4A16g128", "W3A16g128", "W2A16g64")
# Results folder -> methods and options, schemes, formats.
ROWS: dict[str, tuple[str, list[str], tuple[str, ...], tuple[str, ...]]] = {
    f"{name}{suffix}": row
    for name in MODELS
    for suffix, row in {
        "": ("affinequant", [*FOLDED[name], "--epochs", "2"], WEIGHTS, ("gptq", "compressed-tensors")),
        "-8": ("rtn", [], ("W8A8KV16", "W8A8"), ("compressed-tensors",)),
    }.items()
}
FORMATS = ("gptq", "awq", "compressed-tensors")
MORE = {("llama", "W4A16g128"): ("awq",)}
LIMIT = ["--limit", "40", "--threads", "1"]


def qbench(*arguments: str) -> int:
    """One command in this process; its exit code."""
    from qbench.cli import main as command

    print("$ qbench", *arguments, file=sys.stderr, flush=True)
    try:
        command(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def figures(environments: Path, work: Path, models: Path, data: Path) -> None:
    """Everything that the page's tables show and WORK does not hold."""
    for writer in WRITERS:
        _foreign(writer, environments, work, models, data)
        _keep(work)
    for name, (method, given, schemes, formats) in ROWS.items():
        results, model = work / name, models / MODELS[name.removesuffix("-8")]
        evaluation = ["--eval", f"wikitext2={data / 'wiki.test.joined.txt'}", *LIMIT]
        calibration = ["--calib-dataset", str(data / "wiki.train.raw.first1MB.txt"), "--nsamples", "16"]
        found = {row.scheme: row for row in _rows(results)}
        if missing := [scheme for scheme in schemes if scheme not in found]:
            wanted = [part for scheme in missing for part in ("--scheme", scheme)]
            qbench("run", "--model", str(model), "--method", method, *wanted, *given, *calibration,
                   "--seqlen", "512", *evaluation, "-o", str(results))  # fmt: skip
        for scheme in schemes:
            for format_ in (*formats, *MORE.get((name, scheme), ())):
                row = next(row for row in _rows(results) if row.scheme == scheme)
                if not any(c.format == format_ for c in row.certificates):
                    qbench(
                        "export",
                        str(results),
                        "--scheme",
                        scheme,
                        "--format",
                        format_,
                        *options(environments),
                    )
                    row = next(row for row in _rows(results) if row.scheme == scheme)
                (certificate,) = (c for c in row.certificates if c.format == format_)
                scored = work / "scored" / f"{name}-{scheme}-{format_}"
                if not _rows(scored):
                    folder = results / "exports" / format_ / certificate.folder
                    qbench("eval", str(folder), "--seqlen", "512", *evaluation, "-o", str(scored))
                _keep(work)
    if not (found := work / "arithmetic.json").exists():
        found.write_text(json.dumps(_arithmetic(environments, work, models, data)))
    _keep(work)


def _rows(folder: Path) -> list[Any]:
    from qbench.results import ResultStore

    return list(ResultStore(folder).load_all()) if folder.is_dir() else []


# Who writes a folder of its own -> its environment, and the runtime that reads it back.
WRITERS = {
    "gptqmodel W4A16g128-sym act-order": ("gptqmodel", "gptqmodel"),
    "llmcompressor GPTQ W4A16g128": ("llmcompressor", "transformers"),
    "llmcompressor RTN W8A8": ("llmcompressor", "transformers"),
}


def _foreign(writer: str, environments: Path, work: Path, models: Path, data: Path) -> None:
    """A folder that another program writes: scored by `qbench eval`, and logits beside those of its own runtime."""
    folder = work / "foreign" / writer.replace(" ", "-")
    environment, runtime = WRITERS[writer]
    if not (folder / "config.json").exists():
        worker = REPO / "benchmarks" / "foreign_folder.py"
        python = environments / environment / "bin" / "python"
        text = data / "wiki.train.raw.first1MB.txt"
        command = [python, "-I", worker, writer, models / MODELS["llama"], text, folder]
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    scored = work / "scored" / folder.name
    if not _rows(scored):
        evaluation = f"wikitext2={data / 'wiki.test.joined.txt'}"
        qbench("eval", str(folder), "--seqlen", "512", "--eval", evaluation, *LIMIT, "-o", str(scored))
    if not (scored / "runtime" / "figures.json").exists():
        python = environments / RUNTIMES[runtime] / "bin" / "python"
        found = _beside(folder, runtime, python, data)
        (scored / "runtime").mkdir(exist_ok=True)
        (scored / "runtime" / "figures.json").write_text(json.dumps(found))


def _probe(folder: Path, data: Path) -> tuple[Any, Any]:
    """A folder's model as qbench reads it, and the tokens [windows, tokens] of the certificates' probe."""
    from qbench.deploy.certificate import choose_probe
    from qbench.evaluate import scored_text
    from qbench.models.loading import load_model

    loaded = load_model(str(folder))
    text = scored_text(f"wikitext2={data / 'wiki.test.joined.txt'}", loaded.tokenizer, 512)
    return loaded, choose_probe(text.windows.ids, text.name, loaded.model.config.vocab_size).ids


def _logits(model: Any, ids: Any) -> Any:
    import torch

    with torch.no_grad():
        return torch.stack([model(input_ids=window[None]).logits[0].float() for window in ids])


def _beside(folder: Path, runtime: str, python: Path, data: Path, prepare: Any = None) -> dict[str, Any]:
    """What the runtime computes from a folder, against qbench's own reader; `prepare` may change the reader's model."""
    import torch
    from safetensors.torch import load_file, save_file

    from qbench.deploy import certificate

    loaded, ids = _probe(folder, data)
    if prepare is not None:
        prepare(loaded)
    expected = _logits(loaded.model, ids)
    worker = REPO / "qbench" / "deploy" / "runtime_worker.py"
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        role, (_, width) = next(iter(loaded.spec.shapes.items()))
        linear = f"{loaded.architecture.blocks}.0.{loaded.spec.linears[role]}"
        asked = {
            "ids": ids.contiguous(), f"width.{linear}": torch.tensor(width), f"input.{width}": torch.ones(1, width)
        }  # fmt: skip
        save_file(asked, place / "probe.safetensors")
        request = {
            "runtime": runtime, "folder": str(folder.resolve()), "dtype": "float32", "threads": 1,
            "probe": str(place / "probe.safetensors"), "answer": str(place / "answer.safetensors"),
            "blocks": loaded.architecture.blocks, "linears": [linear],
        }  # fmt: skip
        (place / "request.json").write_text(json.dumps(request))
        done = subprocess.run(
            [str(python), "-I", str(worker), str(place / "request.json")],
            capture_output=True,
            text=True,
            check=True,
        )
        reply = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
        if "error" in reply:
            return reply
        found = load_file(place / "answer.safetensors")["logits"]
    return {"runtime": runtime, **reply, **certificate.figures(found, expected, ids)}


def _arithmetic(environments: Path, work: Path, models: Path, data: Path) -> list[dict[str, Any]]:
    """What types and orders of operations do by themselves, with nothing exported wrongly."""
    import torch
    from transformers import AutoModelForCausalLM

    from qbench.deploy.certificate import figures

    rows = []
    for name, folder in MODELS.items():
        loaded, ids = _probe(models / folder, data)
        exact = _logits(loaded.model, ids)
        for dtype in (torch.float16, torch.bfloat16):
            for attention in ("sdpa", "eager"):
                model = AutoModelForCausalLM.from_pretrained(
                    models / folder, dtype=dtype, attn_implementation=attention
                )
                found = _logits(model.eval(), ids)
                what = f"unquantized in {str(dtype).removeprefix('torch.')}, {attention} attention"
                rows.append({"model": folder, "what": what, "beside": "unquantized in float32"})
                if bool(found.isfinite().all()):
                    rows[-1] |= figures(found, exact, ids)
        export = next((work / f"{name}-8" / "exports" / "compressed-tensors").glob("*W8A8KV16"))
        loaded, _ = _probe(export, data)
        table = _logits(loaded.model, ids)
        _round_as_runtimes(loaded)
        rows.append(
            {"model": folder, "what": "W8A8KV16, zero points added before rounding", "beside": "after it"}
        )
        rows[-1] |= figures(_logits(loaded.model, ids), table, ids)
        if name == "opt":
            python = environments / RUNTIMES["transformers"] / "bin" / "python"
            what = "W8A8KV16 in transformers"
            beside = "zero points added before rounding, one range for all tokens of two-dimensional inputs"
            found = _beside(
                export, "transformers", python, data, lambda loaded: _round_as_runtimes(loaded, True)
            )
            rows.append({"model": folder, "what": what, "beside": beside, **found})
    return rows


def _round_as_runtimes(loaded: Any, flat_as_one: bool = False) -> None:
    """Round inputs of linears as compressed-tensors 0.20.0 does; also where it takes two dimensions for one token."""
    from qbench.deploy.compressed import round_inputs

    def rounded(module: Any, args: Any) -> Any:
        x = args[0]
        whole = flat_as_one and x.ndim == 2
        return round_inputs(x.reshape(1, -1), 8).reshape(x.shape) if whole else round_inputs(x, 8)

    for block in loaded.blocks:
        for path in loaded.spec.linears.values():
            linear = block.get_submodule(path)
            linear._forward_pre_hooks.clear()
            linear.register_forward_pre_hook(rounded)


def _keep(work: Path) -> None:
    """Write experiments/exports.json from what WORK holds so far."""
    exports, foreign = [], []
    for name, (_, _, schemes, formats) in ROWS.items():
        for row in _rows(work / name):
            for certificate in row.certificates:
                wanted = (*formats, *MORE.get((name, row.scheme), ()))
                if row.scheme not in schemes or certificate.format not in wanted:
                    continue
                scored = _rows(work / "scored" / f"{name}-{row.scheme}-{certificate.format}")
                exports.append(
                    {
                        "model": MODELS[name.removesuffix("-8")],
                        "method": row.method,
                        "scheme": row.scheme,
                        "bits_per_weight": row.bits_per_weight,
                        "perplexity": row.metrics["wikitext2/perplexity"].value,
                        "reloaded": scored[0].metrics["wikitext2/perplexity"].value if scored else None,
                        "certificate": certificate.model_dump(mode="json"),
                    }
                )
    for writer in WRITERS:
        scored = work / "scored" / writer.replace(" ", "-")
        compared = scored / "runtime" / "figures.json"
        if rows := _rows(scored):
            foreign.append(
                {
                    "writer": writer,
                    "perplexity": rows[0].metrics["wikitext2/perplexity"].value,
                    "beside": json.loads(compared.read_text()) if compared.exists() else None,
                }
            )
    order = {(name, s): i for i, (name, s) in enumerate((MODELS[n.removesuffix("-8")], s)
                                                       for n, row in ROWS.items() for s in row[2])}  # fmt: skip
    exports.sort(key=lambda e: (order[e["model"], e["scheme"]], FORMATS.index(e["certificate"]["format"])))
    for row in _rows(work / "llama"):
        if row.is_baseline:
            written = {
                "writer": "nobody: full precision",
                "perplexity": row.metrics["wikitext2/perplexity"].value,
            }
            foreign.insert(0, {**written, "beside": None})
    alone = work / "arithmetic.json"
    kept = {"exports": exports, "foreign": foreign}
    kept["arithmetic"] = json.loads(alone.read_text()) if alone.exists() else []
    DATA.write_text(json.dumps(kept, indent=1) + "\n")


def render() -> None:
    """Replace the page's parts between marks by tables of experiments/exports.json."""
    kept, page = json.loads(DATA.read_text()), PAGE.read_text()
    for name, lines in {
        "figures": _figures(kept["exports"]),
        "sizes": _sizes(kept["exports"]),
        "foreign": _others(kept["foreign"]),
        "arithmetic": _alone(kept["arithmetic"]),
    }.items():
        begin, end = f"<!-- exports: {name} -->", f"<!-- end of exports: {name} -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n\n" + "\n".join(lines) + f"\n\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(page)


def _figures(exports: list[dict[str, Any]]) -> Iterator[str]:
    yield from _head(
        "model, row", "table → re-loaded", "format", "runtime (computes in)", "KL, nats/token", "top-1",
        "perplexity on the probe: reference → runtime", "verdict",
    )  # fmt: skip
    for e in exports:
        c = e["certificate"]
        reloaded = "—" if e["reloaded"] is None else f"{e['reloaded']:.3f}"
        label = f"{e['model']}, {e['method']} {e['scheme']} | {e['perplexity']:.3f} → {reloaded} | {_form(c)}"
        for check in c["checks"]:
            yield f"| {label} | {check['runtime']} ({check['dtype']}) | {_of(check, c)} |"
            label = " | | "


def _head(*columns: str) -> Iterator[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)


def _form(certificate: dict[str, Any]) -> str:
    second = any("gptq_v2" in note for note in certificate["notes"])
    return certificate["format"] + (" v2" if second else " v1" if certificate["format"] == "gptq" else "")


def _of(check: dict[str, Any], certificate: dict[str, Any]) -> str:
    verdict = "verified" if check["verified"] else f"FAILED at {check['failed_at'].partition(' (')[0]}"
    if check.get("kl_mean") is None:
        return f"— | — | — | {verdict}"
    reference = check.get("reference_perplexity") or certificate["reference_perplexity"]
    ppl = f"{reference:.3f} → {check['perplexity']:.3f}"
    return f"{check['kl_mean']:.1e} | {check['top1_agreement']:.2%} | {ppl} | {verdict}"


def _sizes(exports: list[dict[str, Any]]) -> Iterator[str]:
    yield from _head(
        "export", "bits per weight", "bytes by the table's bits", "weights", "off by", "bookkeeping", "norms, biases",
        "embeddings, head", "files", "files by the table's bits", "off by",
    )  # fmt: skip
    for e in exports:
        b = e["certificate"]["bytes"]
        rest = b["norms_and_biases"] + b["embeddings_and_head"]
        yield (
            f"| {e['model']} {e['method']} {e['scheme']} {e['certificate']['format']} | {e['bits_per_weight']:.3f} | "
            f"{b['expected']:,} | {b['weights']:,} | {b['weights'] / b['expected'] - 1:+.2%} | {b['bookkeeping']:,} | "
            f"{b['norms_and_biases']:,} | {b['embeddings_and_head']:,} | {b['files']:,} | {b['expected'] + rest:,} | "
            f"{b['files'] / (b['expected'] + rest) - 1:+.2%} |"
        )


def _alone(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield from _head("model", "what", "beside", "KL, nats/token", "top-1", "perplexity on the probe")
    for r in rows:
        numbers = "not finite | — | —"
        if "perplexity" in r:
            numbers = f"{r['kl_mean']:.1e} | {r['top1_agreement']:.2%} | {r['perplexity']:.3f}"
        yield f"| {r['model']} | {r['what']} | {r['beside']} | {numbers} |"


def _others(foreign: list[dict[str, Any]]) -> Iterator[str]:
    yield from _head(
        "folder written by", "`qbench eval`", "its own runtime (computes in)", "KL, nats/token", "top-1",
        "perplexity on the probe",
    )  # fmt: skip
    for f in foreign:
        beside = f["beside"] or {}
        if "kl_mean" not in beside:
            yield f"| {f['writer']} | {f['perplexity']:.3f} | {beside.get('error', '—')} | — | — | — |"
            continue
        yield (
            f"| {f['writer']} | {f['perplexity']:.3f} | {beside['runtime']} ({beside['dtype']}) | "
            f"{beside['kl_mean']:.1e} | {beside['top1_agreement']:.2%} | {beside['perplexity']:.3f} |"
        )


def main(arguments: list[str]) -> int:
    """Do what the first argument says."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command == "render":
        render()
    elif command == "figures" and len(rest) == 4:
        figures(*map(Path, rest))
    elif command == "make" and len(rest) == 1:
        make(Path(rest[0]))
    elif command == "export" and rest:
        return qbench("export", *rest[1:], *options(Path(rest[0])))
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    sys.exit(main(sys.argv[1:]))
