"""Write the learned parameters of a finished qbench run in the layout of the authors' programs.

    python scripts/write_authors_parameters.py RESULTS/checkpoints/omniquant-W4A4-0123456789ab --model MODEL -o DIR
    qbench run --model MODEL --method omniquant --scheme W4A4 --resume DIR/omni_parameters.pth

The checkpoint folder is that of an `omniquant` or `affinequant` row; the file is DIR/omni_parameters.pth, or
DIR/affine_parameters.pth if there are matrices. Matrices are written before the gradual mask, as theirs are: whoever
reads them needs the run's stability factor.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from qbench.engine.state import BlockState
from qbench.errors import ConfigError, QbenchError
from qbench.methods.authors import as_authors_write
from qbench.models.loading import load_model


def main(arguments: list[str] | None = None) -> Path:
    """Write the file and return where it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a folder in RESULTS/checkpoints")
    parser.add_argument("--model", required=True, help="the run's model")
    parser.add_argument("--sf", type=float, help="the run's stability factor, where there are rotations")
    parser.add_argument("-o", "--output", type=Path, default=Path("."), help="folder of the file")
    a = parser.parse_args(arguments)
    spec = load_model(a.model).spec
    try:
        count = len(json.loads((a.checkpoint / "manifest.json").read_text())["blocks"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{str(a.checkpoint)!r} is no checkpoint folder of a run ({error}).") from error
    if count != spec.n_blocks:
        raise ConfigError(
            f"{str(a.checkpoint)!r} holds {count} of {spec.n_blocks} blocks: finish the run first."
        )
    blocks = {}
    for index in range(count):
        state = BlockState.load(a.checkpoint / f"block-{index:04d}.safetensors")
        blocks[index] = as_authors_write(state.learned, spec, a.sf)
    matrices = any(
        t.dim() == 2 and n.endswith("_scale") for block in blocks.values() for n, t in block.items()
    )
    target = a.output / ("affine_parameters.pth" if matrices else "omni_parameters.pth")
    a.output.mkdir(parents=True, exist_ok=True)
    torch.save(blocks, target)
    return target


if __name__ == "__main__":
    try:
        print(main())
    except QbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
