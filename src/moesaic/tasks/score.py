"""Scores: intervals, the numbers in a text, and question / answer files. Standard library only."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from moesaic.errors import RequestError

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Score:
    """right of count, with the 95% Wilson score interval (Wilson 1927, J. Am. Stat. Assoc. 22)."""

    name: str
    right: int
    count: int

    @property
    def accuracy(self) -> float:
        return self.right / self.count if self.count else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Bounds of the proportion; (0, 1) of nothing."""
        if not self.count:
            return 0.0, 1.0
        z, n, p = 1.959964, self.count, self.accuracy
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


@dataclass(frozen=True, slots=True)
class Question:
    """One line of a question file. answer: as written there, worked steps included."""

    question: str
    answer: str


def last_number(text: str) -> Decimal | None:
    """The last number in a text, thousands separators removed: how GSM8K answers are compared."""
    found = NUMBER.findall(text)
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", ""))
    except InvalidOperation:
        return None


def read_questions(path: Path) -> list[Question]:
    """A JSONL file of objects with `question` and `answer` (GSM8K's form).

    Raises RequestError naming the line for whatever is not that, or has no number in its answer.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot be read: {error}", where=str(path), remedy="Give a UTF-8 JSONL file.") from None
    found = [read_question(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise RequestError("holds no questions", where=str(path), remedy="Give one JSON object per line.")
    return found


def read_question(line: str, where: str) -> Question:
    remedy = 'Each line is an object such as {"question": "...", "answer": "... #### 42"}.'
    try:
        value = json.loads(line)
    except ValueError as error:
        raise RequestError(f"is not JSON: {error}", where=where, remedy=remedy) from None
    texts = (value.get("question"), value.get("answer")) if isinstance(value, dict) else (None, None)
    question, answer = (text if isinstance(text, str) else "" for text in texts)
    if not question.strip() or last_number(answer) is None:
        raise RequestError("lacks a question, or an answer with a number", where=where, remedy=remedy)
    return Question(question, answer)


def few_shot_prompt(shots: list[Question], question: str) -> str:
    """Question / answer pairs and the open question, as plain text; GSM8K's calculator marks are taken out."""
    parts = [f"Question: {shot.question}\nAnswer: {plain_steps(shot.answer)}\n\n" for shot in shots]
    return "".join(parts) + f"Question: {question}\nAnswer:"


def plain_steps(answer: str) -> str:
    """`3*4=<<3*4=12>>12 ... #### 12` -> `3*4=12 ... The answer is 12.`"""
    return re.sub(r"\s*####\s*(\S+)\s*$", r" The answer is \1.", re.sub(r"<<[^>]*>>", "", answer)).strip()
