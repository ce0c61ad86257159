"""A run for `test_reconstruct` to kill: `killed_run.py FOLDER BLOCK` says "ready" inside BLOCK and waits there."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qbench.engine.checkpoint import Checkpoint
from qbench.engine.lane import LaneResult
from qbench.engine.progress import Listener
from tests.tiny_runs import make_lane, reconstruct_lanes


class Waiting(Listener):
    """Stops for good in the middle of a block's training."""

    def __init__(self, block: int) -> None:
        self.block = block

    def epoch(self, lane: str, index: int, epoch: int, epochs: int, loss: float) -> None:
        if index == self.block:
            print("ready", flush=True)
            time.sleep(600)


def run(folder: Path | None, listener: Listener | None = None) -> LaneResult:
    """AffineQuant at W3A4 on a random model of four blocks."""
    torch.set_num_threads(1)  # sums are split by thread: equal bits need equal threads
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 96, (3, 16), generator=torch.Generator().manual_seed(1))
    checkpoint = None if folder is None else Checkpoint(folder, "killed")
    lane = make_lane(model, "affinequant", "W3A4", checkpoint, epochs=2)
    return reconstruct_lanes(model, ids, [lane], listener)[0]


if __name__ == "__main__":
    run(Path(sys.argv[1]), Waiting(int(sys.argv[2])))
