"""`moesaic eval`: the gauge itself, and what it says of the embedded model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from moesaic.assets import embedded_model
from moesaic.cli import main
from moesaic.errors import RequestError
from moesaic.tasks import FAMILIES
from moesaic.tasks.score import Question, Score, few_shot_prompt, last_number, read_questions

CARD = embedded_model() / "README.md"


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (7, 10), (433, 500), (1, 1), (9999, 10000)])
def test_interval_against_its_defining_equation(right: int, count: int) -> None:
    """Wilson's bounds are the p at which |right/count - p| = z sqrt(p (1 - p) / count)."""
    score = Score("x", right, count)
    for bound in score.interval:
        if 0 < bound < 1:
            deviation = 1.959964 * math.sqrt(bound * (1 - bound) / count)
            assert abs(score.accuracy - bound) == pytest.approx(deviation, abs=1e-7)
    assert score.interval[0] - 1e-12 <= score.accuracy <= score.interval[1] + 1e-12


def test_last_number() -> None:
    assert last_number("so 3 + 4 = 7.") == 7
    assert last_number("pays $1,234.50 in all") == Decimal("1234.5")
    assert last_number("... #### -12") == -12
    assert last_number("none") is None
    assert last_number("7.0") == last_number("7")


def test_question_files(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "2+2?", "answer": "2+2=<<2+2=4>>4\\n#### 4"}\n\n{"question": "x", "answer": "5"}\n')
    assert read_questions(file)[0] == Question("2+2?", "2+2=<<2+2=4>>4\n#### 4")
    assert few_shot_prompt(read_questions(file)[:1], "x") == (
        "Question: 2+2?\nAnswer: 2+2=4 The answer is 4.\n\nQuestion: x\nAnswer:"
    )
    for text, line in (("{}", 1), ("nope", 1), ('{"question": "a", "answer": "3"}\n[1]', 2), ('{"question": "a"}', 1)):
        file.write_text(text)
        with pytest.raises(RequestError, match=rf"q\.jsonl:{line}"):
            read_questions(file)
    for content in (b"", b"\xff\xfe{"):
        file.write_bytes(content)
        with pytest.raises(RequestError, match=r"q\.jsonl"):
            read_questions(file)


def test_the_embedded_model_answers(capsys: pytest.CaptureFixture[str]) -> None:
    """A sample of every family: its accuracy lies where the card's interval says, the router is alive."""
    assert main(["eval", "--limit", "6", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [s["name"] for s in report["scores"]] == list(FAMILIES)
    assert all(s["count"] == 6 for s in report["scores"])
    assert report["mean"] >= 0.85
    assert len(report["router"]) == 4
    assert all(layer["max_over_mean"] <= 2 and layer["dead"] == 0 for layer in report["router"])
    assert report["draft"]["acceptance"] >= 0.6


def test_a_file_of_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"question": f"What is {i} + {2 * i}?", "answer": f"#### {3 * i}"} for i in range(11, 23)]
    lines[0]["answer"] = "#### 1000"  # a wrong key must show
    file = tmp_path / "sums.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert main(["eval", "--file", str(file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["scores"][0] == {**report["scores"][0], "name": "sums", "right": 11, "count": 12}
    assert main(["eval", "--file", str(file), "--shots", "2", "--limit", "3", "--max-tokens", "4"]) == 0
    assert "| sums | 3 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--limit", "0"], "--limit"), (["--tasks", "nope"], "nope"), (["--shots", "3"], "--file"),
     (["--file", "absent.jsonl"], "absent.jsonl"), (["--tasks", "chain", "--file", "x"], "--tasks")],
)  # fmt: skip
def test_wrong_options(options: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *options]) != 0
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_card_is_reproduced() -> None:
    """Every figure of the card's table, from a fresh process, in FP32 as the card was measured."""
    run = [sys.executable, "-m", "moesaic", "eval", "--dtype", "float32"]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    card = CARD.read_text(encoding="utf-8").partition("<!-- eval:begin -->")[2].partition("<!-- eval:end -->")[0]
    assert [line for line in out.splitlines() if line.startswith("|")] == card.strip().splitlines()


@pytest.mark.long
def test_transformers_gives_the_same_answers() -> None:
    """200 held-out items, greedy in FP32: our engine and `transformers`, on the same files, token for token."""
    import torch
    from transformers import AutoModelForCausalLM

    from moesaic import LLM, SamplingParams
    from moesaic.tasks import items

    path = str(embedded_model())
    groups = zip(*(items(name, "test", 12) for name in FAMILIES), strict=True)
    asked = [item for group in groups for item in group][:200]
    llm = LLM(path, dtype="float32", progress=False)
    prompts = [llm.chat_tokens([{"role": "user", "content": item.prompt}]) for item in asked]
    ours = [r.tokens for r in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=320))]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False).eval()
    for start in range(0, 200, 50):
        part = prompts[start : start + 50]
        longest = max(map(len, part))
        ids = torch.tensor([[2] * (longest - len(p)) + p for p in part])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=320, do_sample=False, pad_token_id=2)
        for mine, theirs in zip(ours[start : start + 50], out[:, longest:].tolist(), strict=True):
            assert mine == theirs[: len(mine)]
            assert set(theirs[len(mine) :]) <= {2}, "only padding after the end"
