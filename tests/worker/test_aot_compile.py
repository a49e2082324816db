"""Every Triton kernel compiles for every GPU generation the project runs on, and fits its shared memory.

Triton compiles without a GPU. The configurations are those that the launchers would choose on that generation.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from worker.kernels import (  # noqa: E402
    attention_decode,
    attention_prefill,
    gumbel_sample,
    qk_norm_rope,
    rms_norm,
    silu_mul,
    step_metadata,
)

if triton.knobs.runtime.interpret:
    pytest.skip("Triton's interpreter does not compile", allow_module_level=True)

CAPABILITIES = [(8, 0), (8, 9), (9, 0), (12, 0)]
SHARED_MEMORY = {(8, 0): 163, (8, 9): 99, (9, 0): 227, (12, 0): 99}  # KiB that one block can have
ELEMENT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

INT32_POINTERS = {
    "row_slots_ptr", "query_start_ptr", "seq_lens_ptr", "block_table_ptr", "positions_ptr", "kv_lens_ptr",
    "items_ptr", "num_items_ptr", "arrived_ptr", "index_ptr", "status_ptr", "token_ptr",
}  # fmt: skip
INT64_POINTERS = {"cache_slots_ptr", "seeds_ptr"}
FP32_POINTERS = {"cos_sin_ptr", "temperature_ptr", "value_ptr", "partial_out_ptr", "partial_lse_ptr"}


def shared_memory(
    kernel: Any,
    capability: tuple[int, int],
    dtype: torch.dtype,
    constants: dict[str, Any],
    **options: int | None,
) -> int:
    """Compiles `kernel` for `capability` with 16-byte aligned pointers and strides; returns bytes of shared memory."""
    signature, divisible = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in INT32_POINTERS:
            signature[name] = "*i32"
        elif name in INT64_POINTERS:
            signature[name] = "*i64"
        elif name in FP32_POINTERS:
            signature[name] = "*fp32"
        elif name.endswith("_ptr"):
            signature[name] = "*" + ELEMENT[dtype]
        else:
            signature[name] = "fp32" if name in ("eps", "scale_log2") else "i32"
        if name.endswith(("_ptr", "_stride")):
            divisible[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=divisible)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    return int(triton.compile(source, target=target, options=options).metadata.shared)


def attention_cases(
    capability: tuple[int, int],
) -> list[tuple[str, Any, torch.dtype, dict[str, Any], dict[str, Any]]]:
    cases = []
    shapes = [  # dtype, query heads, key/value heads, head_dim, block_size
        (torch.bfloat16, 16, 8, 128, 16),
        (torch.bfloat16, 4, 2, 64, 16),
        (torch.float32, 4, 2, 128, 16),
    ]
    if capability in ((9, 0), (12, 0)):
        shapes += [(torch.bfloat16, 16, 8, 128, 256), (torch.float16, 40, 8, 128, 16)]
    for dtype, heads, kv_heads, head_dim, block_size in shapes:
        decode = attention_decode.decode_config(capability, head_dim, dtype.itemsize)
        constants = attention_decode.decode_constants(heads, kv_heads, head_dim, block_size, decode, dtype)
        options = {"num_warps": decode.num_warps, "num_stages": decode.num_stages}
        cases.append((f"decode {dtype} {head_dim}", attention_decode._decode_kernel, dtype, constants, options))
        for small in (False, True):
            prefill = attention_prefill.prefill_config(capability, head_dim, dtype.itemsize, small)
            constants = attention_prefill.prefill_constants(heads, kv_heads, head_dim, block_size, prefill, dtype)
            options = {"num_warps": prefill.num_warps, "num_stages": prefill.num_stages,
                       "maxnreg": prefill.maxnreg}  # fmt: skip
            cases.append((f"prefill {dtype} {head_dim} {small}", attention_prefill._prefill_kernel, dtype, constants,
                          options))  # fmt: skip
    return cases


def compile_attention_case(capability: tuple[int, int], index: int) -> tuple[str, int]:
    name, kernel, dtype, constants, options = attention_cases(capability)[index]
    return name, shared_memory(kernel, capability, dtype, constants, **options)


@pytest.fixture(scope="module")
def compilers() -> Iterator[ProcessPoolExecutor]:
    # Processes: in threads, Python 3.11's parser trips over another thread that parses (a SystemError about the
    # "recursion depth" of the AST), and a kernel is parsed when it is compiled.
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_attention_kernels_fit_the_device(capability: tuple[int, int], compilers: ProcessPoolExecutor) -> None:
    cases = range(len(attention_cases(capability)))
    for name, used in compilers.map(partial(compile_attention_case, capability), cases):
        assert used <= SHARED_MEMORY[capability] * 1024, f"{name} uses {used} bytes"


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_small_kernels_fit_the_device(capability: tuple[int, int]) -> None:
    bf16 = torch.bfloat16
    norm = dict(rms_norm.rms_norm_config(1024))
    warps = norm.pop("num_warps")
    limit = SHARED_MEMORY[capability] * 1024
    for add in (False, True):
        constants = {"HIDDEN": 1024, "ADD": add, **norm}
        assert shared_memory(rms_norm._rms_norm_kernel, capability, bf16, constants, num_warps=warps) <= limit
    constants = {"INTERMEDIATE": 3072, "BLOCK": 1024}
    assert shared_memory(silu_mul._silu_mul_kernel, capability, bf16, constants, num_warps=4) <= limit
    for norm_heads, head_dim in ((True, 128), (False, 64)):
        constants = {"NUM_HEADS": 16, "NUM_KV_HEADS": 8, "HEAD_DIM": head_dim, "HALF": head_dim // 2, "HEADS": 4,
                     "NORM": norm_heads}  # fmt: skip
        if not norm_heads:
            constants |= {"q_weight_ptr": None, "k_weight_ptr": None}
        kernel = qk_norm_rope._qk_norm_rope_cache_kernel
        assert shared_memory(kernel, capability, bf16, constants, num_warps=2) <= limit
    constants = {"BLOCK_SIZE": 16, "BLOCK": 128}
    assert shared_memory(step_metadata._step_metadata_kernel, capability, bf16, constants) <= limit
    config = attention_decode.decode_config(capability, 128, 2)
    constants = {"TILE": config.tile, "MIN_CHUNK": config.min_chunk, "ROWS": 512, "ITEM": 8, "BLOCK": 32}
    assert shared_memory(attention_decode._schedule_kernel, capability, bf16, constants) <= limit
    for noise in (False, True):
        constants = {"VOCAB": 151936, "BLOCK": 2048, "STRETCHES": 75, "NOISE": noise}
        if not noise:
            constants |= dict.fromkeys(("row_slots_ptr", "temperature_ptr", "seeds_ptr", "positions_ptr"))
        assert shared_memory(gumbel_sample._partial_kernel, capability, bf16, constants) <= limit
    constants = {"STRETCHES": 75, "BLOCK": 128}
    assert shared_memory(gumbel_sample._reduce_kernel, capability, bf16, constants, num_warps=1) <= limit
