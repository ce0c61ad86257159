"""Train the embedded default models, tiny-llama and tiny-opt, on the standard library's own text.

A model that ships inside the package must be small, free of other people's licences and yet good enough that
quantization visibly hurts it. This script makes it from what every Python has: it trains a byte-level BPE
tokenizer and both models on the `train` split (qbench.data.stdlib), chooses the checkpoint by the loss on
modules held out of that split, gives it the activation outliers of large models without changing its function
(qbench.models.outliers), measures the result and writes the folder with its card.

    python scripts/train_tiny.py --text-dump stdlib.json.gz --output qbench/assets     # writes the dump, if
    not there

A dump lets another machine, with another Python, train on exactly the same text. A try on a CPU:

    python scripts/train_tiny.py --steps 20 --eval-windows 8 --device cpu --output tiny-try
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import platform
import shlex
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from qbench.data import stdlib
from qbench.evals.perplexity import PerplexityResult, perplexity
from qbench.models.outliers import TARGETS, add_outliers, channel_absmax, outlier_ratios

SEQ_LEN = 512
VOCAB = 3072
SPECIAL = ["<pad>", "<s>", "</s>"]
PAD, BOS, EOS = range(3)
HELD_OUT_PERCENT = 4
LIMIT_BYTES = 8_000_000
SHAPES = {
    "tiny-llama": "LLaMA (RMSNorm, RoPE, SwiGLU of width 640)",
    "tiny-opt": "OPT (LayerNorm before, learned positions, ReLU of width 896)",
}
CARD_HEADER = """---
library_name: transformers
license: psf-2.0
language: en
pipeline_tag: text-generation
---
"""


@dataclass(frozen=True)
class Recipe:
    """What differs between the two models."""

    learning_rate: float
    steps: int
    seed: int


RECIPES = {"tiny-llama": Recipe(4e-3, 5000, 1), "tiny-opt": Recipe(3e-3, 5000, 2)}


@dataclass(frozen=True)
class Corpus:
    """The text of all splits, and where it came from."""

    python: str
    train: list[tuple[str, str]]  # (module, text): what every installation has
    tests: list[tuple[str, str]]  # the library's test suite: more training text
    calibration: str
    evaluation: str

    @property
    def fingerprint(self) -> str:
        """Hash of everything, order included."""
        content = [self.train, self.tests, self.calibration, self.evaluation]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class Streams:
    """Token ids on the training device."""

    train: Tensor  # [n]
    held_out: Tensor  # [windows, SEQ_LEN + 1]
    calibration: Tensor  # [windows, SEQ_LEN]
    evaluation: Tensor  # [windows, SEQ_LEN]


def main() -> None:
    """Parse the arguments, get the text and the tokenizer, make the models asked for."""
    args = parse_arguments()
    torch.set_float32_matmul_precision("high")
    corpus = read_corpus(args.text_dump)
    characters = {name: sum(len(text) for _, text in getattr(corpus, name)) for name in ("train", "tests")}
    log(
        f"corpus {corpus.fingerprint[:16]} (Python {corpus.python}): characters: "
        f"train {characters['train']:,} + test suite {characters['tests']:,}, "
        f"calibration {len(corpus.calibration):,}, evaluation {len(corpus.evaluation):,}"
    )
    if args.dump_only:
        return
    tokenizer = train_tokenizer(corpus)
    if args.tokenizer_only:
        for name in args.models:
            save_tokenizer(tokenizer, args.output / name)
        return
    streams = tokenize(corpus, tokenizer, torch.device(args.device))
    for name in args.models:
        make_model(name, args, corpus, tokenizer, streams)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("qbench/assets"), help="folder that gets one per model"
    )
    parser.add_argument("--models", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument(
        "--text-dump", type=Path, help="corpus file (.json.gz): read if it exists, else written"
    )
    parser.add_argument("--dump-only", action="store_true", help="stop after writing the corpus file")
    parser.add_argument("--tokenizer-only", action="store_true", help="stop after saving the tokenizer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")
    parser.add_argument(
        "--max-seconds", type=float, default=math.inf, help="per model; the schedule ends with it"
    )
    parser.add_argument("--batch-size", type=int, help="windows of 512 per step (default: 64; 4 on a CPU)")
    parser.add_argument("--learning-rate", type=float, help="peak (default: the recipe's)")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument(
        "--dropout", type=float, default=0.05, help="on the embeddings and each residual branch"
    )
    parser.add_argument("--eval-every", type=int, default=250, help="steps between held-out losses")
    parser.add_argument("--eval-windows", type=int, help="evaluation windows for the card (default: all)")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    args = parser.parse_args()
    if args.batch_size is None:
        args.batch_size = 4 if args.device == "cpu" else 64
    return args


# Text and tokens


def read_corpus(dump: Path | None) -> Corpus:
    """Read the corpus from the dump, or from the running interpreter, writing the dump if one is named."""
    if dump is not None and dump.exists():
        with gzip.open(dump, "rt", encoding="utf-8") as file:
            return Corpus(**json.load(file))
    corpus = Corpus(
        python=platform.python_version(),
        train=[(document.name, document.text) for document in stdlib.documents("train")],
        tests=[(document.name, document.text) for document in stdlib.test_suite_documents()],
        calibration=stdlib.text("calibration"),
        evaluation=stdlib.text("evaluation"),
    )
    if dump is not None:
        dump.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(dump, "wt", encoding="utf-8", compresslevel=6) as file:
            json.dump(vars(corpus), file)
    return corpus


def is_held_out(module: str) -> bool:
    """Say whether a training module is kept aside to choose the checkpoint: a family always as a whole."""
    digest = hashlib.sha256(f"held-out-32:{stdlib.family(module)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def train_tokenizer(corpus: Corpus) -> tokenizers.Tokenizer:
    """Train a byte-level BPE tokenizer on the training modules; tests would waste tokens on assertions."""
    start = time.perf_counter()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for module, text in corpus.train if not is_held_out(module)]
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCAB, f"the corpus gives only {tokenizer.get_vocab_size()} tokens"
    log(f"tokenizer of {VOCAB} tokens trained in {time.perf_counter() - start:.1f} s")
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, readable by any version of transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": SEQ_LEN,
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "pad_token": SPECIAL[PAD],
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config)


def tokenize(corpus: Corpus, tokenizer: tokenizers.Tokenizer, device: torch.device) -> Streams:
    """Tokenize every split; training documents one by one, with the separator that joins the other texts."""
    start = time.perf_counter()
    separator = tokenizer.encode(stdlib.SEPARATOR).ids

    def stream(documents: list[tuple[str, str]]) -> Tensor:
        ids = [
            encoding.ids + separator for encoding in tokenizer.encode_batch([text for _, text in documents])
        ]
        return torch.tensor([token for document in ids for token in document], dtype=torch.int64)

    held_out = stream([document for document in corpus.train if is_held_out(document[0])])
    kept = stream([document for document in corpus.train if not is_held_out(document[0])])
    # A test of a held-out module would tell about it, as would the name of its package.
    tests = [d for d in corpus.tests if not is_held_out(d[0].removeprefix("test.").removeprefix("test_"))]
    tests_stream = stream(tests)
    calibration = stream([("calibration", corpus.calibration)])
    evaluation = stream([("evaluation", corpus.evaluation)])
    log(
        f"tokens in {time.perf_counter() - start:.1f} s: "
        f"train {len(kept):,} + test suite {len(tests_stream):,}, "
        f"held out {len(held_out):,}, calibration {len(calibration):,}, evaluation {len(evaluation):,}; "
        f"{len(corpus.evaluation) / len(evaluation):.2f} characters per evaluation token"
    )
    return Streams(
        train=torch.cat([kept, tests_stream]).to(device),
        held_out=cut(held_out, SEQ_LEN + 1)[:256].to(device),
        calibration=cut(calibration, SEQ_LEN).to(device),
        evaluation=cut(evaluation, SEQ_LEN).to(device),
    )


def cut(stream: Tensor, width: int) -> Tensor:
    """Cut a stream into rows, dropping the last partial one."""
    return stream[: len(stream) // width * width].view(-1, width)


# Model and training


def build_model(name: str, seed: int) -> transformers.PreTrainedModel:
    """Build the untrained model. Its size is what 8 MB of fp16 allow beside the tokenizer."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": SEQ_LEN,
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    if name == "tiny-llama":
        config = transformers.LlamaConfig(intermediate_size=640, num_key_value_heads=4, head_dim=64, **common)
        return transformers.LlamaForCausalLM(config)
    config = transformers.OPTConfig(
        ffn_dim=896,
        word_embed_proj_dim=256,
        do_layer_norm_before=True,
        activation_function="relu",
        dropout=0.0,
        attention_dropout=0.0,
        **common,
    )
    return transformers.OPTForCausalLM(config)


