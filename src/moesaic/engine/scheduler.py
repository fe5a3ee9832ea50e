"""Which tokens run next: continuous batching with chunked prefill, a token budget and preemption by recompute.

Torch-free, synchronous and single-threaded: `step = schedule()`, run it, `commit(step, sampled)`. `add`, `abort` and
`finish` may come between any two of these.

**Ahead.** While a step runs, the next one can be made: `advance(step)` takes for granted that it will run, with PENDING
in place of the tokens that it will choose. A request whose last token that is by its length is left out; one that ends
with its token for another reason is in the next step too, which then computes a token for nobody. Nobody is preempted
ahead: where blocks are short, `schedule` gives None until the step is committed.

**Order.** Requests are served by arrival. At every moment each running request arrived before each waiting one (the
head of the queue is never overtaken, and who loses its place is the latest of the running), so the earliest request
alive is never preempted and receives tokens in every step: each request ends, in any cache that can hold it alone.

**Memory.** A request takes the blocks of all its tokens when it is admitted, so prefill never runs out half-way; only
decoding grows, a block at a time. Admission leaves one block of headroom per running request, or the newcomer would
be preempted again by the very next block that somebody needs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moesaic.engine.blocks import BlockManager
from moesaic.engine.request import FinishReason, Request, Status
from moesaic.errors import OptionError, RequestError

PENDING = -1
"""In `Request.tokens`, only between `advance` and `commit`: a token that is being chosen."""


class Chunk(NamedTuple):
    """Compute `request.tokens[start : start + count]`; `sample` iff that reaches their end.

    A tuple because a frozen dataclass takes three times as long to make, for each token of each request.
    """

    request: Request
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    sample: bool


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass. Chunks: decodes first, then prefills, each by arrival; at most one per request.

    decode: every chunk is the newest generated token of its request.  tokens: the sum of the counts.
    preempted: who lost its blocks while this step was made.
    """

    chunks: tuple[Chunk, ...]
    decode: bool
    tokens: int
    preempted: tuple[Request, ...]


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of a step. Raises OptionError if they contradict one another.

    max_num_seqs: requests running at once.  max_num_batched_tokens: tokens per step.
    max_model_len: tokens per request, prompt and output.
    chunk_size: fixed chunk boundaries (`--deterministic`): a prefill chunk ends at the next multiple of it in absolute
        position, or at the end of the tokens, whatever else is in the step; None lets the budget cut anywhere.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"must be at least 1, not {value}", where=name, remedy="Raise it.")
        if self.chunk_size is not None and self.chunk_size > self.max_num_batched_tokens:
            raise OptionError(
                f"a fixed chunk of {self.chunk_size} tokens does not fit a step of {self.max_num_batched_tokens}",
                where="max_num_batched_tokens",
                remedy=f"Raise it to {self.chunk_size} or more, or choose smaller chunks.",
            )


