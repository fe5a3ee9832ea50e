"""A plan as people read it: tables of at most 100 columns. As machines read it: `_plan_json.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moesaic.contracts.contract import Rejection
from moesaic.contracts.plan import ADAPTERS, Cell, LayerPlan, ModelPlan, Refusal, Stage, Wishes, span
from moesaic.contracts.spec import ModelSpec, MoESpec
from moesaic.errors import OptionError
from moesaic.hardware import Hardware
from moesaic.models.floor import Step, step
from moesaic.models.wishes import names_in
from moesaic.planning.cost import ITEMSIZE, RESERVE, Fit, fit, vocabulary
from moesaic.planning.needs import blocks_of

WIDTH = 100
PREFILL = 2048


@dataclass(frozen=True)
class Report:
    """A plan with what it was made for. context: positions per request, for the costs.

    more: where it does not fit, wishes for the fewest ranks on which it would, or None where none were found.
    fp8_kv: where it does not fit, wishes with an FP8 cache, with which it would, or None where it would not.
    """

    model: str
    spec: ModelSpec
    hardware: Hardware
    wishes: Wishes
    made: ModelPlan | Refusal
    context: int
    more: Wishes | None = None
    fp8_kv: Wishes | None = None

    @property
    def ranks(self) -> int:
        return ranks(self.wishes)

    @cached_property
    def fit(self) -> Fit:
        return fit(self.plan, self.hardware, self.context)

    @property
    def plan(self) -> ModelPlan:
        assert isinstance(self.made, ModelPlan)
        return self.made

    def steps(self) -> Iterator[tuple[str, int, Step]]:
        """(phase, requests of each batch, cost)."""
        for requests in sorted({1, self.wishes.max_batch}):
            yield "decode", requests, step(self.spec, self.plan, self.hardware, requests, 1, self.context)
        yield "prefill", 1, step(self.spec, self.plan, self.hardware, 1, PREFILL, PREFILL)


def ranks(wishes: Wishes) -> int:
    return max(wishes.tp, wishes.ep)


def size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"


def show(report: Report) -> None:
    """To stdout, without spaces at the ends of lines."""
    console = Console(width=WIDTH, highlight=False)
    with console.capture() as held:
        for part in refused(report) if isinstance(report.made, Refusal) else planned(report):
            console.print(part)
    print("\n".join(line.rstrip() for line in held.get().rstrip().splitlines()))


def headline(report: Report) -> str:
    spec, wishes = report.spec, report.wishes
    drafts = f" + {len(spec.drafts)} draft" if spec.drafts else ""
    where = report.hardware.name
    if report.ranks > 1:
        where = f"{report.ranks} x {where} (tp {wishes.tp}, ep {wishes.ep})"
    what = f"{spec.architecture}, {len(spec.layers)} layers{drafts}"
    return f"[bold]{escape(report.model)}[/bold]: {what}, on {escape(where)}"


# --- a plan ----------------------------------------------------------------------------------------------------------


def planned(report: Report) -> Iterator[str | Table]:
    made = report.plan
    yield headline(report) + f", in {made.base.dtype}" + " with CUDA graphs" * made.base.capturable
    yield from (f"note: {escape(note)}" for note in made.notes)
    for layer in made.layers:
        yield from dense(report, layer)
        for cells in same_path(layer.cells):
            yield from mixture(report, layer, cells)
        if layer.derived:
            yield f"derived at load: {'; '.join(layer.derived)}"
    yield from costs(report)
    yield from memory(report)


def named(report: Report, layers: tuple[int, ...]) -> str:
    """`layers 3-60 and draft 61`."""
    drafts = {draft.block.index for draft in report.spec.drafts}
    kinds = {"layer": [i for i in layers if i not in drafts], "draft": [i for i in layers if i in drafts]}
    return " and ".join(f"{word}{counted(these)}" for word, these in kinds.items() if these)


def counted(layers: list[int]) -> str:
    """` 3`, `s 3-60`, `s 0-34 by 2`."""
    if len(layers) == 1:
        return f" {layers[0]}"
    steps = {after - before for before, after in pairwise(layers)}
    if len(steps) == 1 and len(layers) > 2 and steps != {1}:
        return f"s {layers[0]}-{layers[-1]} by {steps.pop()}"
    return f"s {span(tuple(layers))}"


def table(*columns: str) -> Table:
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def dense(report: Report, layer: LayerPlan) -> Iterator[str | Table]:
    title = f"{named(report, layer.layers)}: {size(layer.nbytes)} each on a rank, attention by {layer.attention}"
    yield f"\n[bold]{title}[/bold]"
    made = table("projection", "scheme", "weights", "rows", "by", "bytes")
    for each in layer.linears:
        scheme = each.scheme
        made.add_row(each.role, scheme.name, str(scheme.weight), str(scheme.activation), each.kernel, size(each.nbytes))
    yield made


def same_path(cells: tuple[Cell, ...]) -> list[list[Cell]]:
    """Cells that take the same stages are shown once."""
    groups: dict[object, list[Cell]] = {}
    for cell in cells:
        stages = tuple(replace(stage, nbytes=0) for stage in cell.path.stages)
        groups.setdefault((stages, cell.path.shared_weight), []).append(cell)
    return list(groups.values())


def mixture(report: Report, layer: LayerPlan, cells: list[Cell]) -> Iterator[str | Table]:
    block = next(block for block in blocks_of(report.spec) if block.index == layer.layers[0])
    assert isinstance(block.mlp, MoESpec)
    assert layer.experts is not None
    router = block.mlp.router
    phases = ", ".join(f"{cell.phase} to {cell.tokens}" for cell in cells)
    held = router.experts // report.wishes.ep
    yield (f"\n[bold]mixture in {layer.experts.name}, {held} of {router.experts} experts per rank, "
           f"{router.top_k} per token: {phases} rows[/bold]")  # fmt: skip
    made = table("stage", "by", "leaves", "layout", "ids", "owns", "moves per row")
    for stage in cells[0].path.stages:
        does = ", ".join(sorted(stage.does))
        ids = "" if stage.ids == "none" else stage.ids
        made.add_row(stage.role, stage.kernel, stage.encoding, stage.layout, ids, does, moves(stage, cells[0].tokens))
    yield made
    if (weight := cells[0].path.shared_weight) is not None:
        yield f"the shared expert runs among the others, with weight {weight:g}"


def moves(stage: Stage, tokens: int) -> str:
    """Bytes, and how values are rounded: not at all, as the checkpoint's scheme asks, or by the user's word alone."""
    each = size(stage.nbytes / tokens)
    if stage.role == "dispatch":
        return f"sends {each}" if stage.nbytes else ""
    if stage.role not in ADAPTERS:
        return ""
    how = "LOSSY" if not stage.exact else "by scheme" if stage.role in ("encode", "requantise") else "exact"
    return f"{how}, {each}"


def costs(report: Report) -> Iterator[str | Table]:
    yield (f"\n[bold]a step of one rank, {report.context} positions per request "
           "(floor: data sheet, without links between ranks)[/bold]")  # fmt: skip
    made = table("step", "bytes", "operations", "floor", "bound by", "tokens/s at most")
    for phase, requests, each in report.steps():
        what = f"{phase}, batch {requests}" if phase == "decode" else f"{phase}, {PREFILL} tokens"
        floor, rate = "unknown", ""
        if each.seconds:
            floor, rate = f"{each.seconds * 1e3:.3f} ms", f"{each.tokens / each.seconds:,.0f}"
        bound = each.bound if each.seconds else ""
        made.add_row(what, size(each.nbytes), f"{each.operations / 1e9:,.1f} G", floor, bound, rate)
    yield made
    if (batches := report.ranks // report.wishes.tp) > 1:
        yield f"{batches} such batches run side by side; tokens/s are of all"
    yield ""


def memory(report: Report) -> Iterator[str]:
    held, kv, spec = report.fit, report.plan.kv_bytes_per_token, report.spec
    words = (2 - spec.tied) * vocabulary(spec, report.wishes) * spec.hidden * ITEMSIZE[report.plan.base.dtype]
    form = "" if report.plan.kv == "bf16" else f"in {report.plan.kv}, "
    part = f"{100 * (1 - RESERVE):.0f}% of {size(report.hardware.memory)}"
    yield f"memory of one rank: {size(held.usable)} usable ({part})"
    yield (f"weights {size(held.weights)}, of them embedding and head {size(words)}; "
           f"KV {form}{kv:,} bytes per token")  # fmt: skip
    if not held.lacking:
        requests = held.tokens // report.context
        yield f"[bold]fits[/bold], with room for {held.tokens:,} tokens: {requests:,} requests of {report.context}"
        return
    text = f"[bold]does not fit[/bold]: lacks {size(held.lacking)} for weights and one request"
    if report.more:
        lacking = ranks(report.more) - report.ranks
        options = " ".join(f"--{name} {count}" for name in ("tp", "ep") if (count := getattr(report.more, name)) > 1)
        text += f"; needs {lacking} more {report.hardware.name} ({options})"
    yield text
    if report.more and not report.wishes.hypothetical:
        yield "several ranks are not built yet: --hypothetical shows what they would do"
    if report.fp8_kv:
        known = report.fp8_kv.hypothetical and not report.wishes.hypothetical
        yield "fits with FP8 KV (--kv fp8)" + (", which is known, but not built into Moesaic yet" if known else "")


# --- a refusal -------------------------------------------------------------------------------------------------------


def refused(report: Report) -> Iterator[str | Table]:
    made = report.made
    assert isinstance(made, Refusal)
    kind = "known, but not built yet" if made.kind == "not_built" else "impossible"
    yield headline(report)
    yield f"[bold]no plan[/bold] ({kind}). {escape(made.where)}: {escape(made.what)}"
    if made.reasons:
        yield ""
        rows = table("candidate", "reason")
        for reason, candidates in grouped(made.reasons, report.wishes):
            rows.add_row(escape(", ".join(candidates)), escape(reason))
        yield rows
        yield ""
    if made.nearest:
        yield f"works here: {escape(made.nearest)}"
    if made.kind == "not_built":
        yield "what it would be, if all that is known were built: --hypothetical"


def grouped(reasons: Iterable[Rejection], wishes: Wishes) -> list[tuple[str, list[str]]]:
    """(reason, candidates): first of what was asked for, last of what merely was not."""
    found: dict[str, list[str]] = {}
    for each in reasons:
        found.setdefault(each.reason, []).append(each.candidate)
    asked = {*names_in(wishes.experts), *names_in(wishes.dispatch)}

    def order(item: tuple[str, list[str]]) -> tuple[bool, bool]:
        reason, candidates = item
        return reason.endswith("was asked for"), not any(asked & set(name.split()) for name in candidates)

    return sorted(found.items(), key=order)


# --- one kernel ------------------------------------------------------------------------------------------------------


def why(report: Report, kernel: str) -> list[str]:
    """Where a kernel or dispatcher was taken and why it was not elsewhere: one line per place where it could stand."""
    made = report.made
    said: dict[str, None] = {}
    if isinstance(made, Refusal):
        said |= {f"{made.where}: {line}": None for line in told(made.reasons, kernel)}
        return list(said)
    for layer in made.layers:
        for cell in layer.cells:
            where = f"mixture of {named(report, layer.layers)}, {cell.phase}"
            taken = [stage.role for stage in cell.path.stages if stage.kernel == kernel]
            lines = [f"taken for {', '.join(taken)}"] if taken else []
            lines += told(cell.rejected, kernel) if not {"experts", "dispatch"} & set(taken) else []
            said |= {f"{where}: {line}": None for line in lines}
    for need, choices in made.ops.items():
        usual = (need.format, need.encoding) == (made.base.format, made.base.encoding)
        how = "" if usual else f" of {need.format} weights with {need.encoding} rows"
        for choice in choices:
            if choice.chosen == kernel:
                said[f"{choice.op}{how}: taken"] = None
            said |= {f"{choice.op}{how}: {r.reason}": None for r in choice.rejected if r.candidate == kernel}
    return list(said)


def told(reasons: Iterable[Rejection], kernel: str) -> list[str]:
    """Where the kernel stood in pairs, it could by itself: then why they do not, and not what another variant lacks."""
    pairs = [each for each in reasons if kernel in each.candidate.split(" with ") and each.candidate != kernel]
    alone = [each.reason for each in reasons if each.candidate == kernel]
    routers = [each for each in reasons if each.candidate == f"{kernel} as router"]
    lines = [f"{each.candidate}: {each.reason}" for each in pairs] or alone
    return lines + [f"{each.candidate}: {each.reason}" for each in routers]


def check_known(name: str, known: Iterable[str], option: str) -> None:
    """Raises OptionError for a kernel or dispatcher that nobody has heard of."""
    names = sorted(set(known))
    if name not in names:
        raise OptionError(f"unknown name {name!r:.80}", where=option, remedy=f"Known: {', '.join(names)}.")
