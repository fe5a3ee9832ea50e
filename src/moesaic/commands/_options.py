"""Command-line options made from the dataclasses that they fill, so that the two cannot drift apart.

Only options that were given end up in the parsed arguments: what was left out keeps the dataclass's, or the
checkpoint's, own default.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from moesaic.assets import embedded_model
from moesaic.config import DEVICES, DTYPES, KV_FORMATS, LOAD_FORMATS, EngineConfig, flag, parse_bytes
from moesaic.contracts.scheme import SCHEMES
from moesaic.engine.params import SamplingParams
from moesaic.errors import OptionError

if TYPE_CHECKING:
    from moesaic.llm import LLM

DEFAULT_MAX_TOKENS = 256
"""Of an answer by `generate`, where neither the user nor the checkpoint sets a limit."""


@dataclass(frozen=True)
class Hint:
    """What a dataclass does not know of its own field. default: said instead of the field's default.

    name: of the flag, where it is not the field's.  parse: from text, where the field's type does not say.
    """

    help: str
    metavar: str | None = None
    default: str | None = None
    choices: tuple[str, ...] | None = None
    parse: Callable[[str], Any] | None = None
    name: str | None = None


def size(text: str) -> int:
    """`parse_bytes`, its error in the form that argparse shows with the name of the option."""
    try:
        return parse_bytes(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(error.one_line()) from None


def bias(text: str) -> tuple[int, float]:
    """`ID=ADDEND` -> (id, addend)."""
    token, _, addend = text.partition("=")
    try:
        return int(token), float(addend)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form ID=ADDEND, such as 42=-5") from None


def scheme(text: str) -> str:
    """The name of a scheme, or `none`."""
    if text != "none" and text not in SCHEMES:
        raise argparse.ArgumentTypeError(f"unknown scheme {text!r:.40}; known: none, {', '.join(SCHEMES)}")
    return text


ENGINE: Mapping[str, Hint] = {
    "dtype": Hint("what is computed in; auto: the checkpoint's own where the hardware has it", choices=DTYPES),
    "device": Hint("where to compute", choices=DEVICES),
    "max_model_len": Hint("most tokens of a request, prompt included", "TOKENS", "what model and memory allow"),
    "block_size": Hint("tokens per block of the KV cache", "TOKENS"),
    "kv_memory": Hint("size of the KV cache: 4GiB, 512M or plain bytes", "BYTES", "from free memory", parse=size),
    "gpu_memory_utilization": Hint("part of free memory for weights and KV, in (0, 1]", "PART", "1 GiB of KV"),
    "max_num_seqs": Hint("requests running at once", "N"),
    "max_num_batched_tokens": Hint("tokens per step, hence the largest prefill chunk", "TOKENS"),
    "prefix_cache": Hint("do not reuse the KV cache of shared prompt beginnings", default="reuse"),
    "deterministic": Hint("an answer never depends on what runs beside it", default="off"),
    "kv": Hint("format of the KV cache; bf16: the dtype that is computed in", choices=KV_FORMATS),
    "load_format": Hint("dummy: random weights; only a config.json is needed", choices=LOAD_FORMATS),
    "quantization": Hint(
        f"scheme to quantise to while loading: {', '.join(SCHEMES)}; none is as stored", "S", "none", parse=scheme
    ),
    "seed": Hint("seeds sampling: the same command gives the same answers", "N"),
    "experts": Hint("kernel backend of the expert product; decode=A,prefill=B for each phase its own", "NAME"),
    "attention": Hint("kernel backend of attention over the KV cache; auto: the best", "NAME"),
    "router_dtype": Hint("what the routers compute in; auto: float32", choices=DTYPES),
    "graphs": Hint("do not decode in CUDA graphs", default="where every kernel can stand in one"),
    "revision": Hint("branch, tag or commit of a hub model", "NAME", "its main branch"),
    "progress": Hint("show no progress bars", default="show them on a terminal"),
}

SAMPLING: Mapping[str, Hint] = {
    "temperature": Hint("0 is greedy, 1 the model's own distribution", "X", "the checkpoint's, else 0"),
    "top_k": Hint("draw from the K likeliest tokens; 0 is off", "K", "the checkpoint's, else 0"),
    "top_p": Hint("draw from the likeliest tokens that make up P, in (0, 1]", "P", "the checkpoint's, else 1"),
    "min_p": Hint("drop tokens below P times the likeliest, in [0, 1]", "P", "the checkpoint's, else 0"),
    "repetition_penalty": Hint("divide logits of tokens seen; 1 is off", "X", "the checkpoint's, else 1"),
    "presence_penalty": Hint("subtract from tokens in the answer, in [-2, 2]", "X"),
    "frequency_penalty": Hint("subtract per occurrence in the answer, in [-2, 2]", "X"),
    "logit_bias": Hint("add to one token's logit; repeatable", "ID=ADDEND", "none", parse=bias),
    "logprobs": Hint("report N alternatives per new token, at most 20", "N", "off"),
    "prompt_logprobs": Hint("report N alternatives per prompt token, at most 20", "N", "off"),
    "stop": Hint("end the answer before this text; repeatable", "TEXT", "none"),
    "stop_token_ids": Hint("end the answer at this token; repeatable", "ID", "none", name="--stop-token-id"),
    "include_stop": Hint("keep the stop text in the answer", default="cut it off"),
    "max_tokens": Hint("most new tokens", "TOKENS", f"the checkpoint's, else {DEFAULT_MAX_TOKENS}"),
    "min_tokens": Hint("no end before this many new tokens", "TOKENS"),
    "ignore_eos": Hint("go on after the model's end token", default="end there"),
    "skip_special_tokens": Hint("show special tokens in the text", default="leave them out"),
    "n": Hint("completions per prompt", "N"),
}

SHAPERS = ("top_k", "top_p", "min_p")


def add_model_options(parser: argparse.ArgumentParser, *, explain: bool = True) -> None:
    """MODEL and the engine's options: one flag per field of EngineConfig. explain: and --explain."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "model", metavar="MODEL", nargs="?",
        help="directory of a Hugging Face checkpoint, or a hub id such as org/name (default: the embedded model)",
    )  # fmt: skip
    engine = parser.add_argument_group("engine", "how the model is run")
    for field in fields(EngineConfig):
        add_option(engine, field, hints(EngineConfig)[field.name], ENGINE[field.name])
    if explain:
        text = "say which kernel was chosen, and why (default: off)"
        engine.add_argument("--explain", action="store_true", help=text)


