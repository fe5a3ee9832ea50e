"""Expert choice on Hopper against its twin in FP64: what the CPU's stand-in and the GPU share."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.contracts.spec import RouterSpec
from moesaic.kernels import hopper, reference_fused
from moesaic.kernels._hopper import gate
from moesaic.kernels.reference import scores
from tests.triton_support import device, randn

SPECS = [
    RouterSpec(128, 8, "softmax", "w"), RouterSpec(128, 4, "softmax_topk", "w", renormalize=False),
    RouterSpec(160, 8, "sigmoid", "w", "b", scale=2.5), RouterSpec(8, 2, "softmax", "w"),
    RouterSpec(40, 32, "sigmoid", "w", renormalize=False), RouterSpec(256, 1, "softmax", "w", "b", renormalize=False),
]  # fmt: skip


def check_gate(spec: RouterSpec, tokens: int, hidden: int) -> None:
    """Experts whose scores are, in FP64, those of the twin's choice; weights; padding and counts."""
    wide, made = randn(tokens, hidden + 8), randn(spec.experts, hidden + 4, dtype=torch.float32) * hidden**-0.5
    wide[:, hidden:], made[:, hidden:] = float("nan"), float("nan")
    x, w = wide[:, :hidden], made[:, :hidden]
    logit_bias = randn(spec.experts, dtype=torch.float32) if spec.experts % 3 else None
    bias = randn(spec.experts, dtype=torch.float32) if spec.bias else None
    live = (torch.arange(tokens, device=device()) % 3 != 1).long() * 7
    counts = torch.full((spec.experts,), 5, device=device())
    assert gate.cut_of(x, w, logit_bias, spec) is not None
    ids, weights = hopper.gate(x, w, logit_bias, bias, spec, live, counts)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert (ids[live == 0] == -1).all()
    assert torch.equal(counts.cpu() - 5, torch.bincount(ids[live != 0].flatten().cpu(), minlength=spec.experts))
    theirs, _ = reference_fused.gate(x.double(), w.double(), wider(logit_bias), bias, spec)
    score = scores(x.double() @ w.double().T + (0 if logit_bias is None else logit_bias.double()), spec.scoring)
    choice = score if bias is None else score + bias.double()
    mine = torch.where(live[:, None] != 0, ids, theirs).long()
    assert (mine.sort(1).values.diff(dim=1) > 0).all(), "an expert is chosen twice"
    torch.testing.assert_close(choice.gather(1, mine), choice.gather(1, theirs.long()), rtol=1e-5, atol=1e-7)
    expected = weighted(score.gather(1, mine), spec)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-9)


def weighted(score_TA: Tensor, spec: RouterSpec) -> Tensor:
    """Weights of chosen experts; RouterSpec says how."""
    made = score_TA.softmax(1) if spec.scoring == "softmax_topk" else score_TA
    return (made / made.sum(1, keepdim=True) if spec.renormalize else made) * spec.scale


def wider(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def check_ties_and_nan(spec: RouterSpec) -> None:
    """Of equal experts the lower ones, whatever lane has them; a row with NaN has no weight that is a number, and harms
    no other."""
    x = torch.randint(-2, 3, (5, 128), device=device()).bfloat16()
    w = torch.randint(-1, 2, (spec.experts, 128), device=device()).float()
    w[spec.experts // 2 :] = w[: spec.experts - spec.experts // 2].roll(3, 0)
    x[4] = 0
    bias = torch.zeros(spec.experts, device=device()) if spec.bias else None
    ids, weights = hopper.gate(x, w, None, bias, spec)
    in_choice = None if bias is None else bias.cpu()
    theirs, expected = reference_fused.gate(x.cpu().float(), w.cpu(), None, in_choice, spec)
    assert torch.equal(ids.cpu(), theirs)
    torch.testing.assert_close(weights.cpu(), expected, rtol=1e-5, atol=1e-30)
    x[1, 77] = float("nan")
    again, others = hopper.gate(x, w, None, bias, spec)
    rest = [0, 2, 3, 4]
    assert torch.equal(again[rest], ids[rest])
    assert torch.equal(others[rest], weights[rest])
    assert others[1].isnan().all()
    x[1, 77] = 0
    far, _ = hopper.gate(x * 64, w, None, bias, spec)  # logits of thousands
    known = reference_fused.gate(x.cpu().float() * 64, w.cpu(), None, in_choice, spec)
    if spec.scoring != "sigmoid":  # of which many are one then
        assert torch.equal(far.cpu(), known[0])
        torch.testing.assert_close(hopper.gate(x * 64, w, None, bias, spec)[1].cpu(), known[1], rtol=1e-5, atol=1e-30)
    w[spec.experts // 2, 5], x[1, 77] = float("nan"), 0
    seen, _ = hopper.gate(x, w, None, bias, spec)
    if spec.scoring != "softmax":  # of which nothing is a number then
        assert (seen[:, 0] == spec.experts // 2).all(), "an expert without a score is chosen, and seen in its weight"
    assert ((again >= 0) & (again < spec.experts)).all()
