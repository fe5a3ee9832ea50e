"""`moesaic eval --schemes`: statistics, the replay that saves generating, distances, what is said of failures."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from moesaic import LLM, SamplingParams
from moesaic.assets import embedded_model
from moesaic.cli import main
from moesaic.commands import _scheme_table, _schemes
from moesaic.commands.eval import of_families
from moesaic.contracts.scheme import SCHEMES
from moesaic.engine.forced import Distance, distance, forced_logits, means, packed
from moesaic.errors import UnsupportedError
from moesaic.tasks.paired import Z95, Paired
from scripts import draw_accuracy, readme_tables

REPO = Path(__file__).resolve().parents[1]
FAMILIES = ("units", "weekday", "edge_letters")


def open_model(scheme: str | None = None, **options: Any) -> LLM:
    return LLM(str(embedded_model()), dtype="float32", quantization=scheme, progress=False, **options)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return open_model()


# --- statistics ------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_published_example() -> None:
    """Bentur et al. 2009, as in Fagerland, Lydersen and Laake 2014 (Stat. Med. 33:2850): 1, 1, 7, 12 of 21 children."""
    low, high = Paired(lost=7, gained=1, count=21).interval
    assert (round(low, 3), round(high, 3)) == (-0.517, -0.026)


@pytest.mark.parametrize(("lost", "gained", "count"), [(0, 0, 50), (3, 20, 4014), (20, 3, 60), (1, 0, 7), (5, 5, 11)])
def test_the_score_against_the_likelihood(lost: int, gained: int, count: int) -> None:
    """The nuisance share by brute force: the most likely of a fine grid, for differences across the interval."""
    paired = Paired(lost, gained, count)
    low, high = paired.interval
    assert low <= paired.difference <= high
    for d in (low, high):
        shares = [max(0.0, -d) + k * (1 - abs(d)) / 2 / 200_000 for k in range(200_001)]
        best = max(shares, key=lambda q: likelihood(q, d, paired))
        deviation = math.sqrt(count * (2 * best + d - d * d))
        assert abs(gained - lost - count * d) / deviation == pytest.approx(Z95, rel=2e-3)


def likelihood(q: float, d: float, paired: Paired) -> float:
    """Logarithm of the trinomial likelihood of lost (share q), gained (q + d) and the rest."""
    terms = ((paired.lost, q), (paired.gained, q + d), (paired.count - paired.lost - paired.gained, 1 - 2 * q - d))
    return sum(n * math.log(p) if p > 0 else (-math.inf if n else 0.0) for n, p in terms)


def test_the_ends_of_the_range() -> None:
    assert Paired(0, 0, 0).interval == (-1.0, 1.0)
    assert Paired(9, 0, 9).interval[0] == pytest.approx(-1.0)
    assert Paired(0, 9, 9).interval[1] == pytest.approx(1.0)
    swapped = Paired(3, 8, 40).interval
    assert Paired(8, 3, 40).interval == pytest.approx((-swapped[1], -swapped[0]), abs=1e-12)


def test_the_exact_test_by_enumeration() -> None:
    """Every way in which n coins can fall, counted."""
    for lost, gained in ((0, 0), (1, 0), (2, 2), (1, 6), (0, 9)):
        n = lost + gained
        falls = [bin(k).count("1") for k in range(2**n)]
        extreme = sum(abs(2 * heads - n) >= abs(gained - lost) for heads in falls)
        assert Paired(lost, gained, 50).p_value == pytest.approx(extreme / 2**n)


def test_marks_are_paired() -> None:
    assert Paired.of([True, True, False, False], [True, False, True, True]) == Paired(1, 2, 4)
    with pytest.raises(ValueError, match="shorter"):
        Paired.of([True, False], [True])


# --- teacher forcing -------------------------------------------------------------------------------------------------


def test_forced_logits_are_those_of_generating(llm: LLM) -> None:
    """Log-probs of the engine's own decoding steps: another path through the model (absorbed, paged, one by one)."""
    prompts = [llm.encode(text) for text in ("What is 487 + 38?", "Which day is two days after Monday?", "Hi")]
    results = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=25, logprobs=0))
    texts = [(p, r.tokens) for p, r in zip(prompts, results, strict=True)]
    for budget in (1, 40, 4096):  # each text alone, two together, all
        for logits_AV, result in zip(forced_logits(llm.launched.built.model, texts, budget), results, strict=True):
            assert logits_AV.argmax(-1).tolist() == result.tokens
            found = torch.log_softmax(logits_AV.double(), -1).gather(1, torch.tensor(result.tokens)[:, None])[:, 0]
            wanted = torch.tensor([each.logprob for each in result.completions[0].logprobs], dtype=torch.float64)
            assert torch.allclose(found, wanted, atol=1e-4)


