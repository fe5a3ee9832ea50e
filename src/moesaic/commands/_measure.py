"""One mixture layer by itself, with random weights and routings: which kernels can run it here, and how long they take.

Timed is what a model calls: encode, then the expert kernel with all that it does. On a GPU so many calls stand in one
CUDA graph, with rows and routings of their own, that it reads more than four L2 caches; the median of its replays,
between which and the next measurement the GPU rests.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, product
from types import ModuleType

import torch
from torch import Tensor

from moesaic.contracts.contract import Contract, Need, Rejection, asks_of
from moesaic.contracts.plan import MixtureNeed, Parameters, Wishes
from moesaic.contracts.scheme import Scheme
from moesaic.contracts.spec import SILU, Activation
from moesaic.formats.base import QuantTensor
from moesaic.formats.dummy import fill
from moesaic.hardware import Hardware
from moesaic.kernels.ops import ExpertWeights, Ops
from moesaic.kernels.registry import backends, bind
from moesaic.planning.mixture import able
from moesaic.planning.needs import WIRES
from moesaic.planning.plan import choose

CACHE = 4 * 50 * 2**20
"""Four times the largest L2 cache: what is timed at once must read at least that, or it measures the cache."""
MOST_CALLS = 16
ENOUGH, PATIENCE = 5, 60.0
"""Replays whose median is believed, if they took so many milliseconds."""
REST = 3
"""A GPU rests so many times as long as it worked: one at its power limit would be slower for what comes next."""
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A scheme and a shape. experts: of one rank.  width: of one expert.  top_k: experts per token."""

    scheme: Scheme
    experts: int
    hidden: int
    width: int
    top_k: int
    activation: Activation = SILU

    def __str__(self) -> str:
        return f"{self.scheme.name} E{self.experts} K{self.hidden} N{self.width} top{self.top_k}"

    def need(self, hardware: Hardware, tokens: int) -> MixtureNeed:
        """Of a layer that only multiplies: routed elsewhere, on one rank."""
        need = Need(hardware.device, "bfloat16", False, hardware.features, hardware.arch,
                    activation=self.activation.kind, **asks_of(self.scheme))  # fmt: skip
        how = self.scheme.activation
        return MixtureNeed(
            need, how.static, WIRES[how.name], "softmax", 1.0, 0, None, self.top_k, False, self.hidden, self.width, 1,
            "prefill", tokens, self.experts,
        )  # fmt: skip

    def weights(self, device: str) -> ExpertWeights:
        like, form = torch.empty(0, dtype=torch.bfloat16, device=device), self.scheme.weight
        w13 = QuantTensor.empty(form, (self.width, self.width), self.hidden, like, (self.experts,))
        w2 = QuantTensor.empty(form, (self.hidden,), self.width, like, (self.experts,))
        return ExpertWeights(fill(w13), fill(w2), self.activation, self.scheme.activation, self.scale(device))

    def scale(self, device: str) -> Tensor | None:
        return torch.tensor(0.01, device=device) if self.scheme.activation.static else None


@dataclass(frozen=True)
class Candidate:
    """An expert kernel, with what it is called with. packer: the backend that packs weights for it, if any."""

    backend: str
    parameters: Parameters = ()

    def __str__(self) -> str:
        return " ".join([self.backend, *(f"{name}={value}" for name, value in self.parameters)])

    def worth(self, case: Case, tokens: int) -> bool:
        """Whether the backend thinks that these parameters can be its fastest for so many tokens."""
        judge = getattr(backends()[self.backend], "worth", None)
        return judge is None or judge(tokens * case.top_k / case.experts, **dict(self.parameters))

    @property
    def packer(self) -> ModuleType | None:
        module = backends()[self.backend]
        return module if hasattr(module, "pack") else None


