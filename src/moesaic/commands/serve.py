"""`moesaic serve`: an OpenAI-compatible HTTP server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.commands._options import ENGINE, Hint, add_model_options, add_option, given, hints, is_many, scalar, size
from moesaic.config import EngineConfig, environment_options
from moesaic.errors import OptionError
from moesaic.serving.options import ServeConfig, resolve

if TYPE_CHECKING:
    from dataclasses import Field

SERVE: Mapping[str, Hint] = {
    "host": Hint("address to listen on; 0.0.0.0 is every one", "ADDRESS"),
    "port": Hint("port to listen on; 0 is any free one", "PORT"),
    "served_model_name": Hint("what clients call the model; repeatable", "NAME", "MODEL as given, or tiny"),
    "api_key": Hint("a key that is let in; repeatable (others on this machine can see it)", "KEY", "no key needed"),
    "api_key_file": Hint("file with one key per line", "FILE", "none"),
    "cors_origin": Hint("origin of web pages that may call; repeatable", "ORIGIN", "none"),
    "max_queue": Hint("completions waiting beside the running ones; more get 429", "N"),
    "request_timeout": Hint("longest time for a request, from arrival to last byte", "SECONDS"),
    "header_timeout": Hint("longest time for a client to send a request", "SECONDS"),
    "drain_timeout": Hint("after SIGTERM, time for running requests to end", "SECONDS"),
    "engine_timeout": Hint("longest silence of the engine before it counts as dead", "SECONDS"),
    "max_connections": Hint("connections at once", "N"),
    "max_body": Hint("largest request body: 4MiB, 512K or plain bytes", "BYTES", "4MiB", parse=size),
    "max_prompt_tokens": Hint("longest prompt", "TOKENS", "what fits the model"),
    "max_n": Hint("most completions per prompt", "N"),
    "max_top_logprobs": Hint("most alternatives per token, at most 20", "N"),
    "max_schema": Hint("largest JSON schema or set of choices", "BYTES", "64KiB", parse=size),
    "max_schema_depth": Hint("deepest JSON schema", "N"),
    "tool_parser": Hint("how tool calls are read: auto, none, deepseek, qwen, glm or gpt-oss", "NAME"),
    "reasoning_parser": Hint("how reasoning is read: auto, none, think or gpt-oss", "NAME"),
    "expert_load": Hint("do not sample the load of the experts", default="sample it in 1% of the time"),
    "expert_series": Hint("no metric per expert, only per layer", default="one per expert"),
    "log_json": Hint("log JSON, one object per line", default="text"),
    "log_file": Hint("append the log to this file", "FILE", "standard error"),
    "log_prompts": Hint("write prompts to the log", default="never"),
}

EPILOG = """\
An option is looked for in this order: the command line, the environment (MOESAIC_ and the option's name, such as
MOESAIC_MAX_NUM_SEQS=8; lists are separated by commas), the file of --config (YAML: `max_num_seqs: 8`), the default.
An unknown name in any of them is an error. --print-config shows what came out of it.

