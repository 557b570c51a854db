"""Sentences as vectors."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from stgen._checks import check_prompt
from stgen.models._text import HASHED_DIM, _bert, embed_text

PROMPT = "H&E of invasive ductal carcinoma of the breast"


# ---- hashed words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [HASHED_DIM, 16, 1000])
def test_hashed_vectors_have_length_one(dim):
    vector = embed_text(PROMPT, "hashed", dim)
    assert (vector.shape, vector.dtype) == ((dim,), np.float32)
    assert np.linalg.norm(vector.astype(float)) == pytest.approx(1, abs=1e-6)


def test_hashed_vectors_are_the_same_in_any_process():
    """Python's own hash is not: it is salted."""
    code = f"from stgen.models._text import embed_text; print(embed_text({PROMPT!r}, 'hashed', 64).tobytes().hex())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "7"})
    assert done.stdout.strip() == embed_text(PROMPT, "hashed", 64).tobytes().hex(), done.stderr


def test_hashed_vector_counts_words_and_pairs():
    """Each of its words and pairs adds to one place, all by as much: of two that occur twice, twice."""
    one, both = embed_text("tumor", "hashed", 512), embed_text("tumor stroma", "hashed", 512)
    place = int(np.abs(one).argmax())
    assert np.count_nonzero(one) == 1
    assert np.count_nonzero(both) == 3
    assert both[place] == pytest.approx(one[place] / 3**0.5)
    twice = embed_text("tumor tumor", "hashed", 512)  # tumor twice, and the pair
    assert np.count_nonzero(twice) == 2
    assert twice[place] == pytest.approx(2 * one[place] / 5**0.5)


def test_different_prompts_differ():
    prompts = [PROMPT, "H&E of the brain of a mouse", "IHC of lung", "H&E of colorectal carcinoma", "DAPI of lung"]
    vectors = np.array([embed_text(prompt, "hashed", HASHED_DIM) for prompt in prompts])
    similarity = vectors @ vectors.T - np.eye(len(prompts))
    assert similarity.max() < 0.8
    alike = [embed_text(p, "hashed", HASHED_DIM) for p in ("H&E of breast cancer", "H&E of lung cancer", "mouse brain")]
    assert alike[0] @ alike[1] > alike[0] @ alike[2] + 0.3  # those that share words are nearer


def test_order_of_words_matters_through_pairs():
    one, two = (
        embed_text(p, "hashed", HASHED_DIM) for p in ("normal tissue beside tumor", "tumor tissue beside normal")
    )
    assert not np.allclose(one, two, atol=0.1)
    single, turned = (embed_text(p, "hashed", HASHED_DIM) for p in ("tumor", "TUMOR"))
    np.testing.assert_array_equal(single, turned)


def test_spaces_around_a_prompt_do_not_matter():
    assert check_prompt(f"  {PROMPT}\n") == PROMPT
    np.testing.assert_array_equal(embed_text(f" {PROMPT} ", "hashed", 32), embed_text(PROMPT, "hashed", 32))


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t", None, 3, ["H&E"], b"H&E of breast"])
def test_prompts_that_are_none(prompt):
    message = "`prompt` must say in a few words what the image shows, such as .*; found "
    with pytest.raises(ValueError, match=message):
        check_prompt(prompt)
    with pytest.raises(ValueError, match=message):
        embed_text(prompt, "hashed", 32)


@pytest.mark.parametrize("prompt", ["?", "a", "H & E", "- . -"])
def test_prompt_without_words(prompt):
    with pytest.raises(ValueError, match="`prompt` holds no word of two letters or more: "):
        embed_text(prompt, "hashed", 32)


# ---- encoders of the BERT type --------------------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "breast", "tumor", "of", "the", "tissue", "##s"]


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _bert.cache_clear()
    yield
    _bert.cache_clear()


@pytest.fixture
def encoder(tmp_path, offline):
    """The folder of a tiny encoder with weights at random, and that encoder."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "encoder"
    folder.mkdir()
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    network = transformers.BertModel(config).eval()
    network.save_pretrained(folder, safe_serialization=True)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    try:
        tokenizer = transformers.BertTokenizer(vocab=vocabulary, model_max_length=16)
    except TypeError:  # before transformers 5
        tokenizer = transformers.BertTokenizer(tmp_path / "vocab.txt", model_max_length=16)
    tokenizer.save_pretrained(folder)
    assert (folder / "model.safetensors").is_file()
    return folder, network


def test_encoder_gives_the_mean_of_its_last_states(encoder):
    folder, network = encoder
    numbers = [WORDS.index(word) for word in ("[CLS]", "tumor", "##s", "of", "the", "breast", "[UNK]", "[SEP]")]
    with torch.no_grad():
        states = network(input_ids=torch.tensor([numbers])).last_hidden_state[0]
    vector = embed_text("Tumors of the breast unheard", str(folder), 12)
    assert (vector.shape, vector.dtype) == ((12,), np.float32)
    np.testing.assert_allclose(vector, states.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(vector, embed_text(" tumors OF the breast unheard ", str(folder), 12))
    assert np.abs(vector - embed_text("breast of the tumors unheard", str(folder), 12)).max() > 1e-3


def test_long_prompts_are_cut(encoder):
    """At what the encoder can take, instead of an error from within."""
    folder, _ = encoder
    long = embed_text("tumor " * 40, str(folder), 12)
    np.testing.assert_array_equal(long, embed_text("tumor " * 14, str(folder), 12))  # and two that frame them


def test_vectors_of_another_size(encoder):
    folder, _ = encoder
    message = (
        "the vectors of the text encoder .* have 12 numbers and the model takes 768; construct it with text_dim=12"
    )
    with pytest.raises(ValueError, match=message):
        embed_text("tumor", str(folder), 768)


def test_model_is_told_by_an_encoder(encoder):
    from stgen.models import HaDMST

    folder, _ = encoder
    model = HaDMST(["A", "B"], text_encoder=str(folder), text_dim=12, width=8, widths=[8] * 3, mean_widths=[8])
    np.testing.assert_array_equal(model.embed_prompt("tumor"), embed_text("tumor", str(folder), 12))


@pytest.mark.parametrize("name", ["no/such-encoder", "nosuchencoder", "/no/such/folder", "not a name!"])
def test_encoder_that_is_not_there(offline, name):
    pytest.importorskip("transformers")
    message = (
        'there is no text encoder .* with safetensors weights, as a folder or on the Hugging Face Hub .*"hashed" needs'
    )
    with pytest.raises(FileNotFoundError, match=message):
        embed_text("tumor", name, 768)


def test_pickled_weights_are_refused(encoder):
    """Whoever loads a pickle runs what is in it."""
    folder, network = encoder
    (folder / "model.safetensors").unlink()
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="with safetensors weights"):
        embed_text("tumor", str(folder), 12)


def test_without_transformers(monkeypatch, offline):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ImportError, match=r"needs transformers, .*pip install \"stgen\[encoders\]\".*\"hashed\" needs not"
    ):
        embed_text("tumor", "bert-base-uncased", 768)
    assert embed_text("tumor", "hashed", 8).any()
