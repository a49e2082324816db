"""Blocks are counted exactly, and reused least recently freed first."""

import pytest

from core.block_pool import NULL_BLOCK, BlockPool
from core.prefix_cache import PrefixCache, digests_of, root_digest
from protocol.messages import pack_ints, unpack_ints


def test_the_null_block_is_never_given_out() -> None:
    pool = BlockPool(5, on_reuse=lambda block: None)
    assert NULL_BLOCK not in pool.allocate(4)
    assert pool.num_free == 0


def test_a_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(3, on_reuse=lambda block: None)
    (block,) = pool.allocate(1)
    pool.share([block])
    pool.release([block])
    assert not pool.is_free(block)
    pool.release([block])
    assert pool.is_free(block)
    assert pool.num_free == 2


def test_releasing_twice_is_a_bug() -> None:
    pool = BlockPool(3, on_reuse=lambda block: None)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(AssertionError, match="released twice"):
        pool.release([block])


def test_oldest_freed_is_reused_first_and_a_sequence_s_tail_before_its_head() -> None:
    reused: list[int] = []
    pool = BlockPool(7, on_reuse=reused.append)
    first, second = pool.allocate(3), pool.allocate(3)
    reused.clear()
    pool.release(first)
    pool.release(second)
    assert pool.allocate(6) == first[::-1] + second[::-1]
    assert reused == first[::-1] + second[::-1]


def test_a_shared_free_block_is_not_reused() -> None:
    pool = BlockPool(4, on_reuse=lambda block: None)
    blocks = pool.allocate(3)
    pool.release(blocks)
    pool.share([blocks[-1]])
    assert blocks[-1] not in pool.allocate(2)
    assert pool.num_free == 0


def test_equal_prefixes_have_equal_digests_and_salts_separate_them() -> None:
    tokens = unpack_ints(pack_ints(range(32)))
    changed = tokens.copy()
    changed[0] = 99
    chains = []
    for root, ids in (
        (root_digest(None), tokens),
        (root_digest(None), tokens.copy()),
        (root_digest("a"), tokens),
        (root_digest("b"), tokens),
        (root_digest(""), tokens),
        (root_digest(None), changed),
    ):
        chains.append(list(digests_of([], root, ids, 16, 2)))
    assert chains[0] == chains[1]
    # A difference in the first block, or in the salt, changes every digest after it.
    assert len({chain[1] for chain in chains[1:]}) == 5


def test_digests_are_made_when_they_are_asked_for() -> None:
    tokens = unpack_ints(pack_ints(range(64)))
    whole = list(digests_of([], root_digest(None), tokens, 16, 4))
    made: list[bytes] = []
    assert next(digests_of(made, root_digest(None), tokens, 16, 4)) == whole[0]
    assert made == whole[:1]
    for first, num_blocks in ((0, 1), (1, 1), (1, 3), (3, 4), (0, 4)):
        assert list(digests_of(made, root_digest(None), tokens, 16, num_blocks, first)) == whole[first:num_blocks]
    assert made == whole


def test_a_lookup_makes_no_digests_past_the_first_unknown_block() -> None:
    tokens = unpack_ints(pack_ints(range(64)))
    cache, made = PrefixCache(), []
    cache.register(next(digests_of([], root_digest(None), tokens, 16, 1)), 7)
    assert cache.find(digests_of(made, root_digest(None), tokens, 16, 4)) == [7]
    assert len(made) == 2


def test_lookup_stops_at_the_first_unknown_block() -> None:
    cache = PrefixCache()
    cache.register(b"a", 1)
    cache.register(b"b", 2)
    cache.register(b"c", 3)
    assert cache.find([b"a", b"b", b"c"]) == [1, 2, 3]
    cache.forget(2)
    assert cache.find([b"a", b"b", b"c"]) == [1]


def test_the_first_block_with_some_content_stays_the_one_that_is_found() -> None:
    cache = PrefixCache()
    cache.register(b"a", 1)
    cache.register(b"a", 2)
    cache.forget(2)
    assert cache.find([b"a"]) == [1]
    cache.forget(1)
    assert len(cache) == 0
