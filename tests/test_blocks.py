"""The block manager: hand-worked scenarios, and random use against a model that remembers whole prefixes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.engine.blocks import BlockManager
from moesaic.errors import CapacityError, OptionError

A, B, C = [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]


def fill(manager: BlockManager, tokens: list[int]) -> list[int]:
    """Blocks for all of `tokens`, computed and published."""
    placed = manager.acquire(tokens, len(tokens))
    assert placed is not None
    manager.publish(tokens, placed[0], len(tokens))
    return placed[0]


def test_block_zero_is_never_handed_out_and_allocation_is_all_or_nothing() -> None:
    manager = BlockManager(5, 4)
    assert manager.capacity == 16
    assert manager.allocate(5) is None
    assert manager.available == 4
    blocks = manager.allocate(4)
    assert blocks is not None
    assert sorted(blocks) == [1, 2, 3, 4]
    assert manager.allocate(1) is None
    assert manager.allocate(0) == []
    manager.check([blocks])
    manager.free(blocks)
    assert manager.available == 4
    manager.check([])


@pytest.mark.parametrize(("num_blocks", "block_size"), [(1, 16), (0, 16), (8, 0)])
def test_impossible_sizes_are_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(OptionError, match="too few"):
        BlockManager(num_blocks, block_size)


@pytest.mark.parametrize(
    ("tokens", "limit", "expected"),
    [
        (A + B + C, 12, 2),  # C was never published
        (A + B + [5], 9, 2),
        (A + B, 8, 2),
        (A + B, 7, 1),  # whole blocks only, within the limit
        (A + B, 3, 0),
        (A + B, 0, 0),
        (A + C, 8, 1),
        (B, 4, 0),  # same tokens, another prefix
        (A[:3], 3, 0),
    ],
)
def test_match_finds_the_longest_cached_prefix(tokens: list[int], limit: int, expected: int) -> None:
    manager = BlockManager(9, 4)
    blocks = fill(manager, A + B)
    hit = manager.match(tokens, limit)
    assert hit == blocks[:expected]
    assert (manager.hits, manager.queried) == (4 * expected, 8 + limit)  # 8: the query of `fill`
    manager.check([blocks, hit])


def test_a_partly_computed_block_is_not_findable() -> None:
    manager = BlockManager(9, 4)
    placed = manager.acquire(A + B, 0)
    assert placed is not None
    for computed, findable in ((3, 0), (4, 1), (7, 1), (8, 2)):
        manager.publish(A + B, placed[0], computed)
        hit = manager.match(A + B, 8)
        assert hit == placed[0][:findable]
        manager.free(hit)
    manager.check([placed[0]])


def test_shared_blocks_live_until_the_last_reference_goes() -> None:
    manager = BlockManager(3, 4)
    first = fill(manager, A)
    second = manager.match(A, 4)
    assert second == first
    manager.free(first)
    assert manager.available == 1
    taken = manager.allocate(1)
    assert taken is not None
    assert taken != second
    assert manager.allocate(1) is None, "the shared block is still in use"
    manager.check([second, taken])
    manager.free(second)
    assert manager.match(A, 4) == second, "unreferenced content stays findable until it is needed"


def test_free_blocks_go_before_cached_ones_and_children_before_parents() -> None:
    manager = BlockManager(5, 4)
    blocks = fill(manager, A + B + C)  # 3 cached, 1 free once released
    manager.free(blocks)
    assert manager.available == 4
    (free,) = manager.allocate(1) or []
    assert free not in blocks
    assert manager.allocate(1) == [blocks[2]]
    assert manager.allocate(1) == [blocks[1]]
    assert manager.match(A + B + C, 12) == [blocks[0]]


def test_eviction_takes_the_least_recently_used() -> None:
    manager = BlockManager(4, 4)
    for tokens in (A, B, C):
        manager.free(fill(manager, tokens))
    manager.free(manager.match(A, 4))  # A is now the youngest
    taken = manager.allocate(1)
    assert taken is not None
    assert manager.match(B, 4) == []
    assert len(manager.match(C, 4)) == len(manager.match(A, 4)) == 1


def test_equal_blocks_computed_side_by_side_stay_private_but_share_their_continuation() -> None:
    manager = BlockManager(9, 4)
    (one, _), (two, _) = manager.acquire(A + B, 0) or ([], 0), manager.acquire(A + B, 0) or ([], 0)
    manager.publish(A + B, one, 4)
    manager.publish(A + B, two, 8)  # its A is a duplicate, its B the first of its kind
    manager.publish(A + B, one, 8)
    assert not set(one) & set(two)
    assert manager.match(A + B, 8) == [one[0], two[1]]
    manager.free([one[0], two[1]])
    manager.free(two)
    manager.free(one)
    manager.check([])
    assert manager.available == 8


def test_acquire_counts_the_cached_blocks_it_revives_as_no_longer_available() -> None:
    manager = BlockManager(4, 4)
    manager.free(fill(manager, A + B))  # 2 cached, 1 free
    before = (manager.queried, manager.hits)
    assert manager.acquire(A + B + C + [1], 13) is None, "4 blocks of 3"
    assert manager.acquire(A + B + C, 12, spare=1) is None, "3 blocks, and 1 to spare, of 3"
    assert (manager.queried, manager.hits) == before
    manager.check([])
    placed = manager.acquire(A + B + C, 11)
    assert placed is not None
    assert placed[1] == 8
    assert manager.available == 0
    manager.check([placed[0]])


def test_without_prefix_cache_nothing_is_found_or_kept() -> None:
    manager = BlockManager(4, 4, prefix_cache=False)
    blocks = fill(manager, A + B)
    assert manager.match(A + B, 8) == []
    assert (manager.queried, manager.hits) == (0, 0)
    manager.free(blocks)
    manager.check([])


def test_reset_forgets_everything_but_only_when_idle() -> None:
    manager = BlockManager(4, 4)
    blocks = fill(manager, A + B)
    with pytest.raises(CapacityError, match="2 of its 3 blocks are in use"):
        manager.reset()
    manager.free(blocks)
    manager.reset()
    manager.check([])
    assert manager.match(A + B, 8) == []
    assert manager.available == 3


def test_freeing_twice_is_caught() -> None:
    manager = BlockManager(4, 4)
    blocks = manager.allocate(1) or []
    manager.free(blocks)
    with pytest.raises(AssertionError, match="freed more often"):
        manager.free(blocks)


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m._free.append(m._free[0]),
        lambda m: m._free.pop(),
        lambda m: m._refs.__setitem__(1, 2),
        lambda m: m._cached.popitem(),
        lambda m: m._index.clear(),
        lambda m: m._identity.__setitem__(2, m._identity[1]),
        lambda m: m._key.__setitem__(3, None),
    ],
)
def test_check_notices_damage(damage) -> None:  # type: ignore[no-untyped-def]
    manager = BlockManager(9, 4)
    held = fill(manager, A)
    manager.free(fill(manager, B + C))
    manager.check([held])
    damage(manager)
    with pytest.raises(AssertionError):
        manager.check([held])


def prefixes(tokens: list[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[:end]) for end in range(size, len(tokens) + 1, size)]


OPERATION = st.tuples(
    st.sampled_from(["acquire", "acquire", "acquire", "publish", "publish", "free", "grow"]),
    st.lists(st.integers(0, 1), max_size=9),
    st.integers(0, 9),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(OPERATION, max_size=40), st.integers(2, 9), st.integers(1, 3))
def test_random_use_against_whole_prefixes(
    operations: list[tuple[str, list[int], int]], num_blocks: int, size: int
) -> None:
    """`content` is what a runner would have written into each block: the whole prefix that ends there.

    Every hit must hold exactly the prefix asked for; with no eviction so far it must also be the longest published.
    """
    manager = BlockManager(num_blocks, size)
    holders: list[tuple[list[int], list[int]]] = []
    content: dict[int, tuple[int, ...]] = {}
    published: set[tuple[int, ...]] = set()
    handed_out = 0
    for name, tokens, number in operations:
        if name == "acquire":
            before = manager.available
            placed = manager.acquire(tokens, number, spare=number % 3)
            if placed is None:
                assert manager.available == before
                continue
            blocks, computed = placed
            hits = computed // size
            assert computed % size == 0
            assert computed <= min(number, len(tokens))
            assert manager.available >= number % 3
            assert [content[block] for block in blocks[:hits]] == prefixes(tokens, size)[:hits]
            fresh = blocks[hits:]
            if handed_out <= num_blocks - 1:  # so far there was always a free block to take
                wanted = prefixes(tokens[: min(number, len(tokens))], size)
                assert hits == next((i for i, prefix in enumerate(wanted) if prefix not in published), len(wanted))
            handed_out += len(fresh)
            for block, prefix in zip(fresh, prefixes(tokens, size)[hits:], strict=False):
                content[block] = prefix
            for block in fresh[len(prefixes(tokens, size)) - hits :]:
                content[block] = ()
            holders.append((tokens, blocks))
        elif holders:
            tokens, blocks = holders[number % len(holders)]
            if name == "publish":
                computed = min(len(tokens), number)
                manager.publish(tokens, blocks, computed)
                published |= set(prefixes(tokens[:computed], size))
            elif name == "free":
                manager.free(blocks)
                del holders[number % len(holders)]
            elif (more := manager.allocate(1)) is not None:
                handed_out += 1
                content[more[0]] = ()
                blocks += more
        manager.check([blocks for _, blocks in holders])
    for _, blocks in holders:
        manager.free(blocks)
    manager.check([])
    assert manager.available == num_blocks - 1
