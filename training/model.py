"""The DeepSeek-V3 architecture in plain PyTorch, written for training.

Shapes: B rows, T tokens a row, D hidden, H heads, E experts, I expert width, V vocabulary.
All experts are computed for all tokens (two large matrix products) and weighted by a gate that is zero for
those not chosen: for sixteen small experts this is faster than gathering, and its gradient is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The fields of config.json that the forward pass needs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    first_k_dense_replace: int
    rms_norm_eps: float
    rope_theta: float

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        return cls(**{f.name: config[f.name] for f in fields(cls)})


def _matrix(*size: int, gain: float = 1.0) -> nn.Parameter:
    """A weight [..., out, in] with standard deviation gain / sqrt(in)."""
    return nn.Parameter(torch.randn(*size) * gain * size[-1] ** -0.5)


class Norm(nn.Module):
    """RMS norm in FP32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def rope_table(shape: Shape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, FP32, [..., rope_dim / 2]."""
    half = shape.qk_rope_head_dim // 2
    inverse = shape.rope_theta ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angle = positions[..., None].float() * inverse
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """DeepSeek's convention: pairs are (even, odd) dimensions; the halves come out concatenated."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1).to(x.dtype)


class Attention(nn.Module):
    """Multi-head latent attention, uncompressed form."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s, heads = s, s.num_attention_heads
        self.q_a_proj = _matrix(s.q_lora_rank, s.hidden_size)
        self.q_a_layernorm = Norm(s.q_lora_rank, 1e-6)
        self.q_b_proj = _matrix(heads * (s.qk_nope_head_dim + s.qk_rope_head_dim), s.q_lora_rank)
        self.kv_a_proj_with_mqa = _matrix(s.kv_lora_rank + s.qk_rope_head_dim, s.hidden_size)
        self.kv_a_layernorm = Norm(s.kv_lora_rank, 1e-6)
        self.kv_b_proj = _matrix(heads * (s.qk_nope_head_dim + s.v_head_dim), s.kv_lora_rank)
        self.o_proj = _matrix(s.hidden_size, heads * s.v_head_dim, gain=0.3)

    def qkv(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys [B, H, T, nope + rope] and values [B, H, T, v]."""
        s, (batch, length, _) = self.s, x_BTD.shape
        heads, nope = s.num_attention_heads, s.qk_nope_head_dim
        cos, sin = rope
        q = F.linear(self.q_a_layernorm(F.linear(x_BTD, self.q_a_proj)), self.q_b_proj)
        q = q.view(batch, length, heads, -1).transpose(1, 2)
        q = torch.cat([q[..., :nope], rotate(q[..., nope:], cos, sin)], -1)
        latent, k_rope = F.linear(x_BTD, self.kv_a_proj_with_mqa).split([s.kv_lora_rank, s.qk_rope_head_dim], -1)
        kv = F.linear(self.kv_a_layernorm(latent), self.kv_b_proj).view(batch, length, heads, -1).transpose(1, 2)
        k_rope = rotate(k_rope[:, None], cos, sin).expand(-1, heads, -1, -1)
        return q, torch.cat([kv[..., :nope], k_rope], -1), kv[..., nope:]

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], attend: Any) -> Tensor:
        batch, length, _ = x_BTD.shape
        y = attend(self, *self.qkv(x_BTD, rope))
        return F.linear(y.transpose(1, 2).reshape(batch, length, -1), self.o_proj)


class DenseMLP(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = _matrix(width, hidden), _matrix(width, hidden)
        self.down_proj = _matrix(hidden, width, gain=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.gate_proj)) * F.linear(x, self.up_proj), self.down_proj)


