"""Model folders as `save_pretrained` writes them: a tiny random model with a tokenizer trained on a little text."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn

TEXT = """
the quick brown fox jumps over a lazy dog while seven grey wolves sing under old stone bridges and rain falls on green
hills where nobody counts apples pears plums or silver coins before winter comes again with long nights cold rivers
bright stars quiet roads empty fields warm bread good books
"""
WORDS = TEXT.split()


def text(n_words: int, seed: int = 0) -> str:
    """Words in random order: one token each for the tokenizer below."""
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """One token per word of `WORDS`."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words.train_from_iterator([text(2000)], trainers.WordLevelTrainer(vocab_size=96, special_tokens=special))
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save(model: nn.Module, folder: Path) -> Path:
    """Model and tokenizer, ready for `--model FOLDER`."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def plain_model(folder: Path) -> nn.Module:
    """What transformers alone makes of a folder."""
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