examples:
  moesaic serve                                       the embedded model, on http://127.0.0.1:8000/v1
  moesaic serve ./mixtral --served-model-name mixtral --max-num-seqs 128
  moesaic serve ./mixtral --host 0.0.0.0 --api-key-file keys.txt --log-json
  moesaic serve --config serve.yaml --print-config
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve", help="serve a model over HTTP", epilog=EPILOG, usage="moesaic serve [MODEL] [options]",
        description="Serve a model over HTTP, compatible with OpenAI's API.",
    )  # fmt: skip
    group = parser.add_argument_group("server")
    for field in fields(ServeConfig):
        add_option(group, field, hints(ServeConfig)[field.name], SERVE[field.name])
    group.add_argument("--config", metavar="FILE", help="YAML file of options (default: none)")
    group.add_argument("--print-config", action="store_true", help="show all options and leave (default: serve)")
    add_model_options(parser, explain=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from moesaic.serving.extra import require

    require()
    flags = {**given(args, ServeConfig), **given(args, EngineConfig)}
    if args.model is not None:
        flags["model"] = args.model
    layers = {"flag": flags, "environment": from_environment(), "file": from_file(args.config)}
    options = resolve(layers)
    if args.print_config:
        show(options.shown(), options.sources)
        return 0
    from moesaic.serving.server import serve

    return serve(options)


def all_fields() -> dict[str, tuple[Field[Any], Any, Hint]]:
    """Name -> (field, its type, its hint), of every option that environment and file may set."""
    found = {f.name: (f, hints(ServeConfig)[f.name], SERVE[f.name]) for f in fields(ServeConfig)}
    return found | {f.name: (f, hints(EngineConfig)[f.name], ENGINE[f.name]) for f in fields(EngineConfig)}


def from_environment() -> dict[str, Any]:
    """Raises OptionError for an unknown variable, or one whose text is not of the option's type."""
    known = all_fields()
    found: dict[str, Any] = {}
    for name, text in environment_options().items():
        where = f"MOESAIC_{name.upper()}"
        if name == "model":
            found[name] = text
        elif name not in known:
            raise OptionError("unknown option", where=where, remedy="Unset it, or correct its name.")
        else:
            found[name] = from_text(*known[name], text, where)
    return found


def from_text(field: Field[Any], kind: Any, hint: Hint, text: str, where: str) -> Any:
    if kind is bool:
        words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if text.lower() not in words:
            raise OptionError(f"must be true or false, not {text!r:.40}", where=where, remedy="Correct the value.")
        return words[text.lower()]
    parse = hint.parse or scalar(kind)
    try:
        if is_many(field):
            return [parse(part.strip()) for part in text.split(",") if part.strip()]
        return parse(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        what = f"{text!r:.40} is no value for it ({error})"
        raise OptionError(what, where=where, remedy="Correct the value.") from None


def from_file(name: str | None) -> dict[str, Any]:
    """The options of a YAML file. Raises OptionError naming what is wrong with it."""
    if name is None:
        return {}
    import yaml

    class Once(yaml.SafeLoader):
        """YAML itself lets the last of two values win, and says nothing."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [str(key.value).replace("-", "_") for key, _ in node.value]
            twice = next((each for at, each in enumerate(names) if each in names[:at]), None)
            if twice is not None:
                raise yaml.YAMLError(f"{twice} is given twice")
            return super().construct_mapping(node, deep)

    try:
        value = yaml.load(Path(name).read_text(encoding="utf-8"), Once)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise OptionError(f"{name} cannot be read ({reason})", where="--config", remedy="Correct the file.") from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise OptionError(f"{name} must map options to values", where="--config", remedy="Write `port: 8000`.")
    known = all_fields()
    found = {key.replace("-", "_"): each for key, each in value.items()}
    if not isinstance(found.get("model"), (str, type(None))):
        what = f"{found['model']!r:.40} is no value for it"
        raise OptionError(what, where=f"{name}: model", remedy="Write a path or a hub id.")
    for key, each in found.items():
        if key in known:
            found[key] = from_yaml(*known[key], each, f"{name}: {key}")
    return found


def from_yaml(field: Field[Any], kind: Any, hint: Hint, value: Any, where: str) -> Any:
    """A value of the option's type, as YAML has it; sizes may be text such as 4GiB."""
    wanted = scalar(kind)
    if isinstance(value, str) and hint.parse is not None:
        return from_text(field, kind, hint, value, where)
    parts = value if is_many(field) and isinstance(value, list) else [value]
    allowed = (int, float) if wanted is float else (wanted,)
    right = all(isinstance(part, allowed) and (wanted is bool or not isinstance(part, bool)) for part in parts)
    if not right and not (value is None and field.default is None):
        raise OptionError(f"{value!r:.40} is no value for it", where=where, remedy="Correct the file.")
    return parts if is_many(field) else value


def show(options: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """YAML that --config takes again (but for hidden keys), with the source of each value."""
    import yaml

    for name, value in options.items():
        text = yaml.safe_dump({name: value}, default_flow_style=True, width=10_000).strip()[1:-1]
        print(f"{text:<40} # {sources.get(name, 'default')}")
    sys.stdout.flush()