class MoE(nn.Module):
    """Sigmoid routing with correction bias and groups; `load` counts are returned, the bias is set from outside."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.router = _matrix(s.n_routed_experts, s.hidden_size)
        self.register_buffer("bias", torch.zeros(s.n_routed_experts))
        self.gate_up = _matrix(s.n_routed_experts, 2, s.moe_intermediate_size, s.hidden_size)
        self.down = _matrix(s.n_routed_experts, s.hidden_size, s.moe_intermediate_size, gain=0.3)
        self.shared = DenseMLP(s.hidden_size, s.moe_intermediate_size)

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Gate [N, E] (FP32, zero where not chosen, scaling factor included) and the chosen mask [N, E]."""
        s = self.s
        with torch.autocast(x_ND.device.type, enabled=False):
            score = F.linear(x_ND.float(), self.router.float()).sigmoid()
        choice = score.detach() + self.bias
        group = choice.view(-1, s.n_group, s.n_routed_experts // s.n_group)
        group_score = group.topk(2, -1)[0].sum(-1)
        allowed = torch.zeros_like(group_score).scatter(1, group_score.topk(s.topk_group, -1)[1], 1.0)
        choice = group.masked_fill(allowed[..., None] == 0, float("-inf")).flatten(1)
        chosen = torch.zeros_like(choice).scatter(1, choice.topk(s.num_experts_per_tok, -1)[1], 1.0)
        weight = score * chosen
        return weight / (weight.sum(-1, keepdim=True) + 1e-20) * s.routed_scaling_factor, chosen

    def forward(self, x_BTD: Tensor, real_N: Tensor) -> tuple[Tensor, Tensor]:
        """Output and the load [E] over the rows where real_N is 1."""
        x_ND = x_BTD.flatten(0, 1)
        gate, chosen = self.route(x_ND)
        experts, _, width, hidden = self.gate_up.shape
        if not torch.is_grad_enabled() and not x_ND.is_cuda:
            y = self._chosen_only(x_ND, gate)
            return (y + self.shared(x_ND)).view_as(x_BTD), (chosen * real_N[:, None]).sum(0)
        h = F.linear(x_ND, self.gate_up.view(-1, hidden)).view(-1, experts, 2, width)
        h = F.silu(h[:, :, 0]) * h[:, :, 1] * gate[..., None].to(h.dtype)
        y = F.linear(h.flatten(1), self.down.permute(1, 0, 2).reshape(hidden, -1))
        load = (chosen * real_N[:, None]).sum(0)
        return (y + self.shared(x_ND)).view_as(x_BTD), load

    def _chosen_only(self, x_ND: Tensor, gate_NE: Tensor) -> Tensor:
        """The routed sum, one expert after another on its own tokens: four times less work where memory is slow."""
        y = torch.zeros_like(x_ND)
        for e in range(gate_NE.shape[1]):
            (rows,) = gate_NE[:, e].nonzero(as_tuple=True)
            x = x_ND[rows]
            h = F.silu(F.linear(x, self.gate_up[e, 0])) * F.linear(x, self.gate_up[e, 1])
            y.index_add_(0, rows, F.linear(h, self.down[e]) * gate_NE[rows, e, None].to(x.dtype))
        return y


class Block(nn.Module):
    def __init__(self, s: Shape, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = Norm(s.hidden_size, s.rms_norm_eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = Norm(s.hidden_size, s.rms_norm_eps)
        self.mlp = DenseMLP(s.hidden_size, s.intermediate_size) if dense else MoE(s)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Any, real_N: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        h = self.post_attention_layernorm(x)
        if isinstance(self.mlp, DenseMLP):
            return x + self.mlp(h), None
        y, load = self.mlp(h, real_N)
        return x + y, load


class Mtp(nn.Module):
    """One multi-token-prediction layer: from the normalised h_t and the embedding of token t+1, predict token t+2."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.enorm, self.hnorm = Norm(s.hidden_size, s.rms_norm_eps), Norm(s.hidden_size, s.rms_norm_eps)
        self.eh_proj = _matrix(s.hidden_size, 2 * s.hidden_size)
        self.block = Block(s, dense=False)
        self.norm = Norm(s.hidden_size, s.rms_norm_eps)

    def forward(
        self, e: Tensor, h: Tensor, rope: tuple[Tensor, Tensor], attend: Any, real_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = F.linear(torch.cat([self.enorm(e), self.hnorm(h)], -1), self.eh_proj)
        x, load = self.block(x, rope, attend, real_N)
        assert load is not None
        return self.norm(x), load


class Tiny(nn.Module):
    """The whole model. `attend(attention, q, k, v)` decides masking and caching."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.embed_tokens = nn.Parameter(torch.randn(s.vocab_size, s.hidden_size))
        self.layers = nn.ModuleList(Block(s, i < s.first_k_dense_replace) for i in range(s.num_hidden_layers))
        self.norm = Norm(s.hidden_size, s.rms_norm_eps)
        self.lm_head = _matrix(s.vocab_size, s.hidden_size, gain=0.3)
        self.mtp = Mtp(s)

    def trunk(
        self, tokens: Tensor, rope: tuple[Tensor, Tensor], attend: Any, real_N: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden states after the final norm, and one load per mixture layer."""
        x, loads = F.embedding(tokens, self.embed_tokens), []
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for layer in self.layers:
            x, load = layer(x, rope, attend, real_N)
            if load is not None:
                loads.append(load)
        return self.norm(x), loads

    def draft(
        self, following: Tensor, h: Tensor, rope: tuple[Tensor, Tensor], attend: Any, real_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """MTP hidden states; `following[t]` is token t+1."""
        return self.mtp(F.embedding(following, self.embed_tokens).to(h.dtype), h, rope, attend, real_N)

    def logits(self, h: Tensor) -> Tensor:
        return F.linear(h, self.lm_head)


def packed_losses(model: Tiny, batch: Tensor, attend: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(next-token loss, MTP loss, next-token accuracy, loads [moe layers, E]) on one packed batch [3, B, T]."""
    tokens, docs, learn = batch[0].long(), batch[1], batch[2].float()
    rope = rope_table(model.s, torch.arange(tokens.shape[1], device=tokens.device))
    real_N = (docs > 0).flatten().float()
    h, loads = model.trunk(tokens, rope, attend, real_N)
    following = tokens.roll(-1, 1)
    h2, load = model.draft(following, h, rope, attend, real_N)
    out = []
    for ahead, hidden in ((1, h), (2, h2)):
        target = tokens.roll(-ahead, 1)
        keep = learn.roll(-ahead, 1) * (docs == docs.roll(-ahead, 1))
        keep[:, -ahead:] = 0
        logits = model.logits(hidden).float()
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none") * keep.flatten()
        out.append(loss.sum() / keep.sum())
        if ahead == 1:
            right = ((logits.argmax(-1) == target) * keep).sum() / keep.sum()
    return out[0], out[1], right.detach(), torch.stack([*loads, load]).detach()
