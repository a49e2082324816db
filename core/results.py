"""What a step's tokens mean to the frontends: rows of new tokens, with log-probabilities where they are wanted, and
requests that ended, one message a frontend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core.request import Request
from protocol.logprobs import PromptLogprobs, TokenLogprobs
from protocol.messages import Failed, Finished, FinishReason, StepOutputs, pack_ints, unpack_ints


class StepEffects:
    """Collects the effects of one step. Rows come as arrays; only what ends is looked at one by one.

    `logprobs` are the step's, whose rows are those of the step: the rows added here must then say which they are.
    """

    def __init__(self, logprobs: Sequence[TokenLogprobs] = ()) -> None:
        self._logprobs = logprobs
        self._rows: list[np.ndarray] = []
        self._prompt_logprobs: dict[int, list[PromptLogprobs]] = {}
        self._frontends: list[np.ndarray] = []
        self._request_ids: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []
        self._finished: dict[int, list[Finished]] = {}
        self._failed: dict[int, list[Failed]] = {}

    def add_rows(
        self,
        frontends: np.ndarray,
        request_ids: np.ndarray,
        tokens: np.ndarray,
        keep: np.ndarray | None,
        rows: np.ndarray | None,
    ) -> None:
        """Adds a token for each row, or for those in the mask `keep`. `rows` are their indices in the step, None for
        0, 1, 2, …"""
        if self._logprobs:
            rows = np.arange(len(tokens)) if rows is None else rows
            self._rows.append(rows if keep is None else rows[keep])
        if keep is not None:
            frontends, request_ids, tokens = frontends[keep], request_ids[keep], tokens[keep]
        self._frontends.append(frontends)
        self._request_ids.append(request_ids)
        self._tokens.append(tokens)

    def add_row(self, frontend: int, request_id: int, token: int, row: int) -> None:
        tokens = np.array([token], np.int32)
        self.add_rows(np.array([frontend]), np.array([request_id]), tokens, None, np.array([row]))

    def add_prompt_logprobs(self, request: Request, tokens: TokenLogprobs) -> None:
        entry = PromptLogprobs(request.request_id, tokens)
        self._prompt_logprobs.setdefault(request.frontend_index, []).append(entry)

    def finish(
        self, request: Request, reason: FinishReason, stop_reason: int | None, is_complete: bool = False
    ) -> None:
        finished = Finished(request.request_id, reason, stop_reason, request.num_cached_tokens, is_complete)
        self._finished.setdefault(request.frontend_index, []).append(finished)

    def fail(self, request: Request, message: str) -> None:
        self._failed.setdefault(request.frontend_index, []).append(Failed(request.request_id, "failed", message))

    def messages(self, epoch: int) -> list[tuple[int, StepOutputs | Failed]]:
        """The messages to send, as (frontend index, message)."""
        frontends = np.concatenate(self._frontends) if len(self._frontends) > 1 else self._frontends[0]
        request_ids = np.concatenate(self._request_ids) if len(self._request_ids) > 1 else self._request_ids[0]
        tokens = np.concatenate(self._tokens) if len(self._tokens) > 1 else self._tokens[0]
        messages: list[tuple[int, StepOutputs | Failed]] = []
        rows = np.concatenate(self._rows) if self._rows else np.empty(0, np.int64)
        for frontend in sorted(set(np.unique(frontends).tolist()) | set(self._finished) | set(self._prompt_logprobs)):
            mine = frontends == frontend
            messages.append(
                (
                    frontend,
                    StepOutputs(
                        epoch=epoch,
                        request_ids=pack_ints(request_ids[mine], "<i8"),
                        token_ids=pack_ints(tokens[mine]),
                        finished=self._finished.get(frontend, []),
                        logprobs=self._logprobs_of(rows[mine]) if self._logprobs else [],
                        prompt_logprobs=self._prompt_logprobs.get(frontend, []),
                    ),
                )
            )
        for frontend, failures in self._failed.items():
            messages += [(frontend, failure) for failure in failures]
        return messages

    def _logprobs_of(self, rows: np.ndarray) -> list[TokenLogprobs]:
        """What is there of the step's rows `rows`, which are 0, 1, 2, … in the message."""
        index_of = {row: index for index, row in enumerate(rows.tolist())}
        found = []
        for table in self._logprobs:
            indices = np.array([index_of.get(row, -1) for row in unpack_ints(table.rows).tolist()], np.int64)
            keep = indices >= 0
            if keep.any():
                found.append(table.select(keep, indices[keep]))
        return found