class Scheduler:
    """Owns the queue, the running set and the progress of every live request; the only user of its BlockManager."""

    def __init__(self, config: SchedulerConfig, blocks: BlockManager) -> None:
        self.config, self.blocks = config, blocks
        self._live: dict[str, Request] = {}
        self._running: list[Request] = []  # by arrival
        self._waiting: OrderedDict[str, Request] = OrderedDict()  # by arrival, all later than the running ones
        self._arrivals = 0
        self._in_flight: Step | None = None
        self._ahead: Step | None = None  # in flight too, but taken for granted; made before `_in_flight`
        self._void: set[Request] = set()  # whose chunk in `_in_flight` counts for nothing
        self._ahead_void: set[Request] = set()  # the same of `_ahead`
        self._blocked: tuple[Request, int] | None = None  # the head that did not fit, and the room it had

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether a request is alive; with no step in flight, `schedule` returns a step exactly then."""
        return bool(self._live)

    def add(self, request: Request) -> None:
        """Queue a new request. Raises RequestError, at once, if it could never be served."""
        if request.id in self._live or request.status is not Status.WAITING:
            raise RequestError(
                f"the request id {request.id!r} is already in use", where="id", remedy="Give each request its own id."
            )
        request.max_total = self._max_total(request)
        request.arrival = self._arrivals
        self._arrivals += 1
        self._live[request.id] = self._waiting[request.id] = request

    def _max_total(self, request: Request) -> int:
        """The most tokens the request may reach. Raises RequestError if what it asks for does not fit."""
        if not request.num_prompt:
            raise RequestError("the prompt has no tokens", where="prompt", remedy="Send at least one token.")
        limits = (
            (self.config.max_model_len, "the model length (max_model_len)", "raise --max-model-len"),
            (self.blocks.capacity, "the KV cache", "give the cache more memory (--kv-memory)"),
        )
        limit, name, wider = min(limits, key=lambda each: each[0])
        if request.num_prompt + 1 > limit:
            raise RequestError(
                f"the prompt has {request.num_prompt} tokens; with room for one new token, {name} of {limit} tokens "
                f"takes at most {limit - 1}",
                where="prompt",
                remedy=f"Shorten the prompt, or {wider}.",
            )
        params, room = request.params, limit - request.num_prompt
        field = "min_tokens" if params.max_tokens is None else "max_tokens"
        asked = params.min_tokens if params.max_tokens is None else params.max_tokens
        if asked > room:
            raise RequestError(
                f"{request.num_prompt} prompt tokens and {field} {asked} make {request.num_prompt + asked}, more "
                f"than {name} of {limit} tokens",
                where=field,
                remedy=f"Ask for at most {room}, or leave it out, or {wider}.",
            )
        return limit if params.max_tokens is None else request.num_prompt + params.max_tokens

    def abort(self, request_id: str) -> Request | None:
        """End a live request and free its blocks at once; None if there is none of this id.

        Safe while a step with it is in flight: its blocks are handed out by the next `schedule` at the earliest, and
        `commit` passes over it.
        """
        request = self._live.get(request_id)
        if request is not None:
            self.finish(request, FinishReason.ABORT)
        return request

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a live request for a reason seen outside (a stop string, an error), at any moment.

        For one that has ended already only the reasons are replaced: its last token may complete a stop string.
        """
        if self._live.get(request.id) is request:
            if request.status is Status.RUNNING:
                self._running.remove(request)
            else:
                del self._waiting[request.id]
            self._retire(request)
        request.finish_reason, request.stop_reason = reason, stop_reason

    def schedule(self) -> Step | None:
        """The next step; None if no request is alive, or none can go on before the step ahead is committed.

        Decodes come first, then the next chunks of running prefills, then new requests, while the budget lasts; but
        if the earliest request is still in prefill, its share is set aside before. Nobody is admitted in a step that
        had to preempt. Raises RuntimeError if the previous step is neither committed, discarded nor taken for granted.
        """
        if self._in_flight is not None:
            raise RuntimeError("commit or discard the previous step before scheduling the next, or advance it")
        chunks: list[Chunk] = []
        budget = self.config.max_num_batched_tokens
        found = self._schedule_decodes(chunks, budget - self._set_aside())
        if found is None:
            return None
        prefills, preempted = found
        decodes = len(chunks)
        budget -= decodes
        exhausted = False
        for request in prefills:
            count = self._next_count(request, budget)
            exhausted = not count
            if exhausted:
                break
            chunks.append(_chunk(request, count))
            budget -= count
        if not preempted and not exhausted:
            budget = self._admit(chunks, budget)
        if not chunks:
            return None
        decode = all([_is_decode(chunk) for chunk in chunks[decodes:]])
        self._in_flight = Step(tuple(chunks), decode, self.config.max_num_batched_tokens - budget, tuple(preempted))
        return self._in_flight

    def _set_aside(self) -> int:
        """Tokens to keep from the decodes, so that the earliest request progresses while it is in prefill."""
        if not self._running or self._running[0].decoding:
            return 0
        if self.config.chunk_size is None:
            return 1
        return self._next_count(self._running[0], self.config.max_num_batched_tokens)

    def _schedule_decodes(self, chunks: list[Chunk], budget: int) -> tuple[list[Request], list[Request]] | None:
        """Append a chunk for each decoding request, earliest first, preempting from the latest for want of blocks.

        Returns (running requests in prefill, preempted ones). A victim is never one that has been served already:
        those stand before `request` in the order of arrival, and victims come from the end. None: short of blocks
        while a step is ahead; those given out so far stay where they are, and will be needed.
        """
        prefills: list[Request] = []
        preempted: list[Request] = []
        size, new = self.blocks.block_size, tuple.__new__  # half the time of Chunk(...), for each token generated
        for request in self._running:  # shrinks at its end while we walk
            start, total = request.computed, len(request.tokens)
            if total >= request.max_total:
                continue  # its last token is being computed
            if start < request.num_prompt or start != total - 1:  # not request.decoding, without a call
                prefills.append(request)
            elif len(chunks) < budget:
                if not start % size and start == len(request.blocks) * size and not self._grow(request, preempted):
                    if self._ahead is not None:
                        return None
                    break
                chunks.append(new(Chunk, (request, start, 1, True)))
        return prefills, preempted

    def _grow(self, request: Request, preempted: list[Request]) -> bool:
        """One more block for a decoding request, from the latest arrivals if need be; False if that is itself, or if a
        step is ahead: its requests must stay where they are."""
        while (block := self.blocks.allocate(1)) is None:
            if self._ahead is not None:
                return False
            victim = self._running.pop()
            self._preempt(victim)
            preempted.append(victim)
            if victim is request:
                return False
        request.blocks += block
        return True

    def _preempt(self, victim: Request) -> None:
        """Back to the head of the queue without blocks; its tokens stay and will be computed again."""
        self.blocks.free(victim.blocks)
        victim.blocks, victim.computed, victim.status = [], 0, Status.WAITING
        victim.preemptions += 1
        self._waiting[victim.id] = victim
        self._waiting.move_to_end(victim.id, last=False)

    def _next_count(self, request: Request, budget: int) -> int:
        """Length of the request's next chunk; 0 if the budget does not allow one."""
        remaining = len(request.tokens) - request.computed
        chunk_size = self.config.chunk_size
        if chunk_size is None:
            return min(remaining, budget)
        count = min(remaining, chunk_size - request.computed % chunk_size)
        return count if count <= budget else 0

    def _admit(self, chunks: list[Chunk], budget: int) -> int:
        """Start waiting requests, strictly by arrival, as far as places, blocks and budget go; the budget left."""
        while self._waiting and budget and len(self._running) < self.config.max_num_seqs:
            request = next(iter(self._waiting.values()))
            if not self._place(request):
                break
            del self._waiting[request.id]
            request.status = Status.RUNNING
            self._running.append(request)
            count = self._next_count(request, budget)
            if not count:  # a fixed chunk larger than what is left of the budget: the place is kept for the next step
                break
            chunks.append(_chunk(request, count))
            budget -= count
        return budget

    def _place(self, request: Request) -> bool:
        """Give the head of the queue blocks for all its tokens, reusing cached ones; False if they do not fit yet.

        At least one token is left to compute, for there would be no logits to sample from; and all of them where the
        log-probs of the prompt are wanted. A head that did not fit is not looked up again before there is more room.
        """
        spare = len(self._running)
        room = self.blocks.available - spare
        if self._blocked is not None and self._blocked[0] is request and room <= self._blocked[1]:
            return False
        limit = len(request.tokens) - 1 if request.params.prompt_logprobs is None else 0
        placed = self.blocks.acquire(request.tokens, limit, spare)
        if placed is None:
            self._blocked = (request, room)
            return False
        self._blocked = None
        request.blocks, request.computed = placed
        if not request.preemptions:
            request.cached_prompt_tokens = request.computed
        return True

    def advance(self, step: Step) -> None:
        """Take for granted that `step`, which is in flight, will run, so that the next can be scheduled before its
        tokens are known. It must then be committed before the next one is. Raises RuntimeError for any other step.
        """
        if step is self._ahead:
            return
        if step is not self._in_flight or self._ahead is not None:
            raise RuntimeError("this step is not the one in flight, or another is ahead already")
        self._in_flight, self._ahead = None, step
        self._void, self._ahead_void = set(), self._void
        for request, start, count, sample in step.chunks:
            if request.status is Status.RUNNING and request not in self._ahead_void:
                request.computed = start + count
                if sample:
                    request.tokens.append(PENDING)

    def void(self, request: Request) -> None:
        """What the step in flight computes for this request counts for nothing: a token before it turned out to be
        another one. It will be computed again. Without a step in flight nothing happens."""
        if self._in_flight is not None:
            self._void.add(request)

    def counts(self, step: Step, request: Request) -> bool:
        """Whether what a step in flight computes for a live request counts."""
        return request not in (self._ahead_void if step is self._ahead else self._void)

    def commit(self, step: Step, sampled: Sequence[int]) -> list[Request]:
        """Record that `step` ran. Returns the requests that ended with it, in the order of its chunks.

        sampled: one token for each chunk with `sample`, in order; those of requests that ended meanwhile are ignored.
        Advances `computed`, publishes full blocks to the prefix cache, appends tokens, ends what has to end.
        Raises RuntimeError for a step that is not in flight or not its turn, ValueError for a wrong number of tokens;
        nothing changes.
        """
        if step is not (self._ahead or self._in_flight):
            raise RuntimeError("this step is not in flight, or one before it is")
        expected = len(step.chunks) if step.decode else sum(chunk.sample for chunk in step.chunks)
        if expected != len(sampled):
            raise ValueError(f"{len(sampled)} tokens for {expected} sampling chunks")
        fresh = self._ahead is None
        if fresh:
            void, self._in_flight, self._void = self._void, None, set()
        else:
            void, self._ahead, self._ahead_void = self._ahead_void, None, set()
        if not step.decode:
            self._blocked = None  # a prefill may just have published what the head of the queue begins with
        finished: list[Request] = []
        size, running, taken = self.blocks.block_size, Status.RUNNING, 0
        for request, start, count, sample in step.chunks:
            taken += sample
            if request.status is not running or request in void:
                continue
            end = start + count
            if fresh:
                request.computed = end
            if end % size < count:  # it completed a block
                self.blocks.publish(request.tokens, request.blocks, end)
            if sample:
                token, tokens = sampled[taken - 1], request.tokens
                if fresh:
                    tokens.append(token)
                else:
                    tokens[end] = token
                if (token in request.stops or len(tokens) >= request.max_total) and request.judge():
                    self._retire(request)
                    finished.append(request)
        if finished:
            self._running = [request for request in self._running if request.status is running]
        return finished

    def discard(self, step: Step) -> None:
        """Declare that `step` did not run (say, the runner failed): its requests stand where they stood before it.

        Who is to blame should be ended with `finish(request, ERROR)`, or the same step comes again. Of two steps in
        flight the later one goes first. Raises RuntimeError for any other.
        """
        if step is not (self._in_flight or self._ahead):
            raise RuntimeError("this step is not in flight, or a later one is")
        if step is self._in_flight:
            self._in_flight, self._void = None, set()
            return
        void, self._ahead, self._ahead_void = self._ahead_void, None, set()
        for request, start, _, sample in step.chunks:
            if request.status is Status.RUNNING and request not in void:
                request.computed = start
                if sample:
                    request.tokens.pop()
                    keep = self.blocks.blocks_for(len(request.tokens))
                    self.blocks.free(request.blocks[keep:])  # the step after this one may have taken one more
                    request.blocks = request.blocks[:keep]

    def _retire(self, request: Request) -> None:
        del self._live[request.id]
        self.blocks.free(request.blocks)
        request.blocks, request.status = [], Status.FINISHED

    def check(self) -> None:
        """Assert every invariant of the scheduler and of its blocks. Valid between any two calls."""
        order = [*self._running, *self._waiting.values()]
        assert [r.arrival for r in order] == sorted({r.arrival for r in order}), "out of order of arrival"
        assert {id(r) for r in order} == {id(r) for r in self._live.values()}, "a request is lost or in two places"
        assert all(self._live.get(r.id) is r for r in order), "a request is filed under another's id"
        assert all(self._waiting[key].id == key for key in self._waiting), "the queue is misfiled"
        assert len(self._running) <= self.config.max_num_seqs, "too many requests run"
        for request in self._running:
            assert request.status is Status.RUNNING, f"{request} runs"
            held, total = len(request.blocks), len(request.tokens)
            assert 0 <= request.computed < total <= request.max_total, f"{request}: counts"
            assert self.blocks.blocks_for(total - 1) <= held <= self.blocks.blocks_for(total), f"{request}: blocks"
        for request in self._waiting.values():
            assert request.status is Status.WAITING, f"{request} waits"
            assert not request.blocks, f"{request}: waits with blocks"
            assert not request.computed, f"{request}: waits with progress"
        self.blocks.check(request.blocks for request in self._running)


def _chunk(request: Request, count: int) -> Chunk:
    return Chunk(request, request.computed, count, request.computed + count == len(request.tokens))


def _is_decode(chunk: Chunk) -> bool:
    return chunk.sample and chunk.count == 1 and chunk.start >= chunk.request.num_prompt
