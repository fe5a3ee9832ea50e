"""Paged cache bookkeeping: which block holds what, who uses it, what may be reused.

Torch-free: a block is a number, the memory behind it belongs to the KV pool. A block is in exactly one of three states:

    used     referenced by one or more requests
    cached   referenced by nobody, content kept for a later request with the same prefix; evicted when space is short
    free     referenced by nobody, content worthless

Only FULL blocks whose every position is computed are ever shared, and nobody writes to a full block again, so a block
with several references is read-only and copy-on-write is never needed.

**Prefix keys.** A full block is named by `(identity of the block before it, its own tokens)`. Identities come from a
counter and are never reused, so one identity stands for one exact token prefix: equal keys mean equal prefixes, with
no hash to collide and no way for a prompt to be crafted onto somebody else's cache.

**Duplicates.** When two requests compute the same block side by side, the first to publish is the one that others
will find; the second keeps its private copy (tables of running requests never change under the runner's feet) and
carries the first one's identity, so that what follows it still extends the same chain.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from moesaic.errors import CapacityError, OptionError

ROOT = 0  # identity of the empty prefix; also marks a block whose content has no identity (yet)
PADDING = 0  # block 0 is never handed out: padded rows of a batch write and read there


class BlockManager:
    """Reference-counted allocator of `num_blocks - 1` blocks (block 0 is padding) with a prefix cache.

    queried, hits: tokens asked of the prefix cache, and found in it, since construction.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        if num_blocks < 2 or block_size < 1:
            raise OptionError(
                f"{num_blocks} blocks of {block_size} tokens are too few",
                where="KV cache",
                remedy="Give it 2 blocks or more (block 0 is padding) of at least 1 token: raise --kv-memory.",
            )
        self.num_blocks, self.block_size, self.prefix_cache = num_blocks, block_size, prefix_cache
        self.queried = self.hits = 0
        self._refs = [0] * num_blocks
        self._identity = [ROOT] * num_blocks  # of the prefix that ends with this block
        self._key: list[tuple[int, tuple[int, ...]] | None] = [None] * num_blocks  # set iff others can find it
        self._index: dict[tuple[int, tuple[int, ...]], int] = {}  # inverse of _key
        self._free = list(range(num_blocks - 1, PADDING, -1))  # a stack: lowest number first, recently freed first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._next_identity = ROOT + 1

    @property
    def capacity(self) -> int:
        """Tokens that fit when nothing else is there."""
        return (self.num_blocks - 1) * self.block_size

    @property
    def available(self) -> int:
        """Blocks that `allocate` could hand out now: free and cached ones."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, tokens: Sequence[int], limit: int) -> list[int]:
        """The blocks of the longest cached prefix of `tokens` of at most `limit` tokens, now referenced by the caller.

        Whole blocks only. Counts as a query of `limit` tokens.
        """
        return self._take(self._lookup(tokens, limit), limit)

    def allocate(self, count: int) -> list[int] | None:
        """`count` private blocks of unspecified content, referenced once; None (and no change) if short of them.

        Free blocks go first, then cached ones from the least recently used.
        """
        if count > self.available:
            return None
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def acquire(self, tokens: Sequence[int], limit: int, spare: int = 0) -> tuple[list[int], int] | None:
        """`match` and then `allocate` until all of `tokens` have a place, as one step: everything or nothing.

        Returns (blocks, tokens already computed), or None, having changed and counted nothing, if fewer than `spare`
        blocks would stay available.
        """
        found = self._lookup(tokens, limit)
        fresh = self.blocks_for(len(tokens)) - len(found)
        revived = sum(1 for block in found if not self._refs[block])  # available now, but not once we hold them
        if fresh + revived + spare > self.available:
            return None
        hit = self._take(found, limit)
        tail = self.allocate(fresh)
        assert tail is not None, "counted above"
        return hit + tail, len(hit) * self.block_size

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each of a request's blocks, given in order of position.

        Those nobody else uses become cached (if they can be found) or free. Later positions are aged first, so that a
        prefix outlives what extends it: a chain without its beginning can never be matched.
        """
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block]:
                assert self._refs[block] > 0, f"block {block} freed more often than taken"
            elif self._key[block] is not None:
                self._cached[block] = None
            else:
                self._identity[block] = ROOT
                self._free.append(block)

    def publish(self, tokens: Sequence[int], blocks: Sequence[int], computed: int) -> None:
        """Make the full blocks among the first `computed` tokens findable. From here on they are immutable.

        Costs what is new since the last call for this request: blocks already published have an identity.
        An equal block that is already findable stays the one that is found; ours remains private (see Duplicates).
        """
        if not self.prefix_cache:
            return
        size = self.block_size
        full = computed // size
        first = full
        while first and self._identity[blocks[first - 1]] == ROOT:
            first -= 1
        parent = self._identity[blocks[first - 1]] if first else ROOT
        for i in range(first, full):
            block, key = blocks[i], (parent, tuple(tokens[i * size : (i + 1) * size]))
            twin = self._index.get(key)
            if twin is None:
                self._index[key], self._key[block] = block, key
                self._identity[block] = self._next_identity
                self._next_identity += 1
            else:
                self._identity[block] = self._identity[twin]
            parent = self._identity[block]

    def reset(self) -> None:
        """Forget the prefix cache (say, because the weights changed). Raises CapacityError while blocks are in use."""
        in_use = self.num_blocks - 1 - self.available
        if in_use:
            raise CapacityError(
                f"the prefix cache cannot be emptied while {in_use} of its {self.num_blocks - 1} blocks are in use",
                where="KV cache",
                remedy="Wait for the running requests to end, or abort them.",
            )
        while self._cached:
            self._free.append(self._evict())

    def _lookup(self, tokens: Sequence[int], limit: int) -> list[int]:
        """`match` without taking references or counting."""
        found: list[int] = []
        if not self.prefix_cache:
            return found
        size, parent = self.block_size, ROOT
        for end in range(size, min(limit, len(tokens)) + 1, size):
            block = self._index.get((parent, tuple(tokens[end - size : end])))
            if block is None:
                break
            found.append(block)
            parent = self._identity[block]
        return found

    def _take(self, found: list[int], limit: int) -> list[int]:
        for block in found:
            if not self._refs[block]:
                del self._cached[block]
            self._refs[block] += 1
        if self.prefix_cache:
            self.queried += limit
            self.hits += len(found) * self.block_size
        return found

    def _evict(self) -> int:
        """The least recently used cached block, its content forgotten; in no state until the caller puts it in one."""
        block, _ = self._cached.popitem(last=False)
        key = self._key[block]
        assert key is not None, "a cached block can be found"
        del self._index[key]
        self._key[block], self._identity[block] = None, ROOT
        return block

    def check(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Assert every invariant; `tables` are the block lists of all holders, to prove that references add up."""
        free, cached, everything = set(self._free), set(self._cached), set(range(1, self.num_blocks))
        used = {block for block in range(self.num_blocks) if self._refs[block] > 0}
        assert len(free) == len(self._free), "a block is free twice"
        assert min(self._refs) >= 0, "a reference count is negative"
        assert free | cached | used == everything, f"lost or foreign: {sorted((free | cached | used) ^ everything)}"
        assert len(free) + len(cached) + len(used) == len(everything), "a block is in two states"
        for block in range(self.num_blocks):
            key, identity = self._key[block], self._identity[block]
            assert block not in free or (key is None and identity == ROOT), f"free block {block} has content"
            assert block not in cached or key is not None, f"cached block {block} cannot be found"
            if key is not None:
                assert self._index.get(key) == block, f"block {block}: key and index disagree"
                assert key[0] < identity < self._next_identity, f"block {block}: chained to a later identity"
                assert len(key[1]) == self.block_size, f"block {block} is shared but not full"
        keyed = [self._identity[block] for block in self._index.values()]
        assert len(keyed) == sum(key is not None for key in self._key), "the index knows a block that has no key"
        assert len(set(keyed)) == len(keyed), "two findable blocks have one identity"
        assert self.prefix_cache or not keyed, "the prefix cache is off but holds blocks"
        if tables is not None:
            self._check_references(tables)

    def _check_references(self, tables: Iterable[Sequence[int]]) -> None:
        counts = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), "a block is twice in one table"
            for block in table:
                counts[block] += 1
        wrong = [block for block in range(self.num_blocks) if counts[block] != self._refs[block]]
        assert not wrong, f"references of blocks {wrong} differ from their holders"
