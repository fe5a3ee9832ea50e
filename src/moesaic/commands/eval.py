"""`moesaic eval`: accuracy on fixed tasks, or on a file of questions; how the router and the draft layer did.

With --schemes: what each number format costs in accuracy, in distance from the model as stored, and in bytes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.commands import _scheme_table
from moesaic.commands._options import add_model_options, announce, load
from moesaic.contracts.scheme import SCHEMES
from moesaic.engine.params import SamplingParams
from moesaic.errors import OptionError
from moesaic.tasks import FAMILIES, Item, grade, items
from moesaic.tasks.score import Question, Score, few_shot_prompt, last_number, read_questions

if TYPE_CHECKING:
    from moesaic.llm import LLM, Result

ITEMS, TASK_TOKENS, FILE_TOKENS = 500, 320, 512
SCHEME_ITEMS = 223
"""Per family where schemes are compared: 4,014 in all."""

EPILOG = """\
Without --file: the task families that the embedded model is trained on, held-out items, fixed seeds, greedy decoding.
With --file: GSM8K-style JSONL, one {"question": ..., "answer": ...} per line; the last numbers are compared.

examples:
  moesaic eval                                       the table of the model card
  moesaic eval --tasks chain,weekday --limit 50
  moesaic eval org/model --file gsm8k.jsonl --shots 8 --json
  moesaic eval --schemes all --dtype float32         what each number format costs
