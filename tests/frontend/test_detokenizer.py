"""Incremental detokenization gives, piece by piece, exactly the text that decoding everything at once gives."""

from __future__ import annotations

import functools

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from bundled import MODEL_DIR
from frontend.tokenizer import Tokenizer
from protocol.model_config import load_model_config
from tests.frontend.conftest import VOCAB_SIZE, make_tokenizer

CORPUS = ["the quick brown fox jumps", "größe und ängste", "naïve 日本"] * 5


@functools.cache
def byte_level() -> Tokenizer:
    return Tokenizer(make_tokenizer(), VOCAB_SIZE)


@functools.cache
def sentencepiece_like() -> Tokenizer:
    """Like Llama 2's: spaces as ▁, bytes as <0x0A>, one leading space stripped."""
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False)
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainer)
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for token in sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__):
        vocab[token] = len(vocab)
    model = models.BPE(vocab, [], byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, len(vocab) + 2)


@functools.cache
def wordpiece() -> Tokenizer:
    """Like BERT's: spaces between words, none before continuations."""
    words = ["[UNK]", "[CLS]", "the", "fox", "jump", "##s", "##ing", "größe", "##n", "日", "##本"]
    backend = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(["[CLS]"])
    return Tokenizer(backend, len(words))


@functools.cache
def bundled() -> Tokenizer:
    vocab_size = load_model_config(MODEL_DIR).vocab_size
    return Tokenizer.load(MODEL_DIR, MODEL_DIR / "tokenizer.json", vocab_size)


def pieces(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens)
    return [*(detokenizer.feed(token) for token in ids), detokenizer.flush()]


def token_ids(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, size - 1), max_size=40)


# Any ids, so that characters are cut, bytes are invalid and special tokens stand anywhere.
@given(ids=token_ids(VOCAB_SIZE), skip=st.booleans())
@settings(max_examples=400, deadline=None)
def test_byte_level_pieces_join_to_the_whole(ids: list[int], skip: bool) -> None:
    assert "".join(pieces(byte_level(), ids, skip)) == byte_level().decode(ids, skip)


@given(text=st.text(max_size=40), skip=st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_bundled_models_pieces_join_to_the_whole(text: str, skip: bool) -> None:
    ids = bundled().encode(f"<|im_start|>{text}<|im_end|>")
    assert "".join(pieces(bundled(), ids, skip)) == bundled().decode(ids, skip)


@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_byte_level_text_comes_back_without_half_characters(text: str) -> None:
    parts = pieces(byte_level(), byte_level().encode(text), False)
    assert "".join(parts) == text
    assert all(part in text for part in parts)
    assert parts[-1] == ""


@given(ids=token_ids(256 + 122), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_sentencepiece_pieces_join_to_the_whole(ids: list[int], skip: bool) -> None:
    assert "".join(pieces(sentencepiece_like(), ids, skip)) == sentencepiece_like().decode(ids, skip)


@given(text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=30))
@settings(max_examples=100, deadline=None)
def test_sentencepiece_text_comes_back(text: str) -> None:
    ids = sentencepiece_like().encode(text)
    assert "".join(pieces(sentencepiece_like(), ids, True)) == text


@given(ids=token_ids(11), skip=st.booleans())
@settings(max_examples=200, deadline=None)
def test_wordpiece_pieces_join_to_the_whole(ids: list[int], skip: bool) -> None:
    assert "".join(pieces(wordpiece(), ids, skip)) == wordpiece().decode(ids, skip)


def test_characters_are_emitted_with_their_last_byte() -> None:
    ids = [make_tokenizer().token_to_id(character) for character in "ðŁĻĤ"]
    assert None not in ids
    assert pieces(byte_level(), ids, False) == ["", "", "", "🙂", ""]


def test_a_character_that_never_becomes_whole_is_replaced_at_the_end() -> None:
    ids = [make_tokenizer().token_to_id(character) for character in "ðŁ"]
    assert pieces(byte_level(), ids, False) == ["", "", "\ufffd"]


def test_words_are_emitted_as_they_come_whatever_the_decoder() -> None:
    tokenizer = sentencepiece_like()
    ids = tokenizer.encode("the quick brown fox")
    parts = pieces(tokenizer, ids, True)
    # The first is the space that the decoder strips.
    assert parts[0] == parts[-1] == ""
    assert all(parts[1:-1])


@pytest.mark.parametrize("skip", [False, True])
def test_added_tokens_contribute_what_the_whole_decoder_makes_of_them(skip: bool) -> None:
    ids = [make_tokenizer().token_to_id(token) for token in ("<think>", "<|im_end|>", "naïve token Ġ")]
    assert "".join(pieces(byte_level(), ids, skip)) == byte_level().decode(ids, skip)


def test_ids_without_a_token_contribute_nothing() -> None:
    assert pieces(byte_level(), [VOCAB_SIZE - 1], False) == ["", ""]
