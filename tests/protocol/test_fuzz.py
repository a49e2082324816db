"""No bytes make a decoder raise or take memory: every message of every connection, damaged in every way."""

from __future__ import annotations

import typing

import hypothesis
import msgspec
import psutil
import pytest

from protocol.messages import Malformed
from protocol.transport import Decoder, encode
from tests.protocol.test_messages import ALL, DECODERS, UNIONS, build
from tests.support.mutations import mutations

FRAMES_OF_A_KIND = 8
# What decoding may take beside what a frame itself takes, and what the allocator keeps.
MOST_GROWTH_BYTES = 64 * 1024 * 1024


def valid_frames(union: str) -> list[bytes]:
    """Some of each message of a connection, always the same ones."""
    frames: list[bytes] = []
    for kind in typing.get_args(UNIONS[union]):

        @hypothesis.settings(max_examples=FRAMES_OF_A_KIND, derandomize=True, database=None, deadline=None)
        @hypothesis.given(build(kind))
        def collect(message: msgspec.Struct) -> None:
            frames.append(encode(message))

        collect()
    return frames


def decode_damaged(union: str, count: int, seed: int) -> tuple[int, int]:
    """How many damaged frames were refused, and how many were messages after all."""
    decode: Decoder = DECODERS[union]
    kinds = typing.get_args(UNIONS[union])
    num_refused = num_valid = 0
    for frame in mutations(valid_frames(union), count, seed):
        message = decode(frame)
        if isinstance(message, Malformed):
            num_refused += 1
        else:
            assert isinstance(message, kinds)
            encode(message)
            num_valid += 1
    return num_refused, num_valid


def fuzz_all(count: int, seed: int) -> None:
    process = psutil.Process()
    for union in UNIONS:
        decode_damaged(union, 100, seed)
    before = process.memory_info().rss
    for union in UNIONS:
        num_refused, num_valid = decode_damaged(union, count // len(UNIONS) + 1, seed)
        # Damage that is always noticed, or never, is not what this is about.
        assert num_refused > count // 100
        assert num_valid > count // 1000
    assert process.memory_info().rss - before < MOST_GROWTH_BYTES


def test_every_connection_is_fuzzed() -> None:
    assert {kind for union in UNIONS for kind in typing.get_args(UNIONS[union])} == {kind for _, kind in ALL}


def test_damaged_frames_are_messages_or_malformed() -> None:
    fuzz_all(30_000, seed=1)


@pytest.mark.slow
def test_a_million_damaged_frames_are_messages_or_malformed() -> None:
    fuzz_all(1_000_000, seed=2)
