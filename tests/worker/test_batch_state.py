"""A step's changes arrive at their slots, whatever else is in the buffer that brings them."""

from __future__ import annotations

import random

import torch

from protocol.messages import AdmittedSlot, Step, pack_ints
from worker.batch_state import RING_SIZE, SMALL_CHANGES, BatchState
from worker.kernels import select

SLOTS, MAX_MODEL_LEN, BLOCK_SIZE = 6, 128, 16
MAX_BLOCKS = MAX_MODEL_LEN // BLOCK_SIZE


def random_step(chooser: random.Random, slots: list[int], tables: dict[int, list[int]]) -> Step:
    """Admits the slots with some blocks each, and gives each slot that was there before another block."""
    old = [slot for slot in tables if slot not in slots and len(tables[slot]) < MAX_BLOCKS]
    added = [chooser.randrange(1, 1000) for _ in old]
    positions = [len(tables[slot]) for slot in old]
    for slot, block in zip(old, added, strict=True):
        tables[slot].append(block)
    admitted = []
    for slot in slots:
        tables[slot] = [chooser.randrange(1, 1000) for _ in range(chooser.randrange(1, 4))]
        admitted.append(
            AdmittedSlot(
                slot, pack_ints([1, 2, 3]), 2, chooser.randrange(3), pack_ints(tables[slot]), chooser.random(),
                chooser.randrange(50), chooser.random(), chooser.random(), chooser.getrandbits(63),
            )
        )  # fmt: skip
    return Step(
        step_id=0, epoch=0, admitted=admitted, new_block_slots=pack_ints(old),
        new_block_positions=pack_ints(positions), new_block_ids=pack_ints(added),
    )  # fmt: skip


def test_changes_come_to_their_slots_with_what_earlier_steps_left_behind_them_in_the_buffer() -> None:
    chooser = random.Random(0)
    state = BatchState(SLOTS, MAX_MODEL_LEN, BLOCK_SIZE, torch.device("cpu"), select("cpu"))
    tables: dict[int, list[int]] = {}
    latest: dict[int, AdmittedSlot] = {}
    turns = set()
    for _ in range(40):
        step = random_step(chooser, chooser.sample(range(SLOTS), chooser.randrange(3)), tables)
        count = state.stage_changes(step)
        assert (count > 0) == bool(step.admitted or step.new_block_slots)
        if count:
            # As a graph does it: always as much, of the buffer whose turn it is.
            assert count <= SMALL_CHANGES
            state.bring_changes(state.staging.turn, SMALL_CHANGES)
            state.staging.note_sent()
            turns.add(state.staging.turn)
        latest |= {admitted.slot: admitted for admitted in step.admitted}
        for slot, blocks in tables.items():
            assert state.block_table[slot, : len(blocks)].tolist() == blocks
        for slot, admitted in latest.items():
            assert state.seq_lens[slot] == state.host_lens[slot] == admitted.num_computed_tokens
            assert state.top_k[slot] == admitted.top_k
            assert state.seed[slot] == admitted.seed
            floats = torch.stack([state.temperature[slot], state.top_p[slot], state.min_p[slot]])
            torch.testing.assert_close(floats, torch.tensor([admitted.temperature, admitted.top_p, admitted.min_p]))
            assert state.known_tokens[slot].tolist() == [1, 2, 3]
    assert turns == set(range(RING_SIZE))


def test_a_step_that_changes_nothing_brings_nothing() -> None:
    state = BatchState(SLOTS, MAX_MODEL_LEN, BLOCK_SIZE, torch.device("cpu"), select("cpu"))
    assert state.stage_changes(Step(0, 0, decode_slots=pack_ints([0, 1]))) == 0