def test_texts_are_packed_in_order_within_the_budget() -> None:
    draw = random.Random(3)
    texts = [(range(draw.randint(1, 9)), range(draw.randint(1, 9))) for _ in range(60)]
    batches = list(packed(texts, 20))
    assert [text for batch in batches for text in batch] == texts
    sizes = [[len(p) + len(a) - 1 for p, a in batch] for batch in batches]
    assert all(sum(size) <= 20 or len(size) == 1 for size in sizes)
    assert all(sum(size) + following[0] > 20 for size, following in pairwise(sizes))
    assert list(packed([], 20)) == []
    assert [len(batch) for batch in packed([(range(50), range(50)), ([1], [1])], 20)] == [1, 1]


def test_distances_by_hand() -> None:
    """p = (1/2, 1/2, 0+), q = (3/4, 1/4, 0+): KL = 1/2 log(2/3) + 1/2 log 2; the answer is token 1, then token 0."""
    p = torch.tensor([[0.5, 0.5, 1e-30], [0.75, 0.25, 1e-30]]).log()
    q = torch.tensor([[0.75, 0.25, 1e-30], [0.75, 0.25, 1e-30]]).log() + 7  # a constant changes no distribution
    found = distance(p, q, [1, 0])
    kl = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert found.kl == pytest.approx(kl, rel=1e-6)
    assert found.logprob == pytest.approx(math.log(2), rel=1e-6)
    assert (found.tokens, found.same) == (2, 2)
    other = distance(p[:1], torch.tensor([[0.0, 1.0, 2.0]]), [1])
    probabilities = torch.softmax(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), 0)
    wanted = torch.nn.functional.kl_div(probabilities.log(), torch.tensor([0.5, 0.5, 0.0]).double(), reduction="sum")
    assert (other.kl, other.same) == (pytest.approx(float(wanted), rel=1e-6), 0)
    vectors = distance(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[13.0, 11.0, 15.0]]), [0])
    assert vectors.logits == pytest.approx(math.sqrt(6) / math.sqrt(2))  # (-1, -1, 2) against (1, -1, 0)


def test_means_and_their_error_by_hand() -> None:
    """Two answers of 1 and 3 tokens: kl 0.1 a token and 0.3 a token, so 0.25; residuals -0.15 and +0.15."""
    found = means([Distance(1, 0.1, 0.5, 0.2, 1), Distance(3, 0.9, 1.5, 0.2, 2)])
    error = math.sqrt(2 * 0.15**2) / 4
    assert found == pytest.approx({"kl": 0.25, "kl_error": error, "logprob": 0.5, "logits": 0.1, "same": 0.75})
    assert set(means([]).values()) == {0.0}
    draw = random.Random(5)
    drawn = [Distance(n := draw.randint(1, 60), draw.expovariate(1) * n, 0.0, 0.0, 0) for _ in range(4000)]
    samples = [means(draw.choices(drawn, k=len(drawn)))["kl"] for _ in range(200)]  # a bootstrap
    centre = sum(samples) / len(samples)
    bootstrap = math.sqrt(sum((each - centre) ** 2 for each in samples) / (len(samples) - 1))
    assert means(drawn)["kl_error"] == pytest.approx(bootstrap, rel=0.2)


def test_logits_that_are_no_numbers_are_refused(llm: LLM) -> None:
    model = open_model(max_model_len=64).launched.built.model
    model.final_norm.weight_D[3] = math.nan
    with pytest.raises(UnsupportedError, match="not finite"):
        list(forced_logits(model, [([5, 6], [7])]))


# --- the comparison --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coarse() -> LLM:
    """A scheme made worse until it errs: rounded to MXFP4, then every expert's weights pulled towards zero."""
    llm = open_model("mxfp4")
    for block in llm.launched.built.model.blocks[1:]:
        scale = block.mlp.experts.weights.w2.parts["scale"]  # type: ignore[union-attr]
        scale.sub_(1)  # half of the stored value
    return llm


