"""Every message survives the wire, and nothing else gets through it."""

import typing

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import launcher_messages, messages
from protocol.histogram import HistogramCounts
from protocol.messages import Malformed, pack_ints, unpack_ints
from protocol.sampling import SamplingParams
from protocol.transport import Decoder, encode

UNIONS = {
    name: getattr(messages, name)
    for name in (
        "ClientMessage",
        "FrontendMessage",
        "FrontendToCore",
        "CoreToFrontend",
        "CoreToWorker",
        "WorkerToCore",
    )
} | {name: getattr(launcher_messages, name) for name in ("ToLauncher", "FromLauncher")}
DECODERS = {name: Decoder(union) for name, union in UNIONS.items()}

text = st.text(max_size=20)
int32 = st.integers(-(2**31), 2**31 - 1)
int64 = st.integers(-(2**63), 2**63 - 1)
count = st.integers(0, 2**40)

sampling_params = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_p=st.floats(0.001, 1),
    top_k=st.integers(-1, 2**31 - 1),
    min_p=st.floats(0, 1),
    seed=st.none() | int64,
    max_tokens=st.none() | st.integers(1, 2**31 - 1),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=3),
    stop_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=3),
    ignore_eos=st.booleans(),
    skip_special_tokens=st.booleans(),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.1, 10),
    logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=3),
    bad_words=st.lists(st.text(min_size=1, max_size=5), max_size=3),
    allowed_token_ids=st.none() | st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=3),
    n=st.integers(1, 128),
    min_tokens=st.integers(0, 1),
    include_stop_str_in_output=st.booleans(),
    logprobs=st.none() | st.integers(-1, 20),
    prompt_logprobs=st.none() | st.integers(-1, 20),
    truncate_prompt_tokens=st.none() | st.just(-1) | st.integers(1, 2**31 - 1),
)
json_value = st.recursive(
    st.none() | st.booleans() | int32 | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)


def int_arrays(*names: str, dtype: str = "<i4") -> dict[str, st.SearchStrategy[bytes]]:
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    array = st.lists(st.integers(low, high), min_size=3, max_size=3).map(lambda values: pack_ints(values, dtype))
    return dict.fromkeys(names, array)


BY_FIELD_TYPE = {
    int: count,
    float: st.floats(allow_nan=False),
    str: text,
    bool: st.booleans(),
    SamplingParams: sampling_params,
    dict[str, typing.Any]: st.dictionaries(text, json_value, max_size=3),
    dict[str, str | int | float]: st.dictionaries(text, text | int32, max_size=3),
    list[dict[str, typing.Any]]: st.lists(st.dictionaries(text, json_value, max_size=3), max_size=3),
    list[tuple[int, str]]: st.lists(st.tuples(int64, text), max_size=3),
    list[int]: st.lists(int64, max_size=3),
    # Fields whose text or number is checked by nobody before it is used as a limit.
    messages.FinishReason: st.sampled_from(typing.get_args(messages.FinishReason)),
    messages.ErrorKind: st.sampled_from(typing.get_args(messages.ErrorKind)),
    HistogramCounts: st.lists(st.floats(allow_nan=False), max_size=3).map(
        lambda bounds: HistogramCounts(bounds, [7] * (len(bounds) + 1), 1.5)
    ),
}
RAW_FIELDS = {
    "request_ids": int_arrays("x", dtype="<i8")["x"],
    "prefill_samples": st.binary(min_size=3, max_size=3),
}
NESTED = (messages.EngineInfo, messages.Finished, messages.AdmittedSlot, *typing.get_args(messages.Prompt))


def strategy_for(hint: object, name: str) -> st.SearchStrategy:
    if hint is bytes:
        return RAW_FIELDS.get(name, int_arrays("x")["x"])
    if hint in BY_FIELD_TYPE:
        return BY_FIELD_TYPE[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return strategy_for(arguments[0], name)
    if origin is list:
        return st.lists(strategy_for(arguments[0], name), max_size=3)
    if hint is type(None):
        return st.none()
    if arguments:
        return st.one_of([strategy_for(argument, name) for argument in arguments])
    assert issubclass(hint, msgspec.Struct), f"no strategy for {name}: {hint}"  # type: ignore[arg-type]
    return build(hint)


def build(kind: type[msgspec.Struct]) -> st.SearchStrategy:
    hints = typing.get_type_hints(kind, include_extras=True)
    return st.builds(kind, **{name: strategy_for(hints[name], name) for name in kind.__struct_fields__})


ALL = [(name, kind) for name, union in UNIONS.items() for kind in typing.get_args(union)]


def test_every_message_class_travels_on_some_arrow() -> None:
    declared = {
        kind
        for module in (messages, launcher_messages)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, messages.Message)
    } - {messages.Message, messages.HotMessage}
    assert declared == {kind for _, kind in ALL} | set(typing.get_args(messages.Prompt))


@pytest.mark.parametrize(("union", "kind"), ALL, ids=lambda value: getattr(value, "__name__", value))
def test_message_round_trips(union: str, kind: type[msgspec.Struct]) -> None:
    @settings(max_examples=40, deadline=None)
    @given(build(kind))
    def check(message: msgspec.Struct) -> None:
        assert DECODERS[union](encode(message)) == message

    check()


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(UNIONS)), st.binary(max_size=200))
def test_bytes_that_are_no_message_are_refused_without_an_exception(union: str, data: bytes) -> None:
    decoded = DECODERS[union](data)
    assert isinstance(decoded, Malformed) or encode(decoded)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_damaged_messages_never_raise(data: st.DataObject) -> None:
    union, kind = data.draw(st.sampled_from(ALL))
    frame = bytearray(encode(data.draw(build(kind))))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    decoded = DECODERS[union](bytes(frame[: data.draw(st.integers(0, len(frame)))]))
    assert isinstance(decoded, (Malformed, *(kind for _, kind in ALL)))


def test_deeply_nested_bytes_are_refused() -> None:
    for union, decoder in DECODERS.items():
        assert isinstance(decoder(b"\x91" * 100_000), Malformed), union


def test_an_array_of_half_integers_is_refused() -> None:
    good = messages.StepOutputs(0, pack_ints([1], "<i8"), pack_ints([2]))
    frame = encode(good).replace(b"\xc4\x04\x02\x00\x00\x00", b"\xc4\x03\x02\x00\x00")
    decoded = DECODERS["CoreToFrontend"](frame)
    assert isinstance(decoded, Malformed)
    assert "whole 32-bit numbers" in decoded.reason


def test_arrays_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        messages.Outputs(pack_ints([1, 2], "<i8"), pack_ints([2]))


def test_unpacked_integers_are_a_view() -> None:
    data = pack_ints([1, -2, 3])
    array = unpack_ints(data)
    assert array.tolist() == [1, -2, 3]
    assert np.shares_memory(array, np.frombuffer(data, np.uint8))
    assert not array.flags.writeable
