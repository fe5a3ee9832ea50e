"""What does each number format cost, in accuracy, in distance from BF16 and in bytes?

    python benchmarks/schemes.py [--limit 223] [--schemes all] [--again] [--name schemes]

`moesaic eval --schemes` on `tiny`: 18 families of tasks, the same items in every scheme, computed in float32 so that
the machine's own rounding does not enter. Schemes with static scales of activations are first written by
`moesaic quantize`, calibrated on items of the train split with their reference solutions.

The result file is written after each scheme. A run with the same settings at the same commit goes on where the last one
ended, unless source files differ from the commit (--again: measure everything anew; --keep-rows: go on all the same).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from benchmarks.machine import RESULTS, describe, keep, save
from moesaic import LLM
from moesaic.assets import embedded_model
from moesaic.cli import main as moesaic
from moesaic.commands import _scheme_table
from moesaic.commands._schemes import How, compare
from moesaic.commands.eval import SCHEME_ITEMS, TASK_TOKENS, of_families
from moesaic.contracts.scheme import SCHEMES
from moesaic.tasks import FAMILIES, items

FILE = RESULTS / "schemes.json"
CALIBRATION = 4
"""Items per family that static scales are calibrated on."""


class Models:
    """Opens `tiny` in any scheme. folder: for checkpoints that have to be written."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, str(embedded_model())

    def open(self, scheme: str | None) -> LLM:
        if scheme is not None and SCHEMES[scheme].activation.static:
            return LLM(self.calibrated(scheme), dtype="float32", progress=False)
        return LLM(self.path, dtype="float32", quantization=scheme, progress=False)

    def calibrated(self, scheme: str) -> str:
        """The directory of a checkpoint with static scales."""
        prompts, out = self.folder / "calibration.jsonl", self.folder / scheme
        found = [item for name in FAMILIES for item in items(name, "train", CALIBRATION)]
        lines = [
            {"messages": [{"role": "user", "content": i.prompt}, {"role": "assistant", "content": i.worked}]}
            for i in found
        ]
        prompts.write_text("\n".join(map(json.dumps, lines)))
        words = ["quantize", self.path, str(out), "--scheme", scheme, "--calibrate", str(prompts), "--no-progress"]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            failed = moesaic(words)
        if failed:
            raise SystemExit(f"moesaic {' '.join(words)}: {said.getvalue()}")
        return str(out)


def earlier(file: Path, settings: dict[str, Any], keep: bool) -> dict[str, dict[str, Any]]:
    """Rows of the result file that may stand: same settings, same commit, nothing changed since."""
    if not file.exists():
        return {}
    old = json.loads(file.read_text())
    same = all(old.get(name) == value for name, value in settings.items() if name != "commit" or not keep)
    clean = not str(settings["commit"]).endswith("+changes")
    rows = old["rows"] if same and (clean or keep) else []
    return {row["scheme"]: row for row in rows if "error" not in row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=SCHEME_ITEMS, help="items per family")
    parser.add_argument("--schemes", default="all", help="names, separated by commas")
    parser.add_argument("--again", action="store_true", help="measure everything anew")
    parser.add_argument("--keep-rows", action="store_true", help="keep what an earlier commit measured")
    parser.add_argument("--name", default="schemes", help="of the result file")
    args = parser.parse_args()
    names = list(SCHEMES) if args.schemes == "all" else args.schemes.split(",")
    machine = describe("torch")
    settings = {"what": "schemes", "limit": args.limit, "calibration": CALIBRATION, "max_tokens": TASK_TOKENS}
    settings |= {name: machine[name] for name in ("device", "commit", "versions")}
    done = {} if args.again else earlier(RESULTS / f"{args.name}.json", settings, args.keep_rows)
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        models, how = Models(Path(folder)), How(TASK_TOKENS, progress=True)
        for row in compare(models.open, lambda llm: of_families(llm, FAMILIES, args.limit), names, how, done):
            rows.append(row)
            done.pop(row["scheme"], None)
            result = {**settings, "cores": machine["cores"], **_scheme_table.report([*rows, *done.values()], "tiny")}
            keep(args.name, result)
    print(_scheme_table.text(result))
    print(f"{time.perf_counter() - began:.0f} s")
    save(args.name, result)


if __name__ == "__main__":
    main()
