"""Turns prompts into conditioning with CLIP text encoders, as diffusers' pipelines do."""

import json
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from transformers import CLIPTokenizer, CLIPTokenizerFast
from transformers.models.clip.tokenization_clip import bytes_to_unicode

from respodiff_jax.errors import UserError, shortened


def tokenise(tokenizer: CLIPTokenizer, prompts: Sequence[str], length: int) -> np.ndarray:
    """The token ids of prompts: begin, text, end, then padding.

    A learned token of several vectors ("<cat-toy>", "<cat-toy>_1", ...) is written out, as in
    diffusers. A prompt that is too long is cut, as in diffusers; a warning names the prompt and the
    text that is lost.

    Returns:
      int32 (n, L) for n prompts, where L is `length`, the number of tokens that the encoder reads.
    """
    ids = np.full((len(prompts), length), tokenizer.pad_token_id, np.int32)
    rows = tokenizer([_with_all_vectors(tokenizer, p) for p in prompts], verbose=False)["input_ids"]
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        if len(row) > length:
            lost = tokenizer.decode(row[length - 1 : -1])
            warnings.warn(
                f"prompt {shortened(prompt)!r} has {len(row)} tokens, the text encoder reads"
                f" {length}; not read: {shortened(lost)!r}. Shorten the prompt",
                stacklevel=3,
            )
            row = [*row[: length - 1], row[-1]]
        ids[i, : len(row)] = row
    return ids


def _with_all_vectors(tokenizer: CLIPTokenizer, prompt: str) -> str:
    """The prompt with every learned token followed by the tokens of its other vectors."""
    learned = tokenizer.added_tokens_encoder
    if not any(f"{token}_1" in learned for token in learned):
        return prompt
    for token in sorted(set(tokenizer.tokenize(prompt)) & set(learned)):
        vectors = [token]
        while f"{token}_{len(vectors)}" in learned:
            vectors.append(f"{token}_{len(vectors)}")
        prompt = prompt.replace(token, " ".join(vectors))
    return prompt


def encode_tokens(
    text_encoders: Sequence[nn.Module],
    params: Sequence[Mapping],
    ids: Sequence[jax.Array],
    keep: jax.Array,
    vectors: Sequence[jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Runs the text encoders.

    With one text encoder (SD 1.x, 2.x) the context is its last hidden state, after the final layer
    norm. With two (SDXL) the context is the penultimate hidden states of both, concatenated, and
    pooled is the projected embedding of the second.

    Args:
      text_encoders: one or two CLIP text modules.
      params: the parameters of each.
      ids: int32 (n, L) for each. Every position is attended to, padding too, as in training.
      keep: bool (n,); the outputs are zeros where it is False.
      vectors: float (n, L, D) for each, the tokens' embeddings; None looks them up by `ids`.

    Returns:
      context: the modules' dtype (n, L, D).
      pooled: the modules' dtype (n, E) for two text encoders, else None.
    """
    outputs = []
    vectors = vectors or [None] * len(text_encoders)
    for module, own, tokens, given in zip(text_encoders, params, ids, vectors, strict=True):
        positions = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
        inputs = tokens, jnp.ones_like(tokens), positions
        with nn.intercept_methods(_with_token_vectors(given)):
            outputs.append(module.apply({"params": own}, *inputs, output_hidden_states=True))
    if len(outputs) == 1:
        context, pooled = outputs[0].last_hidden_state, None
    else:
        context = jnp.concatenate([out.hidden_states[-2] for out in outputs], axis=-1)
        pooled = jnp.where(keep[:, None], outputs[1].text_embeds, 0)
    return jnp.where(keep[:, None, None], context, 0), pooled


def _with_token_vectors(vectors: jax.Array | None) -> Callable:
    """A `flax.linen` interceptor that gives these embeddings of tokens instead of the table's."""

    def intercept(next_function, args, kwargs, context):
        is_table = context.module.name == "token_embedding" and context.method_name == "__call__"
        if vectors is None or not is_table:
            return next_function(*args, **kwargs)
        return vectors.astype(context.module.dtype)

    return intercept


def equal_batches(count: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of one size; copies of the last item fill up the last batch.

    Yields:
      The numbers of the items, and how many of them are not copies.
    """
    for start in range(0, count, batch_size):
        items = np.minimum(np.arange(start, start + batch_size), count - 1)
        yield items, min(batch_size, count - start)


def byte_symbols() -> list[str]:
    """The first 512 entries of CLIP's vocabulary: each byte within a word, then at its end."""
    symbols = list(bytes_to_unicode().values())
    return symbols + [symbol + "</w>" for symbol in symbols]


def byte_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with a token for each byte: 514 entries, no merges, nothing to download."""
    vocabulary = [*byte_symbols(), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = pathlib.Path(folder, "vocab.json"), pathlib.Path(folder, "merges.txt")
        vocab.write_text(json.dumps({s: i for i, s in enumerate(vocabulary)}), encoding="utf-8")
        merges.write_text("#version: 0.2\n", encoding="utf-8")
        return CLIPTokenizer(str(vocab), str(merges), model_max_length=77)


def read_tokenizer(folder: str | pathlib.Path) -> CLIPTokenizer:
    """The tokenizer in a folder; raises `UserError` if its files are damaged."""
    folder = pathlib.Path(folder)
    kind = CLIPTokenizer if (folder / "vocab.json").is_file() else CLIPTokenizerFast
    try:
        return kind.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise UserError(
            f"{folder}: the tokenizer is damaged ({error}); download or copy it again"
        ) from error
