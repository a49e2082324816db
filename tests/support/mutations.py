"""Damaged frames, made of valid ones: flipped bits, cuts, splices, deep nesting, and lengths that promise too much."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

# Headers of msgpack that promise more than any frame holds: bin, str, array, map and ext of 32-bit lengths.
HUGE_LENGTHS = [bytes([kind]) + b"\xff\xff\xff\xff" for kind in (0xC6, 0xDB, 0xDD, 0xDF, 0xC9)]
NESTED = [b"\x91", b"\x81\xa1a", b"\xdc\x00\x01", b"\x81\x91"]


def mutations(frames: Sequence[bytes], count: int, seed: int) -> Iterator[bytes]:
    """So many damaged frames, the same ones for a seed."""
    draw = random.Random(seed)
    damages = (_flip, _cut, _insert, _replace, _huge, _nest)
    for _ in range(count):
        frame = bytearray(draw.choice(frames))
        for _ in range(draw.choice((1, 1, 1, 2, 4, 8))):
            if draw.random() < 0.1:
                other = draw.choice(frames)
                frame[draw.randint(0, len(frame)) :] = other[draw.randint(0, len(other)) :]
            else:
                draw.choice(damages)(frame, draw)
        yield bytes(frame)


def _place(frame: bytearray, draw: random.Random) -> int:
    return draw.randrange(len(frame)) if frame else 0


def _flip(frame: bytearray, draw: random.Random) -> None:
    if frame:
        frame[_place(frame, draw)] ^= 1 << draw.randrange(8)


def _cut(frame: bytearray, draw: random.Random) -> None:
    begin = _place(frame, draw)
    del frame[begin : begin + draw.choice((1, 4, len(frame)))]


def _insert(frame: bytearray, draw: random.Random) -> None:
    begin = _place(frame, draw)
    frame[begin:begin] = draw.randbytes(draw.choice((1, 2, 8, 64)))


def _replace(frame: bytearray, draw: random.Random) -> None:
    if frame:
        frame[_place(frame, draw)] = draw.choice((0x00, 0x7F, 0x80, 0x90, 0xC0, 0xC1, 0xCB, 0xCF, 0xD3, 0xE0, 0xFF))


def _huge(frame: bytearray, draw: random.Random) -> None:
    begin = _place(frame, draw)
    frame[begin : begin + draw.choice((0, 1))] = draw.choice(HUGE_LENGTHS)


def _nest(frame: bytearray, draw: random.Random) -> None:
    begin = _place(frame, draw)
    frame[begin:begin] = draw.choice(NESTED) * draw.choice((3, 30, 300, 3000))
