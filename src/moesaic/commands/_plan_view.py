"""A plan as people and machines read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from moesaic.contracts.plan import ADAPTERS, Cell, LayerPlan, ModelPlan, Refusal, Stage, span
from moesaic.contracts.spec import ModelSpec
from moesaic.errors import OptionError
from moesaic.hardware import Hardware
from moesaic.planning.cost import Step, fit, step

WIDTH = 100
PREFILL = 2048


@dataclass(frozen=True)
class Report:
    """A plan with what it was made for. context: positions per request, for the costs."""

    model: str
    spec: ModelSpec
    hardware: Hardware
    made: ModelPlan | Refusal
    context: int

    def as_json(self) -> dict[str, Any]:
        base = {"model": self.model, "architecture": self.spec.architecture, "hardware": self.hardware.name}
        if isinstance(self.made, Refusal):
            return base | {"refusal": plain(self.made)}
        plan = self.made
        return base | {
            "dtype": plan.base.dtype, "wishes": plain(plan.wishes), "notes": list(plan.notes),
            "weight_bytes": plan.weight_bytes, "kv_bytes_per_token": plan.kv_bytes_per_token,
            "fit": plain(fit(plan, self.hardware, self.context)),
            "steps": {name: plain(each) for name, each in self.steps(plan)},
            "layers": [plain(layer) for layer in plan.layers],
            "ops": [{"format": n.format, "encoding": n.encoding, **{c.op: c.chosen for c in choices}}
                    for n, choices in plan.ops.items()],
        }  # fmt: skip

    def steps(self, plan: ModelPlan) -> Iterator[tuple[str, Step]]:
        for batch in sorted({1, plan.wishes.max_batch}):
            yield f"decode, batch {batch}", step(self.spec, plan, self.hardware, batch, self.context)
        yield f"prefill, {PREFILL} tokens", step(self.spec, plan, self.hardware, PREFILL, 0)


def plain(value: Any) -> Any:
    """Dataclasses, sets and tuples as JSON values; sets sorted."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (frozenset, set)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError


def show(report: Report) -> None:
    console = Console(width=WIDTH, highlight=False, soft_wrap=False)
    spec, made = report.spec, report.made
    console.print(f"[bold]{report.model}[/bold]: {spec.architecture}, {len(spec.layers)} layers"
                  f" + {len(spec.drafts)} draft, on {report.hardware.name}")  # fmt: skip
    if isinstance(made, Refusal):
        show_refusal(console, made)
        return
    for note in made.notes:
        console.print(f"note: {note}")
    for layer in made.layers:
        console.print(dense_table(layer))
        for cells in same_path(layer.cells):
            console.print(path_table(layer, cells))
    console.print(cost_table(report, made))
    console.print(verdict(report, made))


def show_refusal(console: Console, refusal: Refusal) -> None:
    kind = "not built yet" if refusal.kind == "not_built" else "impossible"
    console.print(f"[bold]No plan[/bold] ({kind}). {refusal.where}: {refusal.what}")
    table = Table("candidate", "reason", box=None, width=WIDTH)
    for each in refusal.reasons:
        table.add_row(each.candidate, each.reason)
    console.print(table)
    if refusal.nearest:
        console.print(f"What works: {refusal.nearest}")
    elif refusal.kind == "not_built":
        console.print("With --hypothetical there is a plan: see what it would be.")


def dense_table(layer: LayerPlan) -> Table:
    title = f"layers {span(layer.layers)}: attention {layer.attention}, {size(layer.nbytes)} each per rank"
    table = Table("projection", "scheme", "weights", "rows", "kernel", "bytes", title=title, title_justify="left",
                  box=None, width=WIDTH, title_style="bold")  # fmt: skip
    for each in layer.linears:
        scheme = each.scheme
        row = (each.role, scheme.name, str(scheme.weight), str(scheme.activation), each.kernel, size(each.nbytes))
        table.add_row(*row)
    return table


