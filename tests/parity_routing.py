"""How near a token is to being sent to other experts, as the oracle sees it.

The choice of experts is a step function: an arithmetic that rounds differently may legitimately choose otherwise where
two experts (or groups) nearly tie, and that row then differs by far more than a rounding. Only such rows may be left
out of a BF16 comparison; how near they are is computed here, from the FP32 oracle alone.

Let the gate's input x have error of relative size d in a random direction. Then the logit of expert e has an error of
standard deviation d * rms(x) * |w_e|, and its selection score one of  n_e * d,  n_e = slope_e * rms(x) * |w_e|,  where
slope_e is the derivative of the score. The **margin** of a row is the smallest d at which some chosen expert i and
unchosen j meet:  min (c_i - c_j) / (n_i + n_j),  the same for groups, and the smallest over the layers. It is a relative
error, so it can be held against BF16's: 2^-9 for each rounding.

Letters: R rows, E experts, A experts per token, G groups, X experts per group, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@contextmanager
def margins(model: PreTrainedModel) -> Iterator[Callable[[int], list[Tensor]]]:
    """Watches the gates of an oracle. The value, called with the number of forward passes, gives per pass [R]."""
    seen: list[Tensor] = []
    gates = [module for name, module in model.named_modules() if name.endswith(".gate")]
    handles = [gate.register_forward_hook(lambda g, i, _: seen.append(gate_margins(g, i[0], model.config))) for gate in gates]

    def found(passes: int) -> list[Tensor]:
        assert len(seen) == passes * len(gates), "a gate was not seen"
        return [torch.stack(seen[i * len(gates) : (i + 1) * len(gates)]).amin(0) for i in range(passes)]

    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def gate_margins(gate: torch.nn.Module, x: Tensor, config: Any) -> Tensor:
    """The margins [R] of one gate, in FP64, without using what the gate answered."""
    weight_ED: Tensor = gate.weight.double()  # type: ignore[union-attr, operator]
    x_RD = x.reshape(-1, weight_ED.shape[1]).double()
    logits_RE = x_RD @ weight_ED.T
    noise_RE = x_RD.square().mean(-1, keepdim=True).sqrt() * weight_ED.norm(dim=-1)
    choice_RE = logits_RE  # softmax keeps the order, of experts and of groups by their maximum
    bias_E = getattr(gate, "e_score_correction_bias", None)
    if bias_E is not None:
        score_RE = torch.sigmoid(logits_RE)
        choice_RE, noise_RE = score_RE + bias_E.double(), noise_RE * score_RE * (1 - score_RE)
    groups = config.n_group or 1 if bias_E is not None or getattr(config, "topk_method", "") == "group_limited_greedy" else 1
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
    """(smallest gap in units of noise between one of the `count` largest and one of the others [R], mask of the largest)."""
    chosen_RN = torch.zeros_like(value_RN, dtype=torch.bool).scatter_(1, value_RN.topk(count, -1).indices, True)
    gap_RNN = (value_RN[:, :, None] - value_RN[:, None]) / (noise_RN[:, :, None] + noise_RN[:, None])
    pairs_RNN = chosen_RN[:, :, None] & ~chosen_RN[:, None]
    return gap_RNN.masked_fill(~pairs_RNN, torch.inf).flatten(1).amin(1), chosen_RN
