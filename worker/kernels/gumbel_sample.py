"""Draws the next token of each row from its logits: greedy, or by temperature with counter-based Gumbel noise.

What a row draws is a function of (seed, position) and its logits alone: the batch, the slot and the process it runs
in play no part. Two launches, partial maxima by stretches of the vocabulary, then one program a row, so that a
single row still uses the whole chip.
"""

from __future__ import annotations

import torch

from worker.kernels._triton import cdiv, next_power_of_2, tl, triton


@triton.jit
def _uniform(bits):
    """(0, 1) from 32 random bits. 23 of them, so that the largest value is 1 - 2**-24 exactly, never 1."""
    return ((bits >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)


@triton.jit(do_not_specialize_on_alignment=["row_slots_ptr", "positions_ptr"])
def _partial_kernel(
    logits_ptr,
    row_slots_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    value_ptr,
    index_ptr,
    status_ptr,
    logits_stride,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    STRETCHES: tl.constexpr,
    NOISE: tl.constexpr,
):
    stretch = tl.program_id(0)
    row = tl.program_id(1)
    if NOISE:  # loaded first: the seed waits for the slot, and the logits need not wait for either
        slot = tl.load(row_slots_ptr + row)
        position = tl.load(positions_ptr + row).to(tl.uint32)
        temperature = tl.load(temperature_ptr + slot)
        seed = tl.load(seeds_ptr + slot)
    index = stretch * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row.to(tl.int64) * logits_stride + index, mask=index < VOCAB, other=-float("inf")).to(
        tl.float32
    )
    status = tl.where(logits < float("inf"), (logits > -float("inf")).to(tl.int32), 2)  # NaN is less than nothing
    score = logits
    if NOISE:  # noqa: SIM102 - the outer condition is decided when the kernel is compiled
        if temperature > 0.0:
            # One Philox call gives the noise of four neighbours in the vocabulary.
            counter = (stretch * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
            zero = counter * 0
            a, b, c, d = tl.philox(seed, counter, zero + position, zero, zero)
            bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK,))
            # The inner logarithm must be accurate near 1, where the noise is largest; the outer one need not.
            score = logits * (1.0 / temperature) - 0.6931471805599453 * tl.log2(-tl.log(_uniform(bits)))
    best, offset = tl.max(score, axis=0, return_indices=True)  # the lowest index of equals
    at = row * STRETCHES + stretch
    tl.store(value_ptr + at, best)
    tl.store(index_ptr + at, stretch * BLOCK + offset)
    tl.store(status_ptr + at, tl.max(status, axis=0))  # 2: NaN or +inf, 1: a finite logit, 0: neither