def add_sampling_options(parser: argparse.ArgumentParser, *, without: Collection[str] = (), limit: str = "") -> None:
    """One flag per field of SamplingParams but those of `without`. limit: what to say of max_tokens' default.

    A request's own `seed` has no flag: `--seed`, the engine's, makes all of them repeatable.
    """
    group = parser.add_argument_group(
        "sampling", "defaults come from the checkpoint's generation_config.json; without one, decoding is greedy"
    )
    for field in fields(SamplingParams):
        if field.name not in (*without, "seed"):
            hint = SAMPLING[field.name]
            hint = replace(hint, default=limit) if limit and field.name == "max_tokens" else hint
            add_option(group, field, hints(SamplingParams)[field.name], hint)


@cache
def hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def add_option(group: Any, field: Field[Any], kind: Any, hint: Hint) -> None:
    """The flag of one field; a field that is true by default gets its negation."""
    default = hint.default if hint.default is not None else field.default
    name = hint.name or flag(("no_" if field.default is True else "") + field.name)
    settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
    settings["help"] = f"{hint.help} (default: {default})".replace("%", "%%")
    if kind is bool:
        settings["action"] = "store_false" if field.default is True else "store_true"
    else:
        settings |= {"metavar": None if hint.choices else hint.metavar, "choices": hint.choices}
        settings["type"] = hint.parse or scalar(kind)
        if is_many(field):
            settings["action"] = "append"
    group.add_argument(name, **settings)


def scalar(kind: Any) -> Any:
    """`int | None` -> int, `tuple[str, ...]` -> str, `float` -> float: what one value of the option is."""
    if isinstance(kind, UnionType):
        return next(part for part in get_args(kind) if part is not NoneType)
    return get_args(kind)[0] if get_origin(kind) is tuple else kind


def is_many(field: Field[Any]) -> bool:
    return field.default == () or field.default is MISSING


def given(args: argparse.Namespace, kind: type[Any]) -> dict[str, Any]:
    """The fields of a dataclass that were set on the command line."""
    found = {field.name: getattr(args, field.name) for field in fields(kind) if hasattr(args, field.name)}
    return {name: dict(value) if name == "logit_bias" else value for name, value in found.items()}


def load(args: argparse.Namespace) -> LLM:
    """The model of the command line, ready. Bars only where somebody can see them move."""
    options = {"progress": sys.stderr.isatty()} | given(args, EngineConfig)
    EngineConfig.of(options)  # a wrong option is known before torch is imported
    from moesaic.llm import LLM

    return LLM(args.model or str(embedded_model()), **options)


def announce(args: argparse.Namespace, llm: LLM) -> None:
    """Says on stderr what runs."""
    print(f"moesaic: {args.model or embedded_model()}: {llm.launched.summary()}", file=sys.stderr, flush=True)
    for note in llm.launched.built.plan.notes:
        print(f"moesaic: note: {note}", file=sys.stderr, flush=True)
    if args.explain:
        print(llm.launched.built.plan.explain(), file=sys.stderr, flush=True)


def sampling_fields(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of sampling, checked before a model is loaded. Raises RequestError."""
    found = {name: value for name, value in given(args, SamplingParams).items() if name != "seed"}
    SamplingParams(**found)
    return found


def sampling(chosen: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    """The checkpoint's defaults with what the user chose; notes on stderr what will have no effect."""
    params = replace(defaults, **chosen)
    idle = [flag(name) for name in SHAPERS if name in chosen]
    if params.greedy and idle:
        print(f"moesaic: note: {', '.join(idle)} without effect: the temperature is 0 (greedy)", file=sys.stderr)
    return params
