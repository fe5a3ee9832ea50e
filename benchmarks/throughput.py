"""How fast does the engine decode and read prompts on a GPU, with random weights of a real architecture?

    python benchmarks/throughput.py [--model qwen3-30b-a3b] [--scheme fp8] [--batch 1 4 16 64 256] [--context 1024]

The whole engine: scheduler, graphs, sampler (greedy), and the host's work between steps. Per batch: the median wall
time of a decoding step; its GPU time (the captured graph alone); floor = bytes of the touched weights and contexts /
read bandwidth. Experts touched are counted as for uniformly random routing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import gpu
from benchmarks.machine import save
from moesaic.contracts.plan import Wishes
from moesaic.contracts.scheme import SCHEMES
from moesaic.contracts.spec import ModelSpec, MoESpec
from moesaic.engine.blocks import BlockManager
from moesaic.engine.engine import Engine
from moesaic.engine.graphs import DecodeGraphs
from moesaic.engine.params import SamplingParams
from moesaic.engine.runner import Runner
from moesaic.engine.scheduler import Scheduler, SchedulerConfig
from moesaic.hardware import local_gpu
from moesaic.kernels.registry import Kernels
from moesaic.layers.kv_pool import KVPool
from moesaic.layers.linear import Stored
from moesaic.models.build import plan_here, spec_of
from moesaic.models.decoder import Decoder
from moesaic.models.dummy import fill_model
from moesaic.models.hold import hold

QWEN = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "intermediate_size": 6144, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "max_position_embeddings": 40960, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "attention_bias": False,
}  # fmt: skip
LITE = {
    "model_type": "deepseek_v2", "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 102400, "intermediate_size": 10944,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "max_position_embeddings": 163840, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "moe_layer_freq": 1, "attention_bias": False,
}  # fmt: skip
MODELS = {"qwen3-30b-a3b": QWEN, "v2-lite": LITE}
STEPS = 24


def make(config: dict[str, Any], scheme: str, most: int, length: int) -> tuple[Engine, ModelSpec]:
    spec, hardware = spec_of(config), local_gpu()
    assert hardware is not None, "needs a GPU"
    if scheme != "bf16":
        spec = hold(spec, SCHEMES[scheme])
    plan = plan_here(spec, hardware, "bfloat16", Wishes(max_batch=most))
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    model = fill_model(Decoder(spec, Kernels(plan), like, length))
    blocks = most * -(-length // 16) + 1
    pool = KVPool(model.kv_widths(), blocks, 16, like)
    runner = Runner(model, pool, like.device, graphs=DecodeGraphs(model, pool, most, length))
    limits = SchedulerConfig(max_num_seqs=most, max_num_batched_tokens=8192, max_model_len=length, chunk_size=None)
    return Engine(Scheduler(limits, BlockManager(blocks, 16, False)), runner, None, frozenset()), spec


def floor_bytes(engine: Engine, spec: ModelSpec, batch: int, context: int) -> float:
    """Bytes that one decoding step must read."""
    total = 0.0
    for item in engine.runner.model.sources():
        weight = item.weight if isinstance(item, Stored) else item[1]
        name = item.name if isinstance(item, Stored) else item[0]
        if spec.embed not in name or spec.tied:
            total += weight.nbytes * touched(spec, name, batch)
    return total + sum(pool.shape[1] * 2 for pool in engine.runner.pool.layers) * batch * context


def touched(spec: ModelSpec, name: str, batch: int) -> float:
    """The part of experts that a batch touches; 1 for everything else."""
    router = next(layer.mlp.router for layer in spec.layers if isinstance(layer.mlp, MoESpec))
    return 1 - (1 - router.top_k / router.experts) ** batch if ".experts." in name else 1.0


def decode(engine: Engine, spec: ModelSpec, batch: int, context: int) -> dict[str, Any]:
    params = SamplingParams(temperature=0, max_tokens=STEPS + 8, ignore_eos=True)
    began = time.perf_counter()
    for i in range(batch):
        engine.add(f"{batch}-{i}", torch.randint(0, spec.vocab, (context,)).tolist(), params)
    while any(state.request.num_output == 0 for state in engine.states.values()):
        engine.step()
    torch.cuda.synchronize()
    prompts = time.perf_counter() - began
    walls, graphs = [], engine.runner.graphs
    while engine.has_work:
        began = time.perf_counter()
        engine.step()
        walls.append(time.perf_counter() - began)
    assert graphs is not None
    graph = graphs.captured[min(size for size in graphs.captured if size >= batch)].graph
    wall, busy = statistics.median(walls[2:-1]) * 1e3, gpu.time_replays(graph)
    floor = floor_bytes(engine, spec, batch, context) / gpu.READ * 1e3
    return {"batch": batch, "context": context, "step_ms": wall, "graph_ms": busy, "floor_ms": floor,
            "tokens_per_s": batch / wall * 1e3, "prompt_tokens_per_s": batch * context / prompts}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b", choices=sorted(MODELS))
    parser.add_argument("--scheme", default="fp8", choices=sorted(SCHEMES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    engine, spec = make(MODELS[args.model], args.scheme, max(args.batch), args.context + STEPS + 16)
    decode(engine, spec, 1, 64)  # compiles what prompts need
    rows = []
    print("| batch | step ms | graph ms | floor ms | step / floor | not in graph | tokens/s | prompt tokens/s |")
    print("|---|---|---|---|---|---|---|---|")
    for batch in args.batch:
        row = decode(engine, spec, batch, args.context)
        rows.append(row)
        print(f"| {batch} | {row['step_ms']:.3f} | {row['graph_ms']:.3f} | {row['floor_ms']:.3f} | "
              f"{row['step_ms'] / row['floor_ms']:.2f} | {1 - row['graph_ms'] / row['step_ms']:.0%} | "
              f"{row['tokens_per_s']:.0f} | {row['prompt_tokens_per_s']:.0f} |", flush=True)  # fmt: skip
    facts = {"what": "throughput", "model": args.model, "scheme": args.scheme, **gpu.describe(), "rows": rows}
    save(f"throughput-{args.model}-{args.scheme}-{gpu.device_slug()}", facts)


if __name__ == "__main__":
    main()