@triton.jit(do_not_specialize_on_alignment=["token_ptr"])
def _reduce_kernel(value_ptr, index_ptr, status_ptr, token_ptr, STRETCHES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < STRETCHES
    value = tl.load(value_ptr + row * STRETCHES + offsets, mask=mask, other=-float("inf"))
    index = tl.load(index_ptr + row * STRETCHES + offsets, mask=mask, other=2147483647)
    status = tl.load(status_ptr + row * STRETCHES + offsets, mask=mask, other=0)
    best = tl.max(value, axis=0)
    token = tl.min(tl.where(value == best, index, 2147483647), axis=0)
    tl.store(token_ptr + row, tl.where(tl.max(status, axis=0) == 1, token, -1))


def sample_block(rows: int) -> int:
    """Logits a program: few rows need many programs to fill the chip, many rows save on reductions."""
    return 1024 if rows <= 8 else 2048


def _launch(
    logits: torch.Tensor,
    row_slots: torch.Tensor | None,
    temperature: torch.Tensor | None,
    seeds: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> torch.Tensor:
    rows, vocab = logits.shape
    block = min(sample_block(rows), max(16, next_power_of_2(vocab)))
    stretches = cdiv(vocab, block)
    token = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if rows == 0:
        return token
    value = torch.empty((rows, stretches), dtype=torch.float32, device=logits.device)
    index = torch.empty((rows, stretches), dtype=torch.int32, device=logits.device)
    status = torch.empty((rows, stretches), dtype=torch.int32, device=logits.device)
    _partial_kernel[(stretches, rows)](
        logits,
        row_slots,
        temperature,
        seeds,
        positions,
        value,
        index,
        status,
        logits.stride(0),
        VOCAB=vocab,
        BLOCK=block,
        STRETCHES=stretches,
        NOISE=temperature is not None,
        num_warps=4,
    )
    _reduce_kernel[(rows,)](
        value, index, status, token, STRETCHES=stretches, BLOCK=next_power_of_2(stretches), num_warps=1
    )
    return token


def sample(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Draws a token a row: argmax(logits / temperature + Gumbel noise), or the arg-max where temperature is 0.

    The Gumbel-max trick (Gumbel 1954) draws exactly the softmax's distribution. The noise is Philox4x32-10
    (Salmon et al. 2011): key = the seed's low and high 32 bits, counter = (index // 4, position, choice, 0) with
    choice 0, word index % 4; u = ((word >> 9) + 0.5) * 2**-23; noise = -log(-log(u)). Logits of -inf are never
    drawn. The lowest index wins ties.
    Reads rows * vocab logits once; a Philox call (about 100 integer operations) per four of them.

    Args:
        logits: [rows, vocab] fp32 or bf16, rows may be strided.
        row_slots: [rows] int32.
        temperature: [slots + 1] fp32, 0 for greedy.
        seeds: [slots + 1] int64.
        positions: [rows] int32, position of the token being drawn.

    Returns:
        [rows] int32; -1 for a row that holds NaN or +inf or has no finite logit.
    """
    return _launch(logits, row_slots, temperature, seeds, positions)


def argmax_sample(logits: torch.Tensor) -> torch.Tensor:
    """The arg-max of each row; `sample` with every temperature 0, without the code for noise.

    Args:
        logits: [rows, vocab] fp32 or bf16, rows may be strided.

    Returns:
        [rows] int32; the lowest index among equals, -1 for a row that holds NaN or +inf or has no finite logit.
    """
    return _launch(logits, None, None, None, None)


def argmax_sample_reference(logits: torch.Tensor) -> torch.Tensor:
    """`argmax_sample` in plain torch, for any device."""
    return _best(logits, logits)


def _best(score: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The index of each row's best score; -1 where the logits behind it are unusable."""
    # A NaN anywhere in a row is its maximum.
    usable = logits.amax(-1).isfinite()
    return torch.where(usable, score.argmax(-1).to(torch.int32), -1)


def sample_reference(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """`sample` in plain torch, for any device; only rows with a temperature pay for noise."""
    row_temperature = temperature[row_slots]
    noisy = torch.nonzero(row_temperature > 0).flatten()
    if noisy.numel() == 0:
        return argmax_sample_reference(logits)
    noise = gumbel_noise(seeds[row_slots[noisy]], positions[noisy], logits.shape[1])
    score = logits.float()
    score = score.clone() if score is logits else score
    score[noisy] = score[noisy] * (1.0 / row_temperature[noisy, None]) + noise
    return _best(score, logits)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """The noise that `sample` adds.

    Args:
        seeds: [rows] int64.
        positions: [rows] int32.
        vocab: size of the vocabulary.

    Returns:
        [rows, vocab] fp32.
    """
    counter = torch.arange(cdiv(vocab, 4), dtype=torch.int64, device=seeds.device)
    words = philox4x32(seeds[:, None], counter[None, :], positions.long()[:, None])
    bits = torch.stack(words, dim=-1).flatten(1)[:, :vocab]
    u = ((bits >> 9).float() + 0.5) * 2.0**-23
    return u.log_().neg_().log_().neg_()


def philox4x32(seed: torch.Tensor, counter0: torch.Tensor, counter1: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10 of counter (counter0, counter1, 0, 0), in int64 arithmetic.

    Args:
        seed: int64, the key; broadcast with the counters.
        counter0, counter1: int64 in 0..2**32-1.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    low = 0xFFFFFFFF
    key0, key1 = seed & low, (seed >> 32) & low
    c0, c1 = torch.broadcast_tensors(counter0 & low, counter1 & low)
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        # The products wrap around in int64; their 64 bits, and so both halves, are right all the same.
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((product2 >> 32) & low) ^ c1 ^ key0, product2 & low
        c2, c3 = ((product0 >> 32) & low) ^ c3 ^ key1, product0 & low
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return c0, c1, c2, c3
