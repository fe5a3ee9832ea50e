"""How near a token is to being sent to other experts, as the oracle sees it.

The choice of experts is a step function: an arithmetic that rounds differently may legitimately choose otherwise where
two experts (or groups) nearly tie, and that row then differs by far more than a rounding. Only such rows may be left
out of a BF16 comparison; how near they are is computed here, from the FP32 oracle alone.

Let the gate's input x have error of relative size d in a random direction. Then the logit of expert e has an error of
standard deviation d * rms(x) * |w_e|, and its selection score one of  n_e * d,  n_e = slope_e * rms(x) * |w_e|,  where
slope_e is the derivative of the score. The **margin** of a row in a layer is the smallest d at which a chosen expert i
and an unchosen j meet,  min (c_i - c_j) / (n_i + n_j),  and the same for groups. It is a relative error, so it can be
held against that which BF16 is granted.

Letters: R rows, E experts, A experts per token, G groups, X experts per group, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.contracts.spec import RouterSpec
from moesaic.kernels.ops import Ops
from moesaic.moe.layer import MoELayer
from moesaic.moe.values import Routing


@dataclass(frozen=True)
class Choices:
    """What the mixture layers of the oracle chose for the rows of one text.

    ids: per layer the experts [R, A], in any order.  margins_MR: per layer and row, as defined above.
    """

    ids: list[Tensor]
    margins_MR: Tensor


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[Callable[[], list[Choices]]]:
    """Watches the gates of an oracle. The value, when called, gives one `Choices` per forward pass since."""
    gates = [module for name, module in model.named_modules() if name.endswith((".gate", ".mlp.router"))]
    ids: list[Tensor] = []
    found: list[Tensor] = []

    def note(gate: torch.nn.Module, inputs: tuple[Tensor], outputs: tuple[Tensor, ...]) -> None:
        found.append(gate_margins(gate, inputs[0], model.config))
        ids.append(outputs[2])

    handles = [gate.register_forward_hook(note) for gate in gates]
    try:
        starts = lambda: range(0, len(found), len(gates))  # noqa: E731
        yield lambda: [Choices(ids[i : i + len(gates)], torch.stack(found[i : i + len(gates)])) for i in starts()]
    finally:
        for handle in handles:
            handle.remove()


class Gates:
    """Stands before the gates of our mixture layers while it is entered, and notes where they choose otherwise.

    at: set before each forward pass: for each row (text, position).  other: (text, layer, position) of every row whose
    own choice was not the oracle's.  force: the experts then take the oracle's choice, with the weights that our state
    gives it; where the choice is the same, the layer's own answer is passed on untouched.
    """

    def __init__(self, layers: Sequence[MoELayer], choices: Sequence[Choices], force: bool) -> None:
        self.layers, self.choices, self.force = layers, choices, force
        self.at: list[tuple[int, int]] = []
        self.other: list[tuple[int, int, int]] = []

    def __enter__(self) -> Gates:
        self.own = [layer.route for layer in self.layers]
        for i, layer in enumerate(self.layers):
            layer.route = partial(self.route, i)  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        for layer, own in zip(self.layers, self.own, strict=True):
            layer.route = own

    def route(self, index: int, x_TD: Tensor, ops: Ops, live_T: Tensor | None = None,
              counts_E: Tensor | None = None) -> Routing:  # fmt: skip
        router = self.own[index]
        routing = router(x_TD, ops, live_T, counts_E)
        wanted_TA = torch.stack([self.choices[text].ids[index][position] for text, position in self.at])
        turned_T = (routing.ids_TA.long().sort(-1).values != wanted_TA.sort(-1).values).any(-1)
        rows = turned_T.nonzero()[:, 0].tolist()
        self.other += [(self.at[row][0], index, self.at[row][1]) for row in rows]
        if not rows or not self.force:
            return routing
        ids_TA, weights_TA = routing.ids_TA.clone(), routing.weights_TA.clone()
        ids_TA[rows] = wanted_TA[rows].to(ids_TA.dtype)
        weights_TA[rows] = weights(router.logits(x_TD[rows], ops), wanted_TA[rows], router.spec)
        return Routing(ids_TA, weights_TA)


def weights(logits_RE: Tensor, ids_RA: Tensor, spec: RouterSpec) -> Tensor:
    """The weights that given experts would have had."""
    if spec.scoring == "softmax_topk":
        return spec.scale * logits_RE.gather(1, ids_RA).softmax(-1)
    scores_RE = logits_RE.softmax(-1) if spec.scoring == "softmax" else logits_RE.sigmoid()
    chosen_RA = scores_RE.gather(1, ids_RA)
    return spec.scale * (chosen_RA / chosen_RA.sum(-1, keepdim=True) if spec.renormalize else chosen_RA)


def gate_margins(gate: torch.nn.Module, x: Tensor, config: Any) -> Tensor:
    """The margins [R] of one gate, in FP64, without using what the gate answered."""
    assert isinstance(gate.weight, Tensor)
    weight_ED = gate.weight.double()
    x_RD = x.reshape(-1, weight_ED.shape[1]).double()
    logits_RE = x_RD @ weight_ED.T
    if isinstance(own_bias_E := getattr(gate, "bias", None), Tensor):
        logits_RE = logits_RE + own_bias_E.double()
    noise_RE = x_RD.square().mean(-1, keepdim=True).sqrt() * weight_ED.norm(dim=-1)
    choice_RE = logits_RE  # softmax keeps the order, of experts and of groups by their maximum
    bias_E = getattr(gate, "e_score_correction_bias", None)
    if bias_E is not None:
        score_RE = torch.sigmoid(logits_RE)
        choice_RE, noise_RE = score_RE + bias_E.double(), noise_RE * score_RE * (1 - score_RE)
    grouped = bias_E is not None or getattr(config, "topk_method", "") == "group_limited_greedy"
    groups = config.n_group if grouped else 1
    margin_R = torch.full(x_RD.shape[:1], torch.inf, dtype=torch.float64)
    if groups > 1:
        best = 1 if bias_E is None else 2
        top = choice_RE.unflatten(1, (groups, -1)).topk(best, -1)
        noise_RG = noise_RE.unflatten(1, (groups, -1)).gather(2, top.indices).sum(-1)
        value_RG = top.values.sum(-1)
        margin_R, kept_RG = nearest(value_RG, noise_RG, config.topk_group)
        outside_RE = ~kept_RG.repeat_interleave(choice_RE.shape[1] // groups, 1)
        choice_RE = choice_RE.masked_fill(outside_RE, -torch.inf)
    return torch.minimum(margin_R, nearest(choice_RE, noise_RE, config.num_experts_per_tok)[0])


def nearest(value_RN: Tensor, noise_RN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(smallest gap, in units of noise, between one of the `count` largest and one of the others [R]; mask of them)."""
    chosen_RN = torch.zeros_like(value_RN, dtype=torch.bool).scatter_(1, value_RN.topk(count, -1).indices, True)
    gap_RNN = (value_RN[:, :, None] - value_RN[:, None]) / (noise_RN[:, :, None] + noise_RN[:, None])
    pairs_RNN = chosen_RN[:, :, None] & ~chosen_RN[:, None]
    return gap_RNN.masked_fill(~pairs_RNN, torch.inf).flatten(1).amin(1), chosen_RN
