"""What a sentence says, as a vector."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from stgen._checks import check_prompt

__all__ = ["HASHED_DIM", "embed_text"]

HASHED_DIM = 256


def embed_text(text: str, encoder: str, dim: int, *, fetch: bool = True) -> np.ndarray:
    """A vector for a sentence.

    Parameters
    ----------
    text
        The sentence.
    encoder
        ``"hashed"``: words and pairs of neighboring words, each counted in one of ``dim`` places, normalized. Needs no
        download, and knows of no likeness between different words. Or a BERT-type encoder, by its folder or Hugging
        Face Hub id, whose last states are averaged over the words; needs transformers, and weights as safetensors.
    dim
        Size of the vector.
    fetch
        Whether an encoder that is not on this machine may be downloaded: not one that only a saved model names.

    Returns
    -------
    Float32, shape ``(dim,)``.

    Raises
    ------
    ImportError
        If transformers is needed and not there.
    FileNotFoundError
        If there is no such encoder.
    ValueError
        If its vectors have another size, or the text is empty or says nothing (``"hashed"``).
    """
    text = check_prompt(text)
    vector = _hashed(text, dim) if encoder == "hashed" else _encoded(text, encoder, fetch)
    if len(vector) != dim:
        raise ValueError(
            f"the vectors of the text encoder {encoder!r} have {len(vector)} numbers and the model takes {dim}; "
            f"construct it with text_dim={len(vector)}."
        )
    return vector


def _hashed(text: str, dim: int) -> np.ndarray:
    from sklearn.feature_extraction.text import HashingVectorizer

    vector = HashingVectorizer(n_features=dim, ngram_range=(1, 2)).transform([text]).toarray()[0]
    if not vector.any():
        raise ValueError(f"`prompt` holds no word of two letters or more: {text!r}.")
    return vector.astype(np.float32)


def _encoded(text: str, encoder: str, fetch: bool) -> np.ndarray:
    import torch

    tokenizer, network = _bert(encoder, fetch)
    tokens = tokenizer(text, return_tensors="pt", truncation=True)
    with torch.no_grad():
        states = network(**tokens).last_hidden_state[0]
    return states.mean(0).float().cpu().numpy()


@lru_cache(maxsize=1)
def _bert(encoder: str, fetch: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Tokenizer and network of that name."""
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError(
            f"the text encoder {encoder!r} needs transformers, which could not be imported ({error}). Install it with: "
            'pip install "stgen[encoders]". text_encoder="hashed" needs nothing.'
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=not fetch)
        return tokenizer, AutoModel.from_pretrained(encoder, use_safetensors=True, local_files_only=not fetch).eval()
    except OSError as error:
        asked = "" if fetch else " (which is not asked for what only a saved model names: download it yourself first)"
        raise FileNotFoundError(
            f"the text encoder {encoder!r} could not be loaded, with safetensors weights, from a folder or from the "
            f'Hugging Face Hub{asked}: {str(error).splitlines()[0]} text_encoder="hashed" needs none.'
        ) from error
