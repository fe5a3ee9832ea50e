"""Multi-token-prediction layers: loaded wherever they stand, and computing what `transformers` computes.

The oracle is its `MtpModel`, given the hidden states of its own main model. Rope is relative, so the two sides may
number positions differently, as they do: it counts from the token that a draft reads, we from the state.
Letters: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from moesaic.contracts.plan import Wishes
from moesaic.errors import CheckpointError
from moesaic.hardware import local_cpu
from moesaic.kernels.ops import AttentionBatch, Span
from moesaic.layers.kv_pool import KVPool
from moesaic.layers.step import StepInput
from moesaic.models.build import build, plan_here, spec_of
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.decoder import Decoder
from moesaic.models.loading import Slot
from moesaic.models.weights import slots_of
from tests.checkpoints import random_drafts, random_model, save, write_index
from tests.compare import assert_rows_close

LENGTH, BLOCK = 41, 8
FP32 = 1e-4


@dataclass
class Pair:
    model: PreTrainedModel
    drafts: MtpModel
    path: Path


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    def make(count: int, kind: str = "deepseek_v3", **config: object) -> Pair:
        low_rank = {"q_lora_rank": 24} if kind == "deepseek_v3" else {}
        model = random_model(kind, num_nextn_predict_layers=count, **low_rank, **config)
        drafts = random_drafts(model, count)
        return Pair(model, drafts, save(model, tmp_path_factory.mktemp("drafts"), drafts=drafts))

    return make


def load(path: Path, dtype: str = "float32", *, deterministic: bool = False) -> Decoder:
    with Checkpoint.open(path) as checkpoint:
        spec = spec_of(checkpoint.config)
        plan = plan_here(spec, local_cpu(), dtype, Wishes(deterministic=deterministic))
        return build(checkpoint, spec, plan, 128).model


@torch.inference_mode()
def wanted(pair: Pair, ids: list[int]) -> list[Tensor]:
    """The oracle's logits [T, V] of each draft layer, each reading the state of the one before."""
    hidden = pair.model.model(torch.tensor([ids]), use_cache=False).last_hidden_state
    found = []
    for i in range(len(pair.drafts.layers)):
        hidden = hidden[:, :-1]  # the state before each token that this layer reads
        tokens, positions = torch.tensor([ids[i + 1 :]]), torch.arange(i + 1, len(ids))[None]
        hidden = pair.drafts.forward_layer(i, hidden, positions, fresh_cache(pair), input_ids=tokens)
        found.append(pair.model.lm_head(hidden)[0])
    return found


def fresh_cache(pair: Pair) -> MtpCache:
    return MtpCache(config=pair.model.config.get_mtp_config())


