"""Grammars that answers must follow: compiled in threads, and each request's place in its own.

Works on token ids and on the model's tokenizer.json, by way of llguidance. Knows nothing of requests or steps.
"""

from __future__ import annotations

import json
import queue
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock

from llguidance import LLMatcher, LLTokenizer

from protocol.threads import deep_thread_pool

# Two, so that a grammar that is slow to compile does not hold up all others.
_NUM_THREADS = 2
# Compiled grammars that are kept for requests to come. Most take well under a megabyte.
_MOST_KEPT = 128
_SILENT = 0
_NO_OPTIONS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}

RequestKey = tuple[int, int]


class GrammarState:
    """Where one request stands in its grammar: a function of the tokens generated so far, and of nothing else."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    def advance(self, token: int) -> None:
        """Takes a token that was drawn under the mask of this state.

        Raises:
            ValueError: the grammar does not take it, or has become too complex to go on with.
        """
        # One that failed while its mask was made would take the end of the answer, which is all that the mask allows.
        if self.matcher.is_error() or not self.matcher.consume_token(token):
            # What follows the first line is the library's state.
            reason = self.matcher.get_error().partition("\n")[0]
            raise ValueError(reason or f"the grammar does not take token {token}")

    @property
    def is_complete(self) -> bool:
        """Nothing but an end-of-sequence token can follow."""
        return self.matcher.is_stopped()


def _with_missing_tokens(file: Path, settings: Path) -> str:
    """A tokenizer.json with the tokens added that only tokenizer_config.json has: they are no text either."""
    text = file.read_text(encoding="utf-8")
    added = json.loads(settings.read_text(encoding="utf-8")).get("added_tokens_decoder") if settings.is_file() else None
    if not added:
        return text
    tokenizer = json.loads(text)
    tokens = {token["id"]: token for token in tokenizer.setdefault("added_tokens", [])}
    for written_id, token in added.items():
        is_known_as_special = tokens.get(int(written_id), {}).get("special", False)
        if not is_known_as_special:
            tokens[int(written_id)] = _NO_OPTIONS | token | {"id": int(written_id)}
    tokenizer["added_tokens"] = [tokens[token_id] for token_id in sorted(tokens)]
    return json.dumps(tokenizer)


class Grammars:
    """Compiles grammars for one tokenizer. `on_ready` is called in another thread whenever one is done."""

    def __init__(
        self,
        tokenizer_files: Sequence[Path],
        vocab_size: int,
        eos_token_ids: Sequence[int],
        on_ready: Callable[[], None],
    ) -> None:
        """Reads the first of the files that exists when it is needed; if one does now, it begins to, in a thread."""
        self._files = tokenizer_files
        self._vocab_size = vocab_size
        self._eos_token_ids = [token for token in eos_token_ids if token < vocab_size]
        self._on_ready = on_ready
        self._threads = deep_thread_pool(_NUM_THREADS, "grammar")
        self._done: queue.SimpleQueue[tuple[RequestKey, GrammarState | str]] = queue.SimpleQueue()
        self._vocabulary: LLTokenizer | None = None
        self._loading = Lock()
        # By text, least recently used first. A matcher here stays at its start: requests get copies.
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = Lock()
        if any(file.is_file() for file in tokenizer_files):
            self._threads.submit(self._load_vocabulary)

    def compile(self, key: RequestKey, grammar: str) -> None:
        """Begins to compile, for the request with this key; see `take_ready`."""
        self._threads.submit(self._compile, key, grammar)

    def take_ready(self) -> list[tuple[RequestKey, GrammarState | str]]:
        """Keys whose grammars are done since the last call, with the state at their start or why there is none."""
        ready = []
        while not self._done.empty():
            ready.append(self._done.get())
        return ready

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, key: RequestKey, grammar: str) -> None:
        try:
            outcome: GrammarState | str = GrammarState(self._matcher(grammar).deep_copy())
        except Exception as error:
            # Whatever a library makes of a grammar ends one request, not the engine.
            outcome = str(error)
        self._done.put((key, outcome))
        self._on_ready()

    def _matcher(self, grammar: str) -> LLMatcher:
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is not None:
                self._compiled.move_to_end(grammar)
                return matcher
        matcher = LLMatcher(self._load_vocabulary(), grammar, log_level=_SILENT)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > _MOST_KEPT:
                self._compiled.popitem(last=False)
        return matcher

    def _load_vocabulary(self) -> LLTokenizer:
        with self._loading:
            if self._vocabulary is None:
                file = next((file for file in self._files if file.is_file()), None)
                if file is None:
                    raise ValueError("the engine runs without a tokenizer, which a grammar needs")
                self._vocabulary = LLTokenizer(
                    _with_missing_tokens(file, self._files[0].with_name("tokenizer_config.json")),
                    n_vocab=self._vocab_size,
                    eos_token=self._eos_token_ids or None,
                )
            return self._vocabulary
