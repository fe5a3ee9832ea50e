"""The rows of `moesaic eval --schemes` as tables. No torch: the documentation is made of them too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

HEAD = (
    "| scheme | weights x rows | MiB | of them experts | accuracy | difference, 95% interval | lost, gained | p | KL "
    "| log-prob | logits | same token |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)
LEGEND = (
    "*Difference* is in points, on the same items; *lost, gained*: items that only the first row, or only this one, "
    "solves; *p*: McNemar's exact test. Along the answers of the first row, per token: *KL* in nats, with its standard "
    "error; *log-prob*, the magnitude of its difference in nats; *logits*, relative difference of the whole vector; "
    "*same token*: the same most likely one."
)


def table(rows: Sequence[Row]) -> str:
    """Markdown: the first row is what the others are compared with; then why some could not be measured."""
    lines = [HEAD, *(line(row) for row in rows if "error" not in row)]
    failed = [f"- `{row['scheme']}`: {row['error']}" for row in rows if "error" in row]
    return "\n".join([*lines, *(["", "Not measured:", "", *failed] if failed else [])])


def line(row: Row) -> str:
    cells = [
        f"`{row['scheme']}`", formats(row), f"{row['bytes'] / 2**20:.2f}", f"{row['expert_bytes'] / 2**20:.2f}",
        f"{row['accuracy']:.2%}",
    ]  # fmt: skip
    if "difference" in row:
        low, high = row["interval"]
        cells += [
            f"{points(row['difference'])} ({points(low)} to {points(high)})", f"{row['lost']}, {row['gained']}",
            f"{row['p_value']:.2g}", f"{row['kl']:.1e} ± {row['kl_error']:.0e}", f"{row['logprob']:.1e}",
            f"{row['logits']:.2%}", f"{row['same']:.3%}",
        ]  # fmt: skip
    else:
        cells += [""] * 7
    return "| " + " | ".join(cells) + " |"


def formats(row: Row) -> str:
    same = row["experts"] == row["others"]
    return str(row["experts"]) if same else f"experts {row['experts']}; others {row['others']}"


def brief(row: Row) -> str:
    """A measured scheme in a line, to be seen while the next one runs."""
    return (
        f"{row['scheme']}: {points(row['difference'])} points, {row['lost']} lost, {row['gained']} gained, "
        f"KL {row['kl']:.1e}, {row['seconds']} s"
    )


def points(share: float) -> str:
    """0.0123 -> +1.23; never -0.00."""
    return f"{round(100 * share, 2) + 0.0:+.2f}"


def report(rows: Sequence[Row], model: str) -> Row:
    """What was measured, and the rows of `_schemes.compare`."""
    first = rows[0]
    facts = {"model": model, "dtype": first["dtype"], "items": first["count"], "texts": first["texts"]}
    return {**facts, "tokens": first["tokens"], "rows": list(rows)}


def settings(report: Row) -> str:
    """One line of what was measured."""
    return (
        f"{report['items']:,} items, the same for every row; distances along {report['tokens']:,} tokens of "
        f"{report['texts']:,} answers; computed in {report['dtype']}."
    )


def text(report: Row) -> str:
    """The report for people."""
    return f"{table(report['rows'])}\n\n{settings(report)}\n{LEGEND}"
