"""`moesaic generate`: answers prompts."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moesaic.commands._options import (
    DEFAULT_MAX_TOKENS,
    add_model_options,
    add_sampling_options,
    announce,
    load,
    sampling,
    sampling_fields,
)
from moesaic.commands._prompts import Ask, from_arguments, from_file
from moesaic.commands._terminal import visible
from moesaic.engine.params import SamplingParams
from moesaic.errors import MoesaicError, RequestError

if TYPE_CHECKING:
    from moesaic.engine.sampler import TokenLogprobs
    from moesaic.llm import LLM, Completion, Result

SHOWN_CHARS = 2000
"""Of a prompt that is repeated in front of its answer."""

EPILOG = """\
A prompt is put into the model's chat template if it has one; --raw completes the text as it is.
A --file has one prompt per line; blank lines are passed over. In a .jsonl file each line is an object with "prompt"
(text or token ids) or "messages", and any sampling option under its name: {"prompt": "Hi", "max_tokens": 8}.

examples:
  moesaic generate --prompt "What is 487 + 4338?" --prompt "Reverse the word floond."
  moesaic generate ./mixtral --raw --prompt "Once upon a time" --temperature 0.8 --top-p 0.95 --max-tokens 200
  moesaic generate ./mixtral --file prompts.jsonl --json > answers.jsonl
  git log -1 --format=%s | moesaic generate ./mixtral --file -
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "generate", help="answer prompts", epilog=EPILOG,
        usage="moesaic generate [MODEL] (--prompt TEXT | --file FILE) [options]",
        description="Answer prompts, all of them at once in one batch.",
    )  # fmt: skip
    source = parser.add_argument_group("prompts", "one of these is needed").add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", action="append", help="a prompt; repeatable")
    source.add_argument("--file", metavar="FILE", help="one prompt per line, or .jsonl; - is standard input")
    form = parser.add_argument_group("form")
    template = form.add_mutually_exclusive_group()
    template.add_argument("--raw", action="store_true", help="no chat template (default: use it if there is one)")
    template.add_argument("--chat", action="store_true", help="fail if the model has no chat template (default: off)")
    form.add_argument("--system", metavar="TEXT", help="system message of each chat (default: none)")
    form.add_argument("--json", action="store_true", help="print one JSON object per answer (default: text)")
    add_model_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    asks = from_arguments(args.prompt) if args.prompt else from_file(args.file)
    chosen = sampling_fields(args)
    llm = load(args)
    began = time.perf_counter()
    base = sampling(chosen, llm.defaults)
    chat = args.chat or (bool(llm.template.names) and not args.raw)
    if args.system is not None and not chat:
        raise RequestError(
            "a system message needs a chat template", where="--system",
            remedy="Leave it out, or use a chat model without --raw.",
        )  # fmt: skip
    tokens = [encode(llm, ask, args.system, chat=chat) for ask in asks]
    params = [params_of(ask, base, llm.max_model_len - len(ids)) for ask, ids in zip(asks, tokens, strict=True)]
    announce(args, llm)
    results = llm.generate(tokens, params)
    show = show_json if args.json else show_text
    for number, (ask, result) in enumerate(zip(asks, results, strict=True), 1):
        show(ask, result, f"{number}/{len(asks)}")
    completions = [completion for result in results for completion in result.completions]
    print(f"moesaic: {speed(completions, time.perf_counter() - began)}", file=sys.stderr)
    return int(any(completion.error for completion in completions))


def encode(llm: LLM, ask: Ask, system: str | None, *, chat: bool) -> list[int]:
    """The token ids of a prompt. Raises what is wrong with it, naming where it came from."""
    first = [] if system is None else [{"role": "system", "content": system}]
    try:
        if ask.messages is not None:
            return llm.chat_tokens([*first, *ask.messages])
        if chat and isinstance(ask.prompt, str):
            return llm.chat_tokens([*first, {"role": "user", "content": ask.prompt}])
        return llm.encode(ask.prompt)
    except RequestError as error:
        raise located(error, ask) from None


def params_of(ask: Ask, base: SamplingParams, room: int) -> SamplingParams:
    """The sampling of one prompt. Where nobody sets max_tokens it is 256, or less where less fits (`room` tokens)."""
    try:
        params = replace(base, **ask.fields)
        if params.max_tokens is not None:
            return params
        return replace(params, max_tokens=max(min(DEFAULT_MAX_TOKENS, room), params.min_tokens, 1))
    except RequestError as error:
        raise located(error, ask) from None


def located(error: MoesaicError, ask: Ask) -> RequestError:
    what = f"{error.where}: {error.what}" if error.where else error.what
    return RequestError(what, where=ask.where, remedy=error.remedy)


def show_text(ask: Ask, result: Result, number: str) -> None:
    """One block per prompt: its number and text, the answers, and how each of them ended."""
    shown = ask.shown()
    text = shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)
    more = f"... ({len(text)} characters)" if len(text) > SHOWN_CHARS else ""
    print(f"[{number}] {visible(text[:SHOWN_CHARS])}{more}")
    for completion in result.completions:
        if len(result.completions) > 1:
            print(f"-- completion {completion.index}")
        print(visible(completion.text))
        why = completion.error or completion.finish_reason
        print(f"-- {why}: {len(result.prompt_tokens)} prompt tokens, {len(completion.tokens)} new")
        if completion.logprobs:
            print(f"-- log-probability of the answer: {completion.cumulative_logprob:.4f} (alternatives: --json)")
    print(flush=True)


def show_json(ask: Ask, result: Result, number: str) -> None:
    """One line per completion; `prompt` is what the user gave, before any template."""
    for completion in result.completions:
        line: dict[str, Any] = {
            "prompt": ask.shown(),
            "index": completion.index,
            "text": completion.text,
            "tokens": completion.tokens,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            "usage": usage(result, completion),
        }
        if completion.error:
            line["error"] = completion.error
        if completion.logprobs:
            line["logprobs"] = [entry(each) for each in completion.logprobs]
        if result.prompt_logprobs is not None:
            line["prompt_logprobs"] = [None if each is None else entry(each) for each in result.prompt_logprobs]
        print(one_line(line), flush=True)


def one_line(value: dict[str, Any]) -> str:
    """JSON without any character that some reader takes for the end of a line."""
    text = json.dumps(value, ensure_ascii=False)
    for char in "\x85\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def entry(report: TokenLogprobs) -> dict[str, Any]:
    """One position's log-probabilities; null stands for minus infinity, which JSON has not."""
    top = [[token, finite(value)] for token, value in report.top]
    return {"token": report.token, "logprob": finite(report.logprob), "rank": report.rank, "top": top}


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def usage(result: Result, completion: Completion) -> Mapping[str, int]:
    return {
        "prompt_tokens": len(result.prompt_tokens),
        "completion_tokens": len(completion.tokens),
        "cached_tokens": result.cached_tokens,
    }


def speed(completions: list[Completion], seconds: float) -> str:
    tokens = sum(len(completion.tokens) for completion in completions)
    answers = f"{len(completions)} answer{'s' * (len(completions) > 1)}"
    return f"{answers}, {tokens} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):.1f} tokens/s)"