def test_a_replay_gives_the_answers_of_generating(llm: LLM, coarse: LLM) -> None:
    """The marks that the replay gives are those of the model's own generation of every answer, from scratch."""
    asked = of_families(llm, FAMILIES, 4)
    how = _schemes.How(max_tokens=100)
    sound, first = _schemes.listen(llm, asked, how)
    row = _schemes.against(coarse, "coarse", sound, how)
    results = coarse.generate([a.prompt for a in asked], SamplingParams(temperature=0, max_tokens=100))
    right = [a.right(r.text) for a, r in zip(asked, results, strict=True)]
    assert row["other_answers"] == sum(r.tokens != s for r, s in zip(results, sound.answers, strict=True)) > 3
    assert row["right"] == sum(right) < first["right"]
    pairs = list(zip(sound.right, right, strict=True))
    assert (row["lost"], row["gained"]) == (pairs.count((True, False)), pairs.count((False, True)))
    assert row["kl"] > 1e-3
    texts = _schemes.go_on(coarse, sound, _schemes.replay(coarse, "coarse", sound, how)[1], how)
    for i, text in texts.items():
        if len(results[i].tokens) <= how.patience(sound.answers[i]):
            assert text == results[i].text


def test_the_model_against_itself(llm: LLM) -> None:
    sound, first = _schemes.listen(llm, of_families(llm, FAMILIES, 2), _schemes.How(max_tokens=320))
    row = _schemes.against(llm, "itself", sound, _schemes.How(max_tokens=320))
    assert (row["lost"], row["gained"], row["other_answers"], row["kl"], row["logprob"]) == (0, 0, 0, 0.0, 0.0)
    assert row["same"] == 1.0
    assert row["families"] == first["families"]


def test_bytes_are_those_of_the_formats(llm: LLM) -> None:
    """By hand, for tiny: 5 mixtures (one of them drafts) of 16 experts, three matrices of 128 x 256 each."""
    values = 5 * 16 * 3 * 128 * 256
    sound = _schemes.weights(llm.launched.built.model)
    assert (sound["experts"], sound["others"], sound["expert_bytes"]) == ("bf16", "bf16", 2 * values)
    found = _schemes.weights(open_model("mxfp8").launched.built.model)
    assert (found["experts"], found["others"]) == ("mxfp8 x mxfp8", "mxfp8 x mxfp8")
    assert found["expert_bytes"] == values + values // 32
    stored = sum(file.stat().st_size for file in embedded_model().glob("*.safetensors"))
    copies = 2 * 2 * 1024 * 256  # the draft layer's own embedding and head, which are not loaded
    assert 0 <= stored - copies - sound["bytes"] < 150_000  # headers
    fewer = open_model("w4afp8").launched.built.model
    assert _schemes.weights(fewer)["experts"] == "int4_g128 x fp8_tensor"


def test_kept_logits_are_spread_evenly(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = of_families(llm, ("weekday",), 7)
    answers = _schemes.listen(llm, asked, _schemes.How(max_tokens=12))[0].answers
    monkeypatch.setattr(_schemes, "KEEP_BYTES", sum(map(len, answers)) * 1024 * 4 // 3)
    sound, row = _schemes.listen(llm, asked, _schemes.How(max_tokens=12))
    assert list(sound.logits) == [0, 3, 6]
    assert (row["texts"], row["tokens"]) == (3, sum(len(answers[i]) for i in (0, 3, 6)))


def test_a_scheme_that_fails_is_reported_and_the_others_go_on() -> None:
    opened: list[str | None] = []

    def opener(scheme: str | None) -> LLM:
        opened.append(scheme)
        if scheme == "fp8":
            raise UnsupportedError("cannot be", where="here", remedy="Do without.")
        return open_model(scheme)

    rows = list(
        _schemes.compare(
            opener, lambda llm: of_families(llm, ("weekday",), 2), ["bf16", "fp8", "mxfp8", "mxfp4"],
            _schemes.How(max_tokens=320), {"mxfp4": {"scheme": "mxfp4", "kept": True}},
        )
    )  # fmt: skip
    assert opened == [None, "fp8", "mxfp8"], "bf16 is the first row, and mxfp4 was measured before"
    assert [row["scheme"] for row in rows] == ["bf16", "fp8", "mxfp8", "mxfp4"]
    assert rows[1] == {"scheme": "fp8", "error": "here: cannot be. Do without."}
    assert rows[3] == {"scheme": "mxfp4", "kept": True}
    assert "- `fp8`: here: cannot be. Do without." in _scheme_table.table(rows[:3])


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "--tasks", "weekday,chain", "--limit", "2", "--dtype", "float32", "--no-progress"]
    assert main([*words, "--schemes", "fp8,nvfp4", "--json"]) == 1, "nvfp4 was asked for and needs calibrated scales"
    report = json.loads(capsys.readouterr().out)
    assert (report["items"], report["dtype"], report["texts"]) == (4, "float32", 4)
    assert [row["scheme"] for row in report["rows"]] == ["bf16", "fp8", "nvfp4"]
    assert "moesaic quantize --scheme nvfp4 --calibrate" in report["rows"][2]["error"]
    assert 0 < report["rows"][1]["kl"] < 1e-3
    assert main([*words, "--schemes", "wna16"]) == 0
    out = capsys.readouterr().out
    assert "| `wna16` | int4_g128 |" in out
    assert "computed in float32" in out


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--schemes", "fp9"], "fp9"), (["--schemes", ""], "--schemes"),
     (["--schemes", "all", "--quantization", "fp8"], "--quantization")],
)  # fmt: skip
def test_wrong_options(options: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *options]) != 0
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


