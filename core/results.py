"""What a step's tokens mean to the frontends: rows of new tokens, and requests that ended, one message a frontend."""

from __future__ import annotations

import numpy as np

from core.request import Request
from protocol.messages import Failed, Finished, FinishReason, StepOutputs, pack_ints


class StepEffects:
    """Collects the effects of one step. Rows come as arrays; only what ends is looked at one by one."""

    def __init__(self) -> None:
        self._frontends: list[np.ndarray] = []
        self._request_ids: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []
        self._finished: dict[int, list[Finished]] = {}
        self._failed: dict[int, list[Failed]] = {}

    def add_rows(
        self, frontends: np.ndarray, request_ids: np.ndarray, tokens: np.ndarray, keep: np.ndarray | None
    ) -> None:
        """Adds a token for each row, or for those in the mask `keep`."""
        if keep is not None:
            frontends, request_ids, tokens = frontends[keep], request_ids[keep], tokens[keep]
        self._frontends.append(frontends)
        self._request_ids.append(request_ids)
        self._tokens.append(tokens)

    def add_row(self, frontend: int, request_id: int, token: int) -> None:
        self.add_rows(np.array([frontend]), np.array([request_id]), np.array([token], np.int32), None)

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | None) -> None:
        finished = Finished(request.request_id, reason, stop_reason, request.num_cached_tokens)
        self._finished.setdefault(request.frontend_index, []).append(finished)

    def fail(self, request: Request, message: str) -> None:
        self._failed.setdefault(request.frontend_index, []).append(Failed(request.request_id, "failed", message))

    def messages(self, epoch: int) -> list[tuple[int, StepOutputs | Failed]]:
        """The messages to send, as (frontend index, message)."""
        frontends = np.concatenate(self._frontends) if len(self._frontends) > 1 else self._frontends[0]
        request_ids = np.concatenate(self._request_ids) if len(self._request_ids) > 1 else self._request_ids[0]
        tokens = np.concatenate(self._tokens) if len(self._tokens) > 1 else self._tokens[0]
        messages: list[tuple[int, StepOutputs | Failed]] = []
        for frontend in sorted(set(np.unique(frontends).tolist()) | set(self._finished)):
            mine = frontends == frontend
            messages.append(
                (
                    frontend,
                    StepOutputs(
                        epoch=epoch,
                        request_ids=pack_ints(request_ids[mine], "<i8"),
                        token_ids=pack_ints(tokens[mine]),
                        finished=self._finished.get(frontend, []),
                    ),
                )
            )
        for frontend, failures in self._failed.items():
            messages += [(frontend, failure) for failure in failures]
        return messages