def candidates(case: Case, hardware: Hardware, catalogue: Sequence[Contract],
               names: Collection[str] = ()) -> tuple[list[Candidate], list[Rejection]]:  # fmt: skip
    """Every kernel that can run a case, with each setting that it may be tried with; and why the others cannot.

    names: of those that are wanted (none: all but the reference).
    """
    built = [each for each in catalogue if each.built]
    wanted = [each for each in built if (each.backend in names if names else each.backend != "reference")]
    rejected: list[Rejection] = []
    found: dict[Candidate, None] = {}
    for kernel in able("experts", case.need(hardware, 1), wanted, Wishes(), rejected):
        choices = getattr(backends()[kernel.backend], "TUNABLE", {})
        for values in product(*choices.values()):
            found[Candidate(kernel.backend, tuple(zip(choices, values, strict=True)))] = None
    return list(found), list(dict.fromkeys(rejected))


@dataclass(frozen=True)
class Inputs:
    """Rows with routings, so many that together they touch more weights than caches hold.

    touched: experts per call.
    """

    each: tuple[tuple[Tensor, Tensor, Tensor], ...]
    touched: float

    @staticmethod
    def of(case: Case, w: ExpertWeights, tokens: int, seed: int = 0) -> Inputs:
        """Uniformly random routings, each with weights that sum to 1."""
        device = w.w13.parts["data"].device
        made = torch.Generator(device).manual_seed(seed)
        nbytes = (w.w13.nbytes + w.w2.nbytes) // case.experts * min(case.experts, tokens * case.top_k)
        each = []
        for _ in range(max(1, min(MOST_CALLS, -(-CACHE // nbytes)))):
            scores = torch.rand(tokens, case.experts, device=device, generator=made)
            ids = scores.argsort(-1)[:, : case.top_k].to(torch.int32).contiguous()
            weights = torch.rand(tokens, case.top_k, device=device, generator=made).softmax(-1)
            x = torch.randn(tokens, case.hidden, device=device, generator=made).bfloat16()
            each.append((x, ids, weights))
        return Inputs(tuple(each), sum(len(ids.unique()) for _, ids, _ in each) / len(each))

    def calls(self, case: Case, ops: Ops, w: ExpertWeights) -> list[Call]:
        scale, how = case.scale(str(w.w13.parts["data"].device)), case.scheme.activation

        def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return ops.experts(ops.encode(x, how, scale), w, ids, weights)

        return [lambda each=each: call(*each) for each in self.each]  # type: ignore[misc]


def ops_of(candidate: Candidate, case: Case, hardware: Hardware, catalogue: Sequence[Contract]) -> Ops:
    """What a model would be given: the kernel, and the encoder that a plan chooses."""
    encode = choose("encode", case.need(hardware, 1).need, catalogue, Wishes()).chosen
    return bind({"encode": encode, "experts": candidate.backend}, {"experts": candidate.parameters})


@contextmanager
def packed(w: ExpertWeights, packer: ModuleType | None) -> Iterator[ExpertWeights]:
    """The weights in a backend's order of bytes, and back in the formats' own behind it; other random ones where
    anything fails, which the next kernel can be timed with."""
    if packer is None:
        yield w
        return
    try:
        made: ExpertWeights = packer.pack(w, None)
        try:
            yield made
        finally:
            packer.unpack(made)
    except Exception:
        for each in (w.w13, w.w2):
            fill(each)
        raise


def time_calls(calls: Sequence[Call], repeats: int = 30, device: str = "cuda", sustain: float = 0.0) -> float:
    """Milliseconds per call, the median. The first call is not timed: it compiles.

    On a GPU the calls stand in one graph; elsewhere they are made one after the other. sustain: as `time_replays`.
    """
    calls[0]()
    if device == "cpu":
        return statistics.median(seconds(call) for call in [*calls] * -(-repeats // len(calls))) * 1e3
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    milliseconds = time_replays(graph, repeats, sustain) / len(calls)
    del kept
    return milliseconds


def seconds(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def time_replays(graph: torch.cuda.CUDAGraph, repeats: int = 30, sustain: float = 0.0) -> float:
    """The median, in milliseconds. sustain: seconds of load before, which may bring a GPU to its power limit."""
    begun = time.perf_counter()
    for warm in count():
        if warm >= 3 and time.perf_counter() - begun >= sustain:
            break
        graph.replay()
        torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(repeats):
        if len(times) >= ENOUGH and sum(times) > PATIENCE:
            break
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    if not sustain:
        time.sleep(REST * (time.perf_counter() - begun))
    return statistics.median(times)
