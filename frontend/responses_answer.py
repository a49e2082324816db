"""How the Responses API answers: items that are made of an answer's parts, and an event for each thing that happens.

A response that is not streamed is made in the same way, and its events are not sent. Knows nothing of sockets or of
running requests.
"""

from __future__ import annotations

import uuid
from typing import Any

import msgspec

from frontend.answer_parser import AnswerParser, Part, Thoughts
from frontend.responses_types import (
    FunctionCallItem,
    IncompleteDetails,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseBody,
    ResponseError,
    ResponseUsage,
)
from frontend.tool_calls import CallDelta
from protocol.messages import FinishReason

_encode = msgspec.json.encode


class ResponseAnswer:
    """One response. What its methods return are the events of a stream, encoded.

    Attributes:
        body: the response so far.
    """

    def __init__(self, body: ResponseBody, parser: AnswerParser | None) -> None:
        self.body = body
        self._parser = parser
        self._sequence_number = 0
        self._item: OutputItem | None = None
        self._thoughts: list[str] = []
        self._texts: list[str] = []  # of the item that is being written

    @property
    def thoughts(self) -> str:
        return "".join(self._thoughts)

    def begin(self) -> list[bytes]:
        return [self._event(f"response.{what}", response=self.body) for what in ("created", "in_progress")]

    def feed(self, text: str, is_last: bool = False) -> list[bytes]:
        """New text of the answer."""
        events: list[bytes] = []
        if self._parser is None:
            if text:
                self._add(text, events)
            return events
        for part in self._parser.feed(text, is_last):
            self._add(part, events)
        if self._parser.is_plain:
            self._parser = None
        return events

    def end(self, reason: FinishReason, usage: ResponseUsage) -> list[bytes]:
        """All of the text is there."""
        events: list[bytes] = []
        self._close_item(events, is_complete=reason == "stop")
        self.body.usage = usage
        if reason == "stop":
            self.body.status = "completed"
        elif reason == "length":
            self.body.status = "incomplete"
            self.body.incomplete_details = IncompleteDetails("max_output_tokens")
        else:
            self.body.status = "cancelled"
        # There is no event of its own for a response that was cancelled.
        what = "completed" if reason == "stop" else "incomplete"
        events.append(self._event(f"response.{what}", response=self.body))
        return events

    def fail(self, message: str) -> list[bytes]:
        """The answer cannot be finished."""
        events: list[bytes] = []
        self._close_item(events, is_complete=False)
        self.body.status = "failed"
        self.body.error = ResponseError("server_error", message)
        events.append(self._event("response.failed", response=self.body))
        return events

    def _add(self, part: Part, events: list[bytes]) -> None:
        if isinstance(part, str):
            if not isinstance(self._item, MessageItem):
                self._open_item(MessageItem(_new_id("msg"), []), events, OutputText(""))
            events.append(self._content_event("response.output_text.delta", delta=part, logprobs=[]))
            self._texts.append(part)
        elif isinstance(part, Thoughts):
            if not isinstance(self._item, ReasoningItem):
                self._open_item(ReasoningItem(_new_id("rs"), []), events, ReasoningText(""))
            events.append(self._content_event("response.reasoning_text.delta", delta=part.text))
            self._texts.append(part.text)
            self._thoughts.append(part.text)
        else:
            self._add_call(part, events)

    def _add_call(self, part: CallDelta, events: list[bytes]) -> None:
        if part.name is not None:
            self._open_item(FunctionCallItem(_new_id("fc"), _new_id("call"), part.name), events)
        if part.arguments:
            events.append(self._item_event("response.function_call_arguments.delta", delta=part.arguments))
            self._texts.append(part.arguments)

    def _open_item(
        self, item: OutputItem, events: list[bytes], content: OutputText | ReasoningText | None = None
    ) -> None:
        self._close_item(events, is_complete=True)
        self._item = item
        # A list of its own: the body's default is shared.
        self.body.output = [*self.body.output, item]
        events.append(self._event("response.output_item.added", output_index=self._output_index, item=item))
        if content is not None:
            events.append(self._content_event("response.content_part.added", part=content))

    def _close_item(self, events: list[bytes], is_complete: bool) -> None:
        item, text, self._texts = self._item, "".join(self._texts), []
        if item is None:
            return
        if isinstance(item, FunctionCallItem):
            item.arguments = text
            done = "response.function_call_arguments.done"
            events.append(self._item_event(done, name=item.name, arguments=text))
        elif isinstance(item, ReasoningItem):
            item.content = [ReasoningText(text)]
            events.append(self._content_event("response.reasoning_text.done", text=text))
            events.append(self._content_event("response.content_part.done", part=item.content[0]))
        else:
            item.content = [OutputText(text)]
            events.append(self._content_event("response.output_text.done", text=text, logprobs=[]))
            events.append(self._content_event("response.content_part.done", part=item.content[0]))
        item.status = "completed" if is_complete else "incomplete"
        events.append(self._event("response.output_item.done", output_index=self._output_index, item=item))
        self._item = None

    @property
    def _output_index(self) -> int:
        return len(self.body.output) - 1

    def _content_event(self, type: str, **fields: Any) -> bytes:
        return self._item_event(type, content_index=0, **fields)

    def _item_event(self, type: str, **fields: Any) -> bytes:
        assert self._item is not None
        return self._event(type, item_id=self._item.id, output_index=self._output_index, **fields)

    def _event(self, type: str, **fields: Any) -> bytes:
        body = {"type": type, "sequence_number": self._sequence_number, **fields}
        self._sequence_number += 1
        return b"event: " + type.encode() + b"\ndata: " + _encode(body) + b"\n\n"


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
