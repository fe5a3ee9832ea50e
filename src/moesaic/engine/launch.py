"""From options to a running engine: what memory allows, what the checkpoint says, what is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moesaic.config import EngineConfig
from moesaic.contracts.plan import Wishes
from moesaic.contracts.spec import ModelSpec
from moesaic.engine.blocks import BlockManager
from moesaic.engine.engine import Engine
from moesaic.engine.feed import Feed
from moesaic.engine.graphs import DecodeGraphs, prompt_rows, prompt_sizes, sizes
from moesaic.engine.runner import Runner
from moesaic.engine.scheduler import Scheduler, SchedulerConfig
from moesaic.engine.tapes import DecodeTapes
from moesaic.errors import CapacityError, OptionError
from moesaic.formats.dialects.modules import linears
from moesaic.hardware import Hardware, local, local_cpu
from moesaic.layers.kv_pool import KVPool, block_bytes
from moesaic.models.build import Built, build, choose_dtype, plan_here, stored_spec
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.hold import hold_online
from moesaic.models.wishes import wish_of
from moesaic.text.tokenizer import Tokenizer

CHUNK = 256
"""Fixed prefill chunk of the deterministic mode, in tokens."""
DEFAULT_CPU_POOL = 1 << 30
"""On a CPU the pool shares memory with everything else: bytes it takes at most unless told otherwise."""

DEFAULT_GPU_PART = 0.85
"""On a GPU the pool takes what is free, up to this part of all; the rest is for activations, graphs and compilers."""


@dataclass(frozen=True)
class Launched:
    """An engine and what was decided for it, to be shown to whoever asks."""

    engine: Engine
    built: Built
    hardware: Hardware
    blocks: int
    max_model_len: int

    def summary(self) -> str:
        spec, report = self.built.model.spec, self.built.report
        dtype = str(self.built.dtype).removeprefix("torch.")
        pool = self.engine.runner.pool
        held = ", ".join(dict.fromkeys(part.runs.name for part, _ in linears(spec) if part.runs.quantized))
        weights = f"{dtype}, projections in {held}," if held else dtype
        return (
            f"{spec.architecture}, {len(spec.layers)} layers + {len(spec.drafts)} draft, "
            f"{report.bytes / 2**20:.1f} MiB read in {report.seconds:.2f} s; "
            f"{weights} on {self.hardware.name}; KV pool {pool.nbytes / 2**20:.0f} MiB = "
            f"{self.blocks * pool.block_size} tokens; longest request {self.max_model_len}"
        )


def launch(checkpoint: Checkpoint, config: EngineConfig, tokenizer: Tokenizer | None) -> Launched:
    """Builds the engine of an open checkpoint. Raises the typed errors of every stage."""
    spec, hardware = hold_online(stored_spec(checkpoint)[0], config.quantization), hardware_of(config.device)
    dtype = choose_dtype(config.dtype, spec, hardware)
    length = min(config.max_model_len or spec.max_length, spec.max_length)
    if config.max_model_len and config.max_model_len > spec.max_length:
        raise OptionError(
            f"{config.max_model_len} tokens exceed the model's {spec.max_length}",
            where="--max-model-len", remedy=f"Use {spec.max_length} or less.",
        )  # fmt: skip
    plan = plan_here(spec, hardware, dtype, wishes_of(config))
    built = build(checkpoint, spec, plan, length, progress=config.progress)
    blocks = count_blocks(config, built, hardware, length)
    if config.max_model_len is None:
        length = min(length, (blocks - 1) * config.block_size)
    like = torch.empty(0, dtype=built.dtype, device=hardware.device)
    pool = built.model.pool(blocks, config.block_size)
    feed = Feed(config.max_num_seqs, like.device)
    graphs = decoding_of(config, built, pool, feed, length)
    runner = Runner(built.model, pool, feed, not config.deterministic, graphs)
    scheduler = Scheduler(limits(config, length), BlockManager(blocks, config.block_size, config.prefix_cache))
    ends = end_tokens(checkpoint, spec, tokenizer)
    overlap = hardware.device != "cpu"  # where the processor that schedules is not the one that computes
    engine = Engine(scheduler, runner, tokenizer, ends, config.seed, config.deterministic, overlap)
    return Launched(engine, built, hardware, blocks, length)


def wishes_of(config: EngineConfig) -> Wishes:
    router, attention = (None if each == "auto" else each for each in (config.router_dtype, config.attention))
    return Wishes(experts=wish_of(config.experts, "--experts"), router_dtype=router, attention=attention,
                  graphs=config.graphs, kv=config.kv, deterministic=config.deterministic,
                  max_batch=config.max_num_seqs)  # fmt: skip


def hardware_of(device: str) -> Hardware:
    """Raises OptionError for a GPU that is not here."""
    found = local(device)
    if found is None:
        raise OptionError("torch finds no CUDA device", where="--device", remedy="Use cpu, or check the driver.")
    return found


def decoding_of(config: EngineConfig, built: Built, pool: KVPool, feed: Feed,
                length: int) -> DecodeGraphs | DecodeTapes | None:  # fmt: skip
    """What runs the steps that decode, where the kernels can be recorded."""
    most = config.max_num_seqs
    of = (built.model, pool, feed, most, length)
    if built.plan.base.capturable:
        tokens = config.max_num_batched_tokens
        rows = prompt_rows(built.model.spec, built.plan, config.block_size, length, tokens)
        return DecodeGraphs(*of, sizes(most) + prompt_sizes(most, rows), config.progress)
    return DecodeTapes(*of) if built.model.kernels.taped else None


def limits(config: EngineConfig, length: int) -> SchedulerConfig:
    chunk = min(CHUNK, config.max_num_batched_tokens) if config.deterministic else None
    return SchedulerConfig(
        max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=length, chunk_size=chunk,
    )  # fmt: skip


def count_blocks(config: EngineConfig, built: Built, hardware: Hardware, length: int) -> int:
    """How many blocks the pool gets; one is reserved as the target of padding.

    Never more than all running requests at full length need. Raises CapacityError where a demanded length does not fit.
    """
    bytes_each = block_bytes(built.model.kv_widths(), config.block_size, built.model.kv_like.itemsize)
    per_request = -(-length // config.block_size)
    if config.kv_memory is not None:
        budget = config.kv_memory
    elif config.gpu_memory_utilization is not None or hardware.device != "cpu":
        part, weights = config.gpu_memory_utilization or DEFAULT_GPU_PART, built.model.nbytes()
        budget = max(0, int((hardware_of(hardware.device).memory + weights) * part) - weights)
    else:
        budget = max(DEFAULT_CPU_POOL, (per_request + 1) * bytes_each if config.max_model_len else 0)
        budget = min(int(local_cpu().memory * 0.9), budget)
    blocks = min(budget // bytes_each, per_request * config.max_num_seqs + 1)
    needed = per_request + 1 if config.max_model_len else 2
    if blocks < needed:
        raise CapacityError(
            f"the KV pool of {budget / 2**20:.1f} MiB holds {blocks} blocks of {config.block_size} tokens "
            f"({bytes_each} bytes each), but {needed} are needed",
            where="--kv-memory", remedy="Give it more memory, or lower --max-model-len.",
        )  # fmt: skip
    return blocks


def end_tokens(checkpoint: Checkpoint, spec: ModelSpec, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The ids that end an answer: generation_config.json's, else config.json's, else the tokenizer's."""
    stated = checkpoint.generation_config.get("eos_token_id")
    if stated is not None:
        ids = stated if isinstance(stated, list) else [stated]
        return frozenset(i for i in ids if isinstance(i, int) and 0 <= i < spec.vocab)
    if spec.eos_token_ids:
        return frozenset(spec.eos_token_ids)
    return frozenset() if tokenizer is None or tokenizer.eos_id is None else frozenset({tokenizer.eos_id})
