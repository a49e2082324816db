"""What of the sampling options needs tokenizer and vocabulary: bad words as tokens, ids that are out of range."""

from __future__ import annotations

from collections.abc import Sequence

from frontend.tokenizer import Tokenizer
from protocol.errors import InvalidRequestError
from protocol.limits import require_few
from protocol.sampling import SamplingParams

# The worker keeps so many of each sequence's last tokens to compare with.
MAX_BAD_WORD_TOKENS = 16
# Log-probabilities that one request may bring back, eight bytes each, which go into one message at its end.
MAX_LOGPROB_ENTRIES = 4 * 1024 * 1024
# The same for all answers to one HTTP request, which are written into one body.
MAX_LOGPROB_ENTRIES_OF_ALL = 2 * MAX_LOGPROB_ENTRIES


def bad_word_ids(words: tuple[str, ...], tokenizer: Tokenizer | None) -> list[list[int]]:
    """The token sequences of each word, at the beginning of a text and after a space.

    Raises:
        InvalidRequestError: there is no tokenizer, or a word has too many tokens.
    """
    if words and tokenizer is None:
        raise InvalidRequestError(
            "bad_words needs text, and the engine runs without a tokenizer (--skip-tokenizer-init)", "bad_words"
        )
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        assert tokenizer is not None
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) > MAX_BAD_WORD_TOKENS:
                raise InvalidRequestError.out_of_range(
                    "bad_words", word, f"made of words of at most {MAX_BAD_WORD_TOKENS} tokens (this has {len(ids)})"
                )
            if ids:
                sequences[tuple(ids)] = None
    return [list(sequence) for sequence in sequences]


def check_token_options(params: SamplingParams, num_prompt_tokens: int, vocab_size: int) -> None:
    """Raises InvalidRequestError if an id is none of the vocabulary, or if log-probabilities are too many to send."""
    ids = {
        "stop_token_ids": params.stop_token_ids,
        "logit_bias": [token for token, _ in params.logit_bias],
        "allowed_token_ids": params.allowed_token_ids or (),
    }
    require_few(len(ids["allowed_token_ids"]), vocab_size, "allowed_token_ids", "ids, which are all there are")
    for name, tokens in ids.items():
        if tokens and max(tokens) >= vocab_size:
            expected = f"made of the vocabulary's ids, 0 to {vocab_size - 1}"
            raise InvalidRequestError.out_of_range(name, max(tokens), expected)
    for name, wanted, count, of_what in (
        ("logprobs", params.logprobs, params.max_tokens or 0, "max_tokens"),
        ("prompt_logprobs", params.prompt_logprobs, num_prompt_tokens, "tokens of the prompt"),
    ):
        width = vocab_size if wanted == -1 else wanted or 0
        if width * count > MAX_LOGPROB_ENTRIES:
            raise InvalidRequestError(
                f"{name} is too large: {count} {of_what} with {width} log-probabilities each, "
                f"of which {MAX_LOGPROB_ENTRIES} are allowed in all",
                name,
            )


def check_logprobs_of_all(params: Sequence[SamplingParams], prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises InvalidRequestError if the log-probabilities of all answers together may be too many."""
    total = 0
    for each, prompt in zip(params, prompts, strict=True):
        for wanted, count in ((each.logprobs, each.max_tokens or 0), (each.prompt_logprobs, len(prompt))):
            if wanted is not None:
                total += (1 + (vocab_size if wanted == -1 else wanted)) * count * each.n
    if total > MAX_LOGPROB_ENTRIES_OF_ALL:
        name = "logprobs" if params[0].logprobs is not None else "prompt_logprobs"
        raise InvalidRequestError(
            f"{name} is too large for so many answers: up to {total} log-probabilities, of which "
            f"{MAX_LOGPROB_ENTRIES_OF_ALL} are allowed; lower it, max_tokens, n or the number of prompts",
            name,
        )