class Ours:
    """Drives a decoder and its drafts over one sequence, whose blocks lie scattered over the pool."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        like = model.embed.weight_VD[:0, 0]
        self.pool = KVPool(model.kv_widths(drafts=True), 17, BLOCK, like)
        self.slots_L = (torch.randperm(16)[:, None] * BLOCK + torch.arange(BLOCK)).flatten() + BLOCK

    def step(self, ids: list[int], start: int, stop: int) -> StepInput:
        """Positions start .. stop, with `ids` at them."""
        span = Span(0, stop - start, stop)
        batch = AttentionBatch.of((span,), int(stop - start == 1), self.slots_L[None, :stop])
        return StepInput(torch.tensor(ids), torch.arange(start, stop), self.slots_L[start:stop], batch, self.pool)

    @torch.inference_mode()
    def run(self, ids: list[int], cuts: list[int]) -> list[Tensor]:
        """Logits of each draft layer, main model and drafts advancing together in steps that end at the cuts."""
        found: list[list[Tensor]] = [[] for _ in self.model.drafts]
        start = 0
        for stop in cuts:
            hidden_TD = self.model(self.step(ids[start:stop], start, stop))
            for i in range(len(found)):
                tokens = (ids + [0] * len(found))[start + i + 1 : stop + i + 1]
                hidden_TD = self.model.draft(i, self.step(tokens, start, stop), hidden_TD)
                found[i].append(self.model.logits(hidden_TD))
            start = stop
        return [torch.cat(parts)[: len(ids) - 1 - i] for i, parts in enumerate(found)]


CUTS = {"at once": [LENGTH], "chunks": [7, 8, 29, LENGTH], "one by one": [9, *range(10, LENGTH + 1)]}
MODELS = {
    "one layer": {"count": 1},
    "two layers, behind a dense one": {"count": 2, "num_hidden_layers": 2, "first_k_dense_replace": 1},
    "behind dense layers only": {
        "count": 1, "num_hidden_layers": 1, "first_k_dense_replace": 1, "rope_interleave": False},
    "five layers, groups, biases": {
        "count": 1, "num_hidden_layers": 5, "n_routed_experts": 16, "n_group": 4, "topk_group": 2,
        "attention_bias": True},
    "glm": {"kind": "glm4_moe", "count": 1, "use_qk_norm": True, "attention_bias": True},
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS.values(), ids=list(MODELS))
def pair(request: pytest.FixtureRequest, make: Callable[..., Pair]) -> Pair:
    return make(**request.param)


def random_ids(pair: Pair) -> list[int]:
    return torch.randint(pair.model.config.vocab_size, (LENGTH,)).tolist()


@pytest.mark.parametrize("cuts", CUTS.values(), ids=list(CUTS))
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
def test_fp32_drafts_equal_transformers(pair: Pair, cuts: list[int], deterministic: bool) -> None:
    ids = random_ids(pair)
    ours = Ours(load(pair.path, deterministic=deterministic)).run(ids, cuts)
    assert len(ours) == len(pair.drafts.layers)
    for i, (logits_TV, expected_TV) in enumerate(zip(ours, wanted(pair, ids), strict=True)):
        assert_rows_close(logits_TV, expected_TV, FP32, f"draft {i}")


def test_the_main_models_logits_do_not_see_the_drafts(pair: Pair) -> None:
    ids = random_ids(pair)
    ours = Ours(load(pair.path))
    with torch.inference_mode():
        logits_TV = ours.model.logits(ours.model(ours.step(ids, 0, LENGTH)))
        expected_TV = pair.model(torch.tensor([ids]), use_cache=False).logits[0]
    assert_rows_close(logits_TV, expected_TV, FP32)


def test_each_weight_of_a_draft_is_loaded(make: Callable[..., Pair]) -> None:
    """Bit by bit, every tensor that the model names holds what the file holds, and nothing of the file is left out but
    the copies of embedding and head."""
    pair = make(2)
    stored: dict[str, Tensor] = {}
    for file in pair.path.glob("*.safetensors"):
        stored |= load_file(file)
    named = {s.name: s.dest for s in slots_of(load(pair.path).sources(), None) if isinstance(s, Slot)}
    assert all(torch.equal(view, stored[name]) for name, view in named.items())
    left = {name for name in stored if name not in named}
    assert left == {f"model.layers.{i}.{copy}.weight" for i in (3, 4) for copy in ("embed_tokens", "shared_head.head")}


def test_announced_but_absent_drafts_are_dropped(make: Callable[..., Pair]) -> None:
    pair = make(1)
    (pair.path / "drafts.safetensors").unlink()
    write_index(pair.path)
    assert json.loads((pair.path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert load(pair.path).drafts == []


LOST = ("eh_proj.weight", "hnorm.weight", "self_attn.o_proj.weight", "mlp.experts.5.up_proj.weight")


@pytest.mark.parametrize("lost", LOST)
def test_a_draft_that_lacks_a_tensor_is_an_error(make: Callable[..., Pair], lost: str) -> None:
    pair = make(1)
    file = pair.path / "drafts.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.3.{lost}"]
    save_file(tensors, file)
    write_index(pair.path)
    with pytest.raises(CheckpointError, match=lost):
        load(pair.path)


def test_drafts_that_the_config_does_not_announce_are_an_error(make: Callable[..., Pair]) -> None:
    """Not dropped in silence: a literal layer number is how other loaders lose them."""
    pair = make(1)
    file = pair.path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_nextn_predict_layers": 0}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.3"):
        load(pair.path)