def add_dropout(model: transformers.PreTrainedModel, p: float) -> list[Any]:
    """Drop from the embeddings and from what each branch adds to the residual stream, in either model."""
    ends = ("o_proj", "down_proj", "out_proj", "fc2", "embed_tokens")
    modules = [module for path, module in model.named_modules() if path.rpartition(".")[2] in ends]

    def drop(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return F.dropout(output, p, module.training)

    return [module.register_forward_hook(drop) for module in modules] if p > 0 else []


def train(
    model: transformers.PreTrainedModel, streams: Streams, recipe: Recipe, args: argparse.Namespace
) -> dict[str, float]:
    """Train with AdamW and a cosine schedule; leave the checkpoint with the best held-out loss in the model.

    The schedule ends with the steps or with the time budget, whichever comes first, and an interruption
    (Ctrl-C) keeps what is best so far.
    """
    device = streams.train.device
    model.to(device).train()
    handles = add_dropout(model, args.dropout)
    forward = torch.compile(model) if args.compile else model
    steps = args.steps or recipe.steps
    peak = args.learning_rate or recipe.learning_rate
    warmup = max(1, min(200, steps // 10))
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    batches = epochs_of_batches(streams.train, args.batch_size, generator)
    best_loss, best_state, best_step, last_loss = math.inf, None, 0, math.nan
    step, start, seen = 0, time.perf_counter(), 0
    running: list[Tensor] = []
    try:
        while step < steps:
            progress = max(step / steps, (time.perf_counter() - start) / args.max_seconds)
            if progress >= 1:
                break
            rate = (
                peak
                * min(1.0, (step + 1) / warmup)
                * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = next(batches)
            loss = next_token_loss(forward, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            running.append(loss.detach())
            step += 1
            seen += batch[:, 1:].numel()
            if step % args.eval_every == 0 or step == steps:
                last_loss = held_out_loss(model, streams.held_out)
                mean = torch.stack(running).mean().item()
                running.clear()
                elapsed = time.perf_counter() - start
                log(
                    f"  step {step}/{steps}  loss {mean:.4f}  held-out {last_loss:.4f}  lr {rate:.2e}  "
                    f"{elapsed:.0f} s  {seen / elapsed / 1e6:.2f} M tokens/s  "
                    f"epoch {seen / len(streams.train):.1f}"
                )
                if not math.isfinite(mean):
                    raise SystemExit(
                        f"training diverged before step {step}: lower --learning-rate (now {peak})"
                    )
                if last_loss < best_loss:
                    best_loss, best_step = last_loss, step
                    best_state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    except KeyboardInterrupt:
        log("  interrupted: going on with the best checkpoint")
    last_loss = held_out_loss(model, streams.held_out)
    if last_loss < best_loss or best_state is None:
        best_loss, best_step = last_loss, step
    else:
        model.load_state_dict(best_state)
    for handle in handles:
        handle.remove()
    model.eval()
    seconds = time.perf_counter() - start
    log(f"  best held-out loss {best_loss:.4f} at step {best_step} of {step}; {seconds:.0f} s")
    return {
        "steps": step,
        "best_step": best_step,
        "held_out_loss": best_loss,
        "seconds": seconds,
        "tokens_seen": seen,
        "epochs": seen / len(streams.train),
        "learning_rate": peak,
    }


def epochs_of_batches(stream: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches of windows for ever; every epoch cuts the stream at another offset and shuffles."""
    width = SEQ_LEN + 1
    while True:
        offset = int(torch.randint(SEQ_LEN, (1,), generator=generator))
        count = (len(stream) - offset - 1) // SEQ_LEN
        order = torch.randperm(count, generator=generator)
        starts = (offset + order * SEQ_LEN).to(stream.device)
        columns = torch.arange(width, device=stream.device)
        for i in range(0, count - batch_size + 1, batch_size):
            yield stream[starts[i : i + batch_size, None] + columns]


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy; bf16 autocast on a GPU."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.device.type == "cuda"):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, windows: Tensor) -> float:
    """Mean loss on the modules held out of training."""
    model.eval()
    losses = [next_token_loss(model, batch) * len(batch) for batch in windows.split(32)]
    model.train()
    return (torch.stack(losses).sum() / len(windows)).item()


# Outliers, measurements, folder


def make_model(
    name: str, args: argparse.Namespace, corpus: Corpus, tokenizer: tokenizers.Tokenizer, streams: Streams
) -> None:
    """Train one model, give it outliers, check it, measure it and write its folder."""
    recipe = RECIPES[name]
    folder = args.output / name
    model = build_model(name, recipe.seed)
    log(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    training = train(model, streams, recipe, args)

    model = model.to("cpu").eval()
    with (
        torch.no_grad()
    ):  # what is measured below is measured on what is shipped; not .half(), which rounds RoPE too
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    before_stats = outlier_ratios(channel_absmax(model, streams.calibration[:32].cpu()))
    probe = streams.evaluation[:2].cpu()
    before = logits64(model, probe)
    add_outliers(model, streams.calibration[:32].cpu(), recipe.seed)
    difference = ((logits64(model, probe) - before).abs().max() / before.abs().max()).item()
    assert difference < 1e-9, (
        f"the rescaling changed the function: relative logit difference {difference:.2e}"
    )
    model = model.float()
    after_stats = outlier_ratios(channel_absmax(model, streams.calibration[:32].cpu()))

    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    model.half().save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stored = logits64(loaded, probe)
    stored_difference = ((stored - before).abs().max() / before.abs().max()).item()
    result = perplexity(loaded.to(args.device), streams.evaluation[: args.eval_windows], batch_size=16)
    statistics = before_stats, after_stats, difference, stored_difference
    write_card(folder, name, args, corpus, streams, training, result, *statistics)
    size = sum(path.stat().st_size for path in folder.iterdir())
    log(
        f"{name}: evaluation perplexity {result.value:.3f} +- {result.stderr or 0:.3f} "
        f"({len(result.window_nll)} windows of {SEQ_LEN}); "
        f"outliers {summary(before_stats)} -> {summary(after_stats)}; "
        f"logits moved {difference:.1e} (stored fp16 {stored_difference:.1e}); {size:,} bytes in {folder}"
    )
    if size > LIMIT_BYTES:
        raise SystemExit(
            f"{folder} has {size:,} bytes, more than {LIMIT_BYTES:,}: shrink the vocabulary or the MLP."
        )


@torch.no_grad()
def logits64(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits with weights and arithmetic in float64; the model comes back in float64."""
    return model.double()(input_ids=ids, use_cache=False).logits


def summary(ratios: dict[str, float]) -> str:
    """Smallest, median and largest ratio."""
    values = sorted(ratios.values())
    return f"{values[0]:.0f}-{values[-1]:.0f}x (median {values[len(values) // 2]:.0f}x)"


def write_card(
    folder: Path,
    name: str,
    args: argparse.Namespace,
    corpus: Corpus,
    streams: Streams,
    training: dict[str, float],
    result: PerplexityResult,
    before: dict[str, float],
    after: dict[str, float],
    difference: float,
    stored_difference: float,
) -> None:
    """Write README.md from what was measured."""
    kinds: dict[str, list[str]] = {}
    for linear in after:
        kinds.setdefault(linear.rpartition(".")[2], []).append(linear)
    rows = [
        f"| {kind} | {summary({n: before[n] for n in names})} | {summary({n: after[n] for n in names})} |"
        for kind, names in kinds.items()
    ]
    targets = "; ".join(f"{s}: {t.channels} channels, {t.low:g} to {t.high:g}x" for s, t in TARGETS.items())
    optimizer = (
        f"AdamW (0.9, 0.95), weight decay {args.weight_decay:g}, dropout {args.dropout:g}, batch "
        f"{args.batch_size} x {SEQ_LEN}, peak learning rate {training['learning_rate']:g}, cosine schedule, "
        f"{training['steps']:,} steps ({training['epochs']:.1f} epochs, {training['seconds']:.0f} s on "
        f"{device_name(args.device)}, torch {torch.__version__})"
    )
    scored = (
        f"{len(result.window_nll)} windows of {SEQ_LEN}, not overlapping, fp16 weights, float32 arithmetic"
    )
    paragraphs = [
        f"# {name}",
        f"The embedded default model of qbench: {SHAPES[name]}, 4 blocks of width 256, 4 heads, vocabulary "
        f"{VOCAB}, context {SEQ_LEN}, tied embeddings, fp16. It exists so that quantization methods can be "
        "compared with no network and no GPU; it is of no other use.",
        "## How it was made",
        f"    {shlex.join(['python', *sys.argv])}",
        f"**Text.** The sources and language reference of Python {corpus.python}'s standard library, split "
        "by module name (`qbench.data.stdlib`); no evaluation or calibration module was seen in training. "
        f"Training text: {len(streams.train):,} tokens, the library's test suite included (without the tests "
        f"of held-out modules). Corpus fingerprint `{corpus.fingerprint}`.",
        "**Tokenizer.** Byte-level BPE trained on the same modules; no BOS is added.",
        f"**Training.** {optimizer}. The checkpoint of step {training['best_step']:,} was chosen by the loss "
        f"on training modules set aside ({training['held_out_loss']:.4f} nats per token).",
        "## What it scores",
        f"Perplexity **{result.value:.3f}** (standard error {result.stderr or 0:.3f}) on the evaluation "
        f"modules of Python {corpus.python}: {scored}. Other Python versions have other texts, so the figure "
        "moves a little with the interpreter.",
        "## Outliers",
        "Large models have a few channels whose activations are 20 to 100 times those of the median channel "
        "(LLM.int8(), arXiv:2208.07339; SmoothQuant, arXiv:2211.10438), which is what makes activations hard "
        "to quantize. A small model has few or none, so they were **put in** by a rescaling that keeps the "
        "function: chosen channels multiplied by a power of two where they are produced and divided where "
        f"they are consumed (`qbench.models.outliers`; aims: {targets}). In float64 the logits moved by "
        f"{difference:.1e} of the largest; with the stored fp16 weights by {stored_difference:.1e}.",
        "Largest channel over median channel, of the largest absolute input of each linear on 32 calibration "
        "windows; lowest, highest and median over the blocks:",
    ]
    wrapped = [p if p.startswith("    ") else textwrap.fill(p, 110) for p in paragraphs]
    table = ["| linear | as trained | as shipped |", "|---|---|---|", *rows]
    text = CARD_HEADER + "\n\n".join(wrapped) + "\n\n" + "\n".join(table) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def device_name(device: str) -> str:
    """Name the hardware that trained."""
    return (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else f"a CPU ({platform.machine()})"
    )


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def log(text: str) -> None:
    """Print at once, so that a log file can be followed."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