"""


@dataclass(frozen=True)
class Asked:
    """One prompt, and how its answer is judged."""

    name: str
    prompt: list[int]
    item: Item | Question

    def right(self, text: str) -> bool:
        if isinstance(self.item, Item):
            return grade(self.item, text)
        return last_number(text) == last_number(self.item.answer)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("eval", help="measure a model's accuracy", description=__doc__, epilog=EPILOG)
    add_model_options(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--tasks", metavar="A,B", help=f"families, of: {', '.join(FAMILIES)} (default: all)")
    group.add_argument("--file", type=Path, metavar="F", help="questions with numeric answers (default: the tasks)")
    group.add_argument("--shots", type=int, default=0, metavar="K", help="worked examples per question (default: 0)")
    group.add_argument("--shots-file", type=Path, metavar="F", help="where they come from (default: first K of --file)")
    group.add_argument("--limit", type=int, metavar="N", help=f"items per family, or questions (default: {ITEMS}, "
                       f"{SCHEME_ITEMS} with --schemes; all)")  # fmt: skip
    group.add_argument(
        "--max-tokens", type=int, metavar="TOKENS",
        help=f"most tokens of an answer (default: {TASK_TOKENS}; {FILE_TOKENS} with --file)",
    )  # fmt: skip
    group.add_argument("--raw", action="store_true", help="no chat template (default: use it, but with --shots)")
    group.add_argument(
        "--schemes", metavar="A,B",
        help=f"quantise the weights as they are loaded, and compare: all, or of: {', '.join(SCHEMES)} (default: no)",
    )  # fmt: skip
    group.add_argument("--json", action="store_true", help="print one JSON object (default: a table)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check(args)
    questions = read_questions(args.file) if args.file else None
    limit = args.max_tokens or (FILE_TOKENS if args.file else TASK_TOKENS)
    stop = ("\nQuestion:", "\n\nQuestion") if args.file and (args.raw or args.shots) else ()
    if args.schemes is not None:
        return run_schemes(args, questions, limit, stop)
    llm = load(args)
    announce(args, llm)
    asked = prompts(llm, args, questions)
    llm.launched.built.model.meter.start()
    began = time.perf_counter()
    results = llm.generate([a.prompt for a in asked], SamplingParams(temperature=0, max_tokens=limit, stop=stop))
    report = summarise(llm, asked, results, time.perf_counter() - began)
    print(json.dumps(report) if args.json else table(report))
    return 1 if report["failed"] else 0


def run_schemes(args: argparse.Namespace, questions: list[Question] | None, limit: int, stop: tuple[str, ...]) -> int:
    """The same items in one scheme after another. 1 if a scheme that was asked for by name could not be measured."""
    from moesaic.commands import _schemes

    def open_model(scheme: str | None) -> LLM:
        if scheme is not None and SCHEMES[scheme].activation.static:
            raise OptionError(
                "needs scales of activations that nothing has measured at load", where=scheme,
                remedy=f"Run `moesaic quantize --scheme {scheme} --calibrate FILE`, then eval what it wrote.",
            )  # fmt: skip
        chosen = argparse.Namespace(**vars(args) | ({} if scheme is None else {"quantization": scheme}))
        llm = load(chosen)
        if scheme is None:
            announce(args, llm)
        return llm

    how = _schemes.How(limit, stop, progress=getattr(args, "progress", True))
    rows = list(_schemes.compare(open_model, lambda llm: prompts(llm, args, questions), schemes(args), how))
    report = _scheme_table.report(rows, args.model or "tiny")
    print(json.dumps(report) if args.json else _scheme_table.text(report))
    return 1 if args.schemes != "all" and any("error" in row for row in rows) else 0


def check(args: argparse.Namespace) -> None:
    """Options that contradict one another are errors before anything is loaded."""
    for name in ("limit", "max_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise OptionError("must be at least 1", where="--" + name.replace("_", "-"), remedy="Raise it.")
    if args.file is None and (args.shots or args.shots_file):
        raise OptionError("needs --file", where="--shots", remedy="Name a file of questions.")
    if args.file is not None and args.tasks:
        raise OptionError("excludes --file", where="--tasks", remedy="Drop one of them.")
    if args.shots_file and not args.shots:
        raise OptionError("needs --shots", where="--shots-file", remedy="Say how many, for example --shots 8.")
    if args.shots < 0:
        raise OptionError("must not be negative", where="--shots", remedy="8 is usual.")
    known(families(args), FAMILIES, "family", "--tasks")
    if args.schemes is not None:
        known(schemes(args), SCHEMES, "scheme", "--schemes")
        if getattr(args, "quantization", None) is not None:
            raise OptionError("excludes --quantization", where="--schemes", remedy="Drop one of them.")


def known(names: list[str], legal: Collection[str], what: str, where: str) -> None:
    unknown = [name for name in names if name not in legal]
    if unknown:
        raise OptionError(f"no such {what}: {', '.join(unknown)}", where=where, remedy=f"Known: {', '.join(legal)}.")


def families(args: argparse.Namespace) -> list[str]:
    return list(FAMILIES) if args.tasks is None else list(dict.fromkeys(args.tasks.split(",")))


def schemes(args: argparse.Namespace) -> list[str]:
    return list(SCHEMES) if args.schemes == "all" else list(dict.fromkeys(args.schemes.split(",")))


def prompts(llm: LLM, args: argparse.Namespace, questions: list[Question] | None) -> list[Asked]:
    return file_prompts(llm, args, questions) if questions else task_prompts(llm, args)


def task_prompts(llm: LLM, args: argparse.Namespace) -> list[Asked]:
    count = args.limit or (ITEMS if args.schemes is None else SCHEME_ITEMS)
    return of_families(llm, families(args), count, raw=args.raw)


def of_families(llm: LLM, names: Iterable[str], count: int, *, raw: bool = False) -> list[Asked]:
    """So many held-out items of each family."""
    found = [(name, item) for name in names for item in items(name, "test", count)]
    return [Asked(name, encode(llm, item.prompt, raw), item) for name, item in found]


def file_prompts(llm: LLM, args: argparse.Namespace, questions: list[Question]) -> list[Asked]:
    """The examples never include the question that they introduce."""
    shots = (read_questions(args.shots_file) if args.shots_file else questions)[: args.shots]
    asked = questions if args.shots_file else questions[len(shots) :]
    if len(shots) < args.shots or not asked:
        raise OptionError(f"{len(shots)} examples are there", where="--shots", remedy="Use fewer, or a larger file.")
    raw = args.raw or bool(shots)
    texts = [few_shot_prompt(shots, each.question) if raw else each.question for each in asked[: args.limit]]
    return [Asked(args.file.stem, encode(llm, text, raw), each) for text, each in zip(texts, asked, strict=False)]


def encode(llm: LLM, text: str, raw: bool) -> list[int]:
    if raw or not llm.template.names:
        return llm.tokenizer.encode(text, max_tokens=llm.max_model_len)
    return llm.chat_tokens([{"role": "user", "content": text}])


def summarise(llm: LLM, asked: list[Asked], results: list[Result], seconds: float) -> dict[str, Any]:
    """Everything that the table and the model card say."""
    names = list(dict.fromkeys(a.name for a in asked))
    right = [a.right(r.text) for a, r in zip(asked, results, strict=True)]
    hits = {name: [ok for a, ok in zip(asked, right, strict=True) if a.name == name] for name in names}
    scores = [Score(name, sum(marks), len(marks)) for name, marks in hits.items()]
    tokens = sum(len(r.tokens) for r in results)
    model = llm.launched.built.model
    routed = [load for load in model.meter.loads() if sum(load.counts)]
    return {
        "scores": [
            {"name": s.name, "right": s.right, "count": s.count, "accuracy": round(s.accuracy, 4),
             "low": round(s.interval[0], 4), "high": round(s.interval[1], 4)}
            for s in scores
        ],
        "mean": round(sum(s.accuracy for s in scores) / len(scores), 4),
        "router": [{"layer": r.layer, "max_over_mean": round(r.balance, 3), "dead": r.dead} for r in routed],
        "draft": draft_report(llm, asked, results),
        "failed": sum(r.completions[0].error is not None for r in results),
        "cut_off": sum(r.completions[0].finish_reason == "length" for r in results),
        "tokens": tokens, "seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds, 1),
        "dtype": str(llm.launched.built.dtype).removeprefix("torch."), "near_ties": llm.engine.stats.near_ties,
    }  # fmt: skip


def draft_report(llm: LLM, asked: list[Asked], results: list[Result]) -> dict[str, Any] | None:
    """Acceptance of the first draft layer on at most 200 of the answers, evenly chosen."""
    from moesaic.engine.drafts import acceptance

    if not llm.launched.built.model.drafts:
        return None
    every = max(1, len(asked) // 200)
    pairs = [(a.prompt, r.tokens) for a, r in zip(asked[::every], results[::every], strict=True)]
    made, right = acceptance(llm.launched.built.model, pairs)
    return {"drafted": made, "accepted": right, "acceptance": round(right / max(1, made), 4)}


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = ["| task | items | accuracy | 95% interval |", "|---|---|---|---|"]
    for s in report["scores"]:
        lines.append(f"| {s['name']} | {s['count']} | {s['accuracy']:.1%} | {s['low']:.1%} to {s['high']:.1%} |")
    lines.append(f"| **mean** | {sum(s['count'] for s in report['scores'])} | **{report['mean']:.1%}** | |")
    if report["router"]:
        worst, dead = max(r["max_over_mean"] for r in report["router"]), sum(r["dead"] for r in report["router"])
        lines.append(f"\nRouter: busiest expert at most {worst:.2f} x the mean of its layer; {dead} unused experts.")
    if report["draft"]:
        lines.append(f"Draft layer: {report['draft']['acceptance']:.1%} of next-token drafts accepted.")
    lines.append(
        f"{report['tokens']} tokens in {report['seconds']} s ({report['tokens_per_second']:.0f} tokens/s) in "
        f"{report['dtype']}; {report['cut_off']} answers cut off, {report['failed']} failed; "
        f"{report['near_ties']} near-ties."
    )
    return "\n".join(lines)
