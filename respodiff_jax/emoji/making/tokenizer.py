"""Learns Emoji World's small byte-pair vocabulary and writes it as a `CLIPTokenizer`'s files."""

import collections
import itertools
import json
import pathlib

import numpy as np

from respodiff_jax.backbone.text import byte_symbols
from respodiff_jax.emoji.making import captions

CONTEXT_LENGTH = 20
START, END = "<|startoftext|>", "<|endoftext|>"


def word_counts(seed=0, draws=30_000):
    """Counts the words of `draws` captions; a mapping from word to count."""
    rng = np.random.default_rng(seed)
    texts = (captions.draw(rng)[0] for _ in range(draws))
    return collections.Counter(word for text in texts for word in text.replace("-", " - ").split())


def learn_merges(counts):
    """Learns byte-pair merges, from word counts, until every word is one symbol.

    The most frequent pair is merged first; the alphabet decides ties.

    Returns:
      (left, right) symbol pairs, in the order learned.
    """
    words = {word: (*word[:-1], word[-1] + "</w>") for word in counts}
    merges = []
    while True:
        pairs = collections.Counter()
        for word, symbols in words.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {word: _merge(symbols, best) for word, symbols in words.items()}


def _merge(symbols, pair):
    merged, index = [], 0
    while index < len(symbols):
        if symbols[index : index + 2] == pair:
            merged.append("".join(pair))
            index += 2
        else:
            merged.append(symbols[index])
            index += 1
    return tuple(merged)


def write_tokenizer(folder, seed=0):
    """Writes the vocabulary, merges and config files of a `CLIPTokenizer` into `folder`."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges(word_counts(seed))
    symbols = byte_symbols() + ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CONTEXT_LENGTH,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }
    merge_lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(merge_lines) + "\n", encoding="utf-8")
    files = {
        "vocab.json": vocabulary,
        "tokenizer_config.json": config,
        "special_tokens_map.json": special,
    }
    for name, content in files.items():
        (folder / name).write_text(
            json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