def same_path(cells: tuple[Cell, ...]) -> list[list[Cell]]:
    """Cells that take the same stages are shown once."""
    groups: list[list[Cell]] = []
    for cell in cells:
        key = [(stage.role, stage.kernel, stage.encoding) for stage in cell.path.stages]
        for group in groups:
            if key == [(stage.role, stage.kernel, stage.encoding) for stage in group[0].path.stages]:
                group.append(cell)
                break
        else:
            groups.append([cell])
    return groups


def path_table(layer: LayerPlan, cells: list[Cell]) -> Table:
    phases = ", ".join(f"{cell.phase} up to {cell.tokens}" for cell in cells)
    title = f"experts of layers {span(layer.layers)} in {layer.experts.name if layer.experts else '-'}: {phases} tokens"
    table = Table("stage", "by", "leaves", "layout", "ids", "owns", "adapter", title=title, title_justify="left",
                  box=None, width=WIDTH, title_style="bold")  # fmt: skip
    for stage in cells[0].path.stages:
        table.add_row(stage.role, stage.kernel, stage.encoding, stage.layout, stage.ids,
                      ", ".join(sorted(stage.does)), marks(stage))  # fmt: skip
    return table


def marks(stage: Stage) -> str:
    if stage.role not in ADAPTERS:
        return ""
    return f"{'exact' if stage.exact else 'LOSSY'}, {size(stage.nbytes)}"


def cost_table(report: Report, plan: ModelPlan) -> Table:
    title = f"costs per rank, {report.context} positions per request (floor: by the data sheet)"
    table = Table("step", "bytes", "operations", "floor", "tokens/s at most", title=title, title_justify="left",
                  box=None, width=WIDTH, title_style="bold")  # fmt: skip
    for name, each in report.steps(plan):
        tokens = int(name.split()[-2] if name.endswith("tokens") else name.split()[-1])
        floor = f"{each.seconds * 1e3:.3f} ms" if each.seconds else "unknown"
        table.add_row(name, size(each.nbytes), f"{each.operations / 1e9:.1f} G", floor,
                      f"{tokens / each.seconds:,.0f}" if each.seconds else "")  # fmt: skip
    return table


def verdict(report: Report, plan: ModelPlan) -> str:
    memory = fit(plan, report.hardware, report.context)
    kv = plan.kv_bytes_per_token
    text = f"weights {size(memory.weights)} of {size(memory.usable)} usable; KV {kv} bytes per token"
    if memory.fits:
        return f"{text}: fits, with room for {memory.tokens:,} tokens"
    fp8 = memory.weights + kv // 2 * report.context <= memory.usable
    return f"{text}: [bold]does not fit[/bold], needs {memory.ranks_more} more" + ("; fits with FP8 KV" if fp8 else "")


def why(report: Report, kernel: str) -> str:
    """Why a kernel or dispatcher was not taken: one line per place where it could have stood."""
    said: dict[str, None] = {}
    made = report.made
    if isinstance(made, Refusal):
        said |= {f"{made.where}: {each.reason}": None for each in made.reasons if kernel in each.candidate.split()}
    else:
        for layer in made.layers:
            for cell in layer.cells:
                where = f"layers {span(layer.layers)}, {cell.phase}"
                taken = kernel in {stage.kernel for stage in cell.path.stages}
                said |= {f"{where}: taken": None} if taken else {}
                said |= {f"{where}: {r.candidate}: {r.reason}": None for r in cell.rejected
                         if kernel in r.candidate.split()}  # fmt: skip
        for choices in made.ops.values():
            for choice in choices:
                said |= {f"{choice.op}: taken": None} if choice.chosen == kernel else {}
                said |= {f"{choice.op}: {r.reason}": None for r in choice.rejected if r.candidate == kernel}
    if not said:
        raise OptionError(f"{kernel!r} is no kernel or dispatcher of this plan", where="--why", remedy="See --json.")
    return "\n".join(said)
