"""Arrays of numbers as they travel in messages: raw little-endian bytes, which NumPy reads without a copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct

Int32Array = bytes
Int64Array = bytes
Float32Array = bytes


def pack_ints(values: Sequence[int] | np.ndarray, dtype: str = "<i4") -> bytes:
    """Raw little-endian bytes of a one-dimensional integer sequence."""
    return np.ascontiguousarray(values, dtype=dtype).tobytes()


def unpack_ints(data: bytes, dtype: str = "<i4") -> np.ndarray:
    """Read-only view of `pack_ints` bytes, without a copy."""
    return np.frombuffer(data, dtype=dtype)


def pack_floats(values: Sequence[float] | np.ndarray) -> bytes:
    """Raw little-endian bytes of numbers, as float32, row by row."""
    return np.ascontiguousarray(values, dtype="<f4").tobytes()


def unpack_floats(data: bytes) -> np.ndarray:
    """Read-only view of `pack_floats` bytes, without a copy."""
    return np.frombuffer(data, dtype="<f4")


def require_whole(message: Struct, names: Sequence[str], itemsize: int) -> None:
    """Raises ValueError if one of the fields is no array of items of this size."""
    for name in names:
        if len(getattr(message, name)) % itemsize:
            raise ValueError(f"{name} must hold whole {itemsize * 8}-bit numbers")


def require_same_count(message: Struct, *fields: tuple[str, int]) -> None:
    """Raises ValueError unless all (field, itemsize) hold equally many items."""
    counts = {name: len(getattr(message, name)) // itemsize for name, itemsize in fields}
    if len(set(counts.values())) > 1:
        raise ValueError(f"arrays differ in length: {counts}")