# --- what is generated -----------------------------------------------------------------------------------------------


def report() -> dict[str, Any]:
    """A result file in small; the figures are made up."""
    shared = {"count": 100, "bytes": 8 << 20, "expert_bytes": 4 << 20, "families": {"a": 1}, "seconds": 1.0}
    first = {**shared, "scheme": "bf16", "experts": "bf16", "others": "bf16", "accuracy": 0.99, "bytes": 16 << 20}
    first |= {"dtype": "float32", "texts": 3, "tokens": 50}
    pair = {"lost": 1, "gained": 0, "difference": -0.01, "interval": (-0.03, 0.01), "p_value": 1.0, "other_answers": 4}
    rows = [first]
    for i, name in enumerate(SCHEMES):
        found = {"scheme": name, "experts": "mxfp4 x mxfp8" if i % 2 else "fp8_block", "others": "fp8_block"}
        apart = {"kl": 10.0 ** -(3 + i / 4), "kl_error": 1e-6, "logprob": 0.1, "logits": 0.1, "same": 0.9}
        rows.append({**shared, **pair, **found, **apart, "accuracy": 0.98})
    rows.append({"scheme": "none", "error": "is missing"})
    return _scheme_table.report(rows, "tiny")


def test_the_table_says_what_is_there() -> None:
    text = _scheme_table.text(report())
    figures = "8.00 | 4.00 | 98.00% | -1.00 (-3.00 to +1.00) | 1, 0 | 1 |"
    assert f"| `fp8` | experts mxfp4 x mxfp8; others fp8_block | {figures}" in text
    assert f"| `fp8a16` | fp8_block | {figures}" in text
    assert "| `bf16` | bf16 | 16.00 |" in text
    assert "- `none`: is missing" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert _scheme_table.points(-0.00001) == "+0.00"


def test_every_scheme_is_drawn_in_both_panels_and_labels_do_not_collide() -> None:
    picture = ElementTree.fromstring(draw_accuracy.svg(report()))
    space = "{http://www.w3.org/2000/svg}"
    circles = [node for node in picture.iter(f"{space}circle") if node.find(f"{space}title") is not None]
    names = sorted(node.findtext(f"{space}title") or "" for node in circles)
    assert names == sorted([*SCHEMES, *SCHEMES, "bf16"])
    labels = [node for node in picture.iter(f"{space}text") if node.text in SCHEMES]
    spots = sorted((node.get("x"), float(node.get("y") or 0)) for node in labels)
    gaps = [b - a for (x, a), (other, b) in pairwise(spots) if x == other]
    assert min(gaps) >= draw_accuracy.LABEL - 0.2
    height = float((picture.get("viewBox") or "").split()[3])
    assert all(0 < y < height for _, y in spots)
    assert draw_accuracy.svg(report()) == draw_accuracy.svg(report())


def test_a_scale_holds_its_values() -> None:
    axis = draw_accuracy.linear([7.3, 22.58], 100, 500)
    assert [text for _, text in axis.ticks] == ["5", "10", "15", "20", "25"]
    assert axis.at(5) == 100
    assert axis.at(15) == 300
    logs = draw_accuracy.decades([3e-7, 2e-5], 300, 100)
    assert [text for _, text in logs.ticks] == ["1e-7", "1e-6", "1e-5", "1e-4"]
    assert logs.at(1e-6) == pytest.approx(300 - 200 / 3, abs=0.1)


def test_the_page_and_its_picture_are_fresh() -> None:
    for path, text in readme_tables.outputs().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.relative_to(REPO)}: run `make docs`, commit the result"
    page = (REPO / "docs" / "accuracy.md").read_text(encoding="utf-8")
    for name in ("schemes", "rounding", "kv-b-proj", "sensitivity"):
        assert page.count(f"<!-- table:{name} begin -->") == page.count(f"<!-- table:{name} end -->") == 1
