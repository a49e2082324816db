"""Every Triton kernel compiles for every GPU generation the project runs on, and fits its shared memory.

Triton compiles without a GPU. The configurations are those that the launchers would choose on that generation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from worker.kernels import (  # noqa: E402
    apply_changes,
    argmax_sample,
    attention_decode,
    attention_decode_hopper,
    attention_prefill,
    attention_prefill_hopper,
    commit_step,
    decode_schedule,
    edit_logits,
    filter_groups,
    filter_guess,
    filter_threshold,
    fused_linear,
    gumbel_sample,
    prefill_schedule,
    qk_norm_rope,
    rms_norm,
    silu_mul,
    step_metadata,
    tiled_linear,
)
from worker.kernels._logit_keys import KEY_SHIFT  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("Triton's interpreter does not compile", allow_module_level=True)

CAPABILITIES = [(8, 0), (8, 9), (9, 0), (12, 0)]
SHARED_MEMORY = {(8, 0): 163, (8, 9): 99, (9, 0): 227, (12, 0): 99}  # KiB that one block can have
SAMPLED_DTYPES = (torch.bfloat16, torch.float32)
ELEMENT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

INT32_POINTERS = {
    "row_slots_ptr", "query_start_ptr", "seq_lens_ptr", "block_table_ptr", "positions_ptr", "kv_lens_ptr",
    "items_ptr", "num_items_ptr", "arrived_ptr", "index_ptr", "status_ptr", "token_ptr",
    "changes_ptr", "group_list_ptr",
    "decode_rows_ptr", "last_token_ptr", "token_ids_ptr", "top_k_ptr", "keys_ptr", "last_keys_ptr",
    "tiles_ptr", "shares_ptr", "plan_ptr", "headers_ptr", "bias_ids_ptr", "bad_words_ptr", "recent_ptr", "allowed_ptr",
}  # fmt: skip
INT16_POINTERS = {"counts_ptr"}
INT64_POINTERS = {"cache_slots_ptr", "seeds_ptr"}
FP32_POINTERS = {
    "cos_sin_ptr", "temperature_ptr", "value_ptr", "partial_out_ptr", "partial_lse_ptr", "top_p_ptr", "min_p_ptr",
    "threshold_ptr", "highest_ptr", "lowest_ptr", "mass_ptr", "levels_ptr", "last_levels_ptr", "last_value_ptr",
    "penalties_ptr", "biases_ptr", "edited_ptr", "group_highest_ptr",
}  # fmt: skip


def shared_memory(
    kernel: Any,
    capability: tuple[int, int],
    dtype: torch.dtype,
    constants: dict[str, Any],
    descriptors: dict[str, list[int]] | None = None,
    **options: int | None,
) -> int:
    """Compiles `kernel` for `capability` with 16-byte aligned pointers and strides; returns bytes of shared memory.

    `descriptors` are the arguments that describe tensors for copies by boxes of this size, in a kernel in Gluon.
    """
    if "DEPENDENT" in kernel.arg_names:
        constants = {"DEPENDENT": capability >= (9, 0)} | constants
        options["launch_pdl"] = constants["DEPENDENT"]
    signature, divisible = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if descriptors and name in descriptors:
            layout = gl.NVMMASharedLayout(128, 8 * dtype.itemsize, len(descriptors[name]))
            sizes = ",".join(map(str, descriptors[name]))
            signature[name] = f"tensordesc<{ELEMENT[dtype]}[{sizes}],{layout!r}>"
        elif name in INT32_POINTERS:
            signature[name] = "*i32"
        elif name in INT16_POINTERS:
            signature[name] = "*i16"
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
    source = (GluonASTSource if descriptors else ASTSource)(kernel, signature, constexprs=constants, attrs=divisible)
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
        for rows, fused in ((1, False), (1, True), (16, True), (64, False)):
            decode = decode_schedule.decode_config(capability, head_dim, dtype.itemsize, rows)
            constants = attention_decode.decode_constants(heads, kv_heads, head_dim, block_size, decode, dtype)
            constants |= {"FUSED": fused, "NORM": fused, "PRELOAD": fused and rows == 1}
            if not fused:
                constants |= dict.fromkeys(("q_weight_ptr", "k_weight_ptr", "cos_sin_ptr"))
            options = {"num_warps": decode.num_warps, "num_stages": decode.num_stages}
            name = f"decode {dtype} {head_dim} {rows} rows, fused {fused}"
            cases.append((name, attention_decode._decode_kernel, dtype, constants, options))
        for small in (False, True):
            prefill = prefill_schedule.prefill_config(capability, head_dim, dtype.itemsize, small)
            constants = attention_prefill.prefill_constants(heads, kv_heads, head_dim, block_size, prefill, dtype)
            options = {"num_warps": prefill.num_warps, "num_stages": prefill.num_stages,
                       "maxnreg": prefill.maxnreg}  # fmt: skip
            cases.append((f"prefill {dtype} {head_dim} {small}", attention_prefill._prefill_kernel, dtype, constants,
                          options))  # fmt: skip
    for dtype, heads, kv_heads, block_size in (
        (torch.bfloat16, 16, 8, 16),
        (torch.bfloat16, 32, 8, 256),
        (torch.float16, 32, 4, 32),
        (torch.bfloat16, 8, 8, 64),
        (torch.bfloat16, 16, 1, 128),
    ):
        group = heads // kv_heads
        hopper = prefill_schedule.hopper_config(capability, group, 128, dtype.itemsize)
        if hopper is not None:
            constants = attention_prefill_hopper.hopper_prefill_constants(heads, kv_heads, block_size, hopper)
            box = [min(block_size, hopper.tile), 64]
            boxes = {"query_desc": [hopper.block_m // 2 // group, group, 64], "key_desc": box, "value_desc": box}
            name = f"prefill of whole tiles {dtype} {heads} {kv_heads} {block_size}"
            cases.append((name, attention_prefill_hopper._hopper_prefill_kernel, dtype, constants,
                          {"num_warps": hopper.num_warps, "descriptors": boxes}))  # fmt: skip
    for dtype, heads, kv_heads, block_size, norm in (
        (torch.bfloat16, 16, 8, 16, True),
        (torch.bfloat16, 40, 8, 256, True),
        (torch.float16, 32, 4, 32, False),
        (torch.bfloat16, 8, 8, 64, True),
    ):
        for rows in (1, 64):
            fused = decode_schedule.hopper_decode_config(capability, heads // kv_heads, 128, dtype.itemsize, rows)
            if fused is not None:
                constants = attention_decode_hopper.hopper_decode_constants(heads, kv_heads, block_size, fused)
                constants |= {"NORM": norm}
                if not norm:
                    constants |= dict.fromkeys(("q_weight_ptr", "k_weight_ptr"))
                box = [min(block_size, fused.tile), 64]
                options = {"num_warps": fused.num_warps, "maxnreg": attention_decode_hopper.MAX_REGISTERS,
                           "descriptors": {"key_desc": box, "value_desc": box}}  # fmt: skip
                name = f"fused decode {dtype} {heads} {kv_heads} {block_size} {rows} rows"
                kernel = attention_decode_hopper._hopper_decode_kernel
                cases.append((name, kernel, dtype, constants, options))
    return cases


def check_attention_kernels(capability: tuple[int, int]) -> None:
    for name, kernel, dtype, constants, options in attention_cases(capability):
        used = shared_memory(kernel, capability, dtype, constants, **options)
        assert used <= SHARED_MEMORY[capability] * 1024, f"{name} uses {used} bytes"
        if name.startswith("fused decode"):
            # A multiprocessor has 228 KiB for all of its programs and keeps 1 KiB for each.
            programs = 2 if name.endswith("64 rows") else 1
            assert programs * (used + 1024) <= 228 * 1024, f"{name} uses {used} bytes"


def check_small_kernels(capability: tuple[int, int]) -> None:
    bf16 = torch.bfloat16
    norm = dict(rms_norm.rms_norm_config(1024))
    warps = norm.pop("num_warps")
    limit = SHARED_MEMORY[capability] * 1024
    constants = {"HIDDEN": 1024, **norm}
    assert shared_memory(rms_norm._rms_norm_kernel, capability, bf16, constants, num_warps=warps) <= limit
    constants = {"INTERMEDIATE": 3072, "BLOCK": 1024}
    assert shared_memory(silu_mul._silu_mul_kernel, capability, bf16, constants, num_warps=4) <= limit
    for norm_heads, head_dim, heads, warps in ((True, 128, 4, 2), (False, 64, 4, 2), (True, 128, 32, 8)):
        constants = {"NUM_HEADS": 16, "NUM_KV_HEADS": 8, "HEAD_DIM": head_dim, "HALF": head_dim // 2, "HEADS": heads,
                     "NORM": norm_heads}  # fmt: skip
        if not norm_heads:
            constants |= {"q_weight_ptr": None, "k_weight_ptr": None}
        kernel = qk_norm_rope._qk_norm_rope_cache_kernel
        assert shared_memory(kernel, capability, bf16, constants, num_warps=warps) <= limit
    small_memory = SHARED_MEMORY[capability] == 99
    for rows in (1, 8, 16):
        for outputs, inputs, activate in (
            (4096, 1024, False), (1024, 2048, False), (3072, 1024, True), (1024, 3072, False), (9728, 2560, True),
            (2560, 4096, False),
        ):  # fmt: skip
            linear = fused_linear.linear_config(rows, outputs, inputs, activate=activate, small_memory=small_memory)
            if linear is None:
                continue  # cuBLAS
            constants = fused_linear.linear_constants(rows, outputs, inputs, linear, bf16)
            constants |= {"NORM": inputs == 1024, "ACTIVATE": activate, "ADD": not activate}
            if inputs != 1024:
                constants["norm_ptr"] = None
            used = shared_memory(
                fused_linear._linear_kernel, capability, bf16, constants, num_warps=linear.num_warps, num_stages=1
            )
            assert used <= limit, f"{rows} rows, {outputs} x {inputs}: {used} bytes"
    for outputs, inputs, activate in (
        (4096, 1024, False),
        (1024, 2048, False),
        (3072, 1024, True),
        (1024, 3072, False),
    ):
        tiled = tiled_linear.tiled_config(outputs, inputs, activate=activate)
        assert tiled is not None
        constants = tiled_linear.tiled_constants(outputs, inputs, tiled, bf16)
        constants |= {"ACTIVATE": activate, "ADD": not activate}
        if tiled.splits == 1:
            constants |= {"partial_out_ptr": None, "arrived_ptr": None}
        options = {"num_warps": tiled.num_warps, "num_stages": tiled.num_stages}
        used = shared_memory(tiled_linear._tiled_linear_kernel, capability, bf16, constants, **options)
        # Only devices with the memory for it run it.
        assert used <= limit or small_memory, f"tiled {outputs} x {inputs}: {used} bytes"
    constants = {"HEADER": apply_changes.HEADER, "FIELDS": apply_changes.FIELDS, "BLOCK": 256}
    assert shared_memory(apply_changes._apply_changes_kernel, capability, bf16, constants) <= limit
    for kernel in (commit_step._commit_lengths_kernel, commit_step._commit_tokens_kernel):
        assert shared_memory(kernel, capability, bf16, {"BLOCK": 128}) <= limit
    constants = {"BLOCK_SIZE": 16, "BLOCK": 128}
    assert shared_memory(step_metadata._step_metadata_kernel, capability, bf16, constants) <= limit
    config = decode_schedule.decode_config(capability, 128, 2, 512)
    constants = {"TILE": config.tile, "MIN_CHUNK": config.min_chunk, "WHOLE_ROW": 512, "ROWS": 512, "ITEM": 8,
                 "BLOCK": 32}  # fmt: skip
    assert shared_memory(decode_schedule._schedule_kernel, capability, bf16, constants) <= limit
    prefill = prefill_schedule.prefill_config(capability, 128, 2, small=False)
    constants = prefill_schedule.prefill_schedule_constants(prefill, 33, 2, 641)
    assert shared_memory(prefill_schedule._schedule_kernel, capability, bf16, constants, num_warps=8) <= limit
    constants = {"VOCAB": 151936, "BLOCK": 2048, "STRETCHES": 75}
    assert shared_memory(argmax_sample._partial_kernel, capability, bf16, constants) <= limit
    constants = {"STRETCHES": 75, "BLOCK": 128}
    assert shared_memory(argmax_sample._reduce_kernel, capability, bf16, constants, num_warps=1) <= limit


def check_sampling_kernels(capability: tuple[int, int], dtype: torch.dtype) -> None:
    limit = SHARED_MEMORY[capability] * 1024
    stretch, draw = gumbel_sample._stretch_kernel, gumbel_sample._draw_kernel
    begin, search, finish = (
        filter_threshold._begin_kernel, filter_threshold._pass_kernel, filter_threshold._finish_kernel,
    )  # fmt: skip
    for vocab, stretches in ((151936, 75), (1000, 1)):
        cut = {"VOCAB": vocab, "BLOCK": min(2048, triton.next_power_of_2(vocab)), "STRETCHES": stretches,
               "DEPENDENT": capability >= (9, 0)}  # fmt: skip
        groups = {"GROUPS": cut["BLOCK"] // gumbel_sample.GROUP}
        no_filter = ("lowest_ptr", "group_highest_ptr")
        for absent in (("threshold_ptr", *no_filter), ("threshold_ptr",), no_filter):
            assert shared_memory(stretch, capability, dtype, cut | groups | dict.fromkeys(absent)) <= limit
        padded = {"PADDED": triton.next_power_of_2(stretches)}
        for absent in ((), ("threshold_ptr",)):
            constants = cut | {"PADDED": max(4, padded["PADDED"])} | dict.fromkeys(absent)
            assert shared_memory(draw, capability, dtype, constants, num_warps=8) <= limit
        shift = {"SHIFT": KEY_SHIFT[dtype]}
        groups = {"GROUPS": stretches * groups["GROUPS"], "GROUP": gumbel_sample.GROUP}
        groups |= {"PADDED_GROUPS": triton.next_power_of_2(groups["GROUPS"]), "MOST_GROUPS": filter_groups.MOST_GROUPS}
        guesses = {"GUESSES": filter_guess.GUESSES}
        constants = cut | padded | shift | groups | guesses
        constants |= {"LOOKED_AT": filter_guess.looked_at(groups["GROUPS"]), "NEIGHBOURS": filter_guess.NEIGHBOURS}
        del constants["BLOCK"]
        assert shared_memory(begin, capability, dtype, constants, num_warps=16) <= limit
        constants = cut | padded | shift | {"PIVOTS": filter_threshold.PIVOTS}
        for absent in ((), ("last_value_ptr",)):
            options = constants | guesses | dict.fromkeys(absent)
            assert shared_memory(search, capability, dtype, options, num_warps=2) <= limit
        assert shared_memory(finish, capability, dtype, constants, num_warps=8) <= limit


def check_logit_edits(capability: tuple[int, int]) -> None:
    limit = SHARED_MEMORY[capability] * 1024
    for vocab in (151936, 1000):
        sizes = {"VOCAB": vocab, "WORD": edit_logits.WORD_TOKENS}
        constants = sizes | {"BLOCK": min(2048, triton.next_power_of_2(vocab)), "MAX_BIASES": 1282, "MAX_WORDS": 256}
        for dtype in (torch.bfloat16, torch.float32):
            assert shared_memory(edit_logits._edit_kernel, capability, dtype, constants) <= limit
        assert shared_memory(edit_logits._record_kernel, capability, torch.float32, sizes | {"BLOCK": 128}) <= limit


# With about how many seconds they take.
CHECKS: list[tuple[float, Callable[..., None], tuple[Any, ...]]] = [
    *((45, check_attention_kernels, (capability,)) for capability in CAPABILITIES),
    *((9, check_small_kernels, (capability,)) for capability in CAPABILITIES),
    *((8, check_sampling_kernels, (capability, dtype)) for capability in CAPABILITIES for dtype in SAMPLED_DTYPES),
    *((2, check_logit_edits, (capability,)) for capability in CAPABILITIES),
]


def parameter(
    seconds: float, check: Callable[..., None], capability: tuple[int, int], dtype: torch.dtype | None = None
) -> Any:
    """A test's name, and its work in the background."""
    name = f"{check.__name__.removeprefix('check_')}-sm_{capability[0]}{capability[1]}"
    name, args = (name, ()) if dtype is None else (f"{name}-{ELEMENT[dtype]}", (dtype,))
    return pytest.param(name, marks=pytest.mark.background(check, capability, *args, seconds=seconds))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [parameter(seconds, check, *args) for seconds, check, args in CHECKS])
def test_kernels_fit_the_device(name: str, of_background: None) -> None:
    """The check has run in the background, and its assertions hold."""
