"""The command line: help, options, errors and exit codes, and `moesaic generate`."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from moesaic import LLM, __version__, commands
from moesaic.assets import HERE, embedded_model
from moesaic.cli import build_parser, command_names, main
from moesaic.commands import _options as options
from moesaic.config import EngineConfig
from moesaic.engine.params import SamplingParams
from moesaic.errors import CheckpointError, MoesaicError
from tests.cli_support import LENGTH, call, command, environment, spawn, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(str(model), progress=False)


def objects(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


# --- parsing ---------------------------------------------------------------------------------------------------------


def test_help_is_fast_and_loads_no_torch() -> None:
    program = (
        "import sys; from moesaic.cli import main; main(['generate', '--help']);"
        "heavy = {'torch', 'numpy', 'transformers', 'tokenizers', 'jinja2', 'tqdm'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment(), check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # Processor time, not wall time: other tests may be running beside this one.
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) < 0.3


@pytest.mark.parametrize("name", command_names())
def test_the_help_of_each_command_gives_every_default_and_an_example(name: str) -> None:
    done = call(name, "--help")
    assert done.code == 0
    assert f"\n  moesaic {name}" in done.out.partition("examples:")[2]
    parser = build_parser()._subparsers._group_actions[0].choices[name]  # type: ignore[union-attr, index, call-overload]
    for action in parser._actions:
        if action.option_strings and action.dest not in ("help", "prompt", "file"):
            told = (action.help or "").rstrip()
            assert told.endswith(")"), action.option_strings
            assert "(default: " in told or "(required)" in told, action.option_strings


ENGINE_FLAGS = """
    --dtype float32 --device cpu --max-model-len 9 --block-size 8 --kv-memory 2MiB --gpu-memory-utilization 0.5
    --max-num-seqs 3 --max-num-batched-tokens 7 --no-prefix-cache --deterministic --seed 5 --experts cpu --revision r
    --no-progress --quantization mxfp8 --router-dtype bfloat16 --no-graphs --kv fp8
    --load-format dummy --attention cpu"""
SAMPLING_FLAGS = """
    --temperature 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1 --presence-penalty 0.2
    --frequency-penalty 0.3 --logit-bias 3=-2 --logit-bias 4=1.5 --logprobs 2 --prompt-logprobs 1 --stop a --stop b
    --stop-token-id 7 --include-stop --max-tokens 9 --min-tokens 2 --ignore-eos --no-skip-special-tokens --n 2"""


def test_every_field_has_its_flag_and_arrives() -> None:
    parser = build_parser()
    args = parser.parse_args(["generate", "M", "--prompt", "x", *ENGINE_FLAGS.split()])
    assert options.given(args, EngineConfig) == {
        "dtype": "float32", "device": "cpu", "max_model_len": 9, "block_size": 8, "kv_memory": 2 << 20,
        "gpu_memory_utilization": 0.5, "max_num_seqs": 3, "max_num_batched_tokens": 7, "prefix_cache": False,
        "deterministic": True, "seed": 5, "experts": "cpu", "revision": "r", "progress": False,
        "quantization": "mxfp8", "kv": "fp8", "load_format": "dummy", "router_dtype": "bfloat16", "graphs": False,
        "attention": "cpu",
    }  # fmt: skip
    assert set(options.given(args, EngineConfig)) == {field.name for field in fields(EngineConfig)}
    args = parser.parse_args(["generate", "M", "--prompt", "x", *SAMPLING_FLAGS.split()])
    assert options.sampling_fields(args) == {
        "temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": 0.3, "logit_bias": {3: -2.0, 4: 1.5}, "logprobs": 2,
        "prompt_logprobs": 1, "stop": ["a", "b"], "stop_token_ids": [7], "include_stop": True, "max_tokens": 9,
        "min_tokens": 2, "ignore_eos": True, "skip_special_tokens": False, "n": 2,
    }  # fmt: skip
    assert {*options.sampling_fields(args), "seed"} == {field.name for field in fields(SamplingParams)}
    assert options.given(parser.parse_args(["generate", "--prompt", "x"]), EngineConfig) == {}


def test_a_command_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shout.py").write_text(
        "def add_parser(subparsers):\n    subparsers.add_parser('shout').set_defaults(run=run)\n"
        "def run(args):\n    print('HEY')\n    return 7\n"
    )
    (tmp_path / "_shared.py").write_text("raise SystemExit('not a command')")
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    done = call("shout")
    sys.modules.pop("moesaic.commands.shout")
    assert (done.code, done.out) == (7, "HEY\n")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["generat"], "generat"),
        (["generate"], "--prompt"),
        (["generate", "--prompt", "x", "--temp", "1"], "--temp"),
        (["generate", "--prompt", "x", "--file", "y"], "--file"),
        (["generate", "--prompt", "x", "--top-k", "many"], "--top-k"),
        (["generate", "--prompt", "x", "--kv-memory", "3 apples"], "--kv-memory"),
        (["generate", "--prompt", "x", "--logit-bias", "3"], "--logit-bias"),
        (["generate", "--prompt", "x", "--dtype", "int3"], "--dtype"),
        (["generate", "--prompt", "x", "--max-model-len", "0"], "--max-model-len"),
        (["generate", "--prompt", "x", "--gpu-memory-utilization", "2"], "--gpu-memory-utilization"),
        (["chat", "--n", "2"], "--n"),
        (["upcycle", "a"], "OUTPUT"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_option_is_one_line_and_exit_code_2(argv: list[str], told: str) -> None:
    done = call(*argv)
    assert done.code == 2
    assert done.out == ""
    assert told in done.error


def test_version_and_no_command() -> None:
    assert call("--version").out == f"moesaic {__version__}\n"
    done = call()
    assert done.code == 2
    assert "generate" in done.err
    assert done.out == ""


def test_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_with(error: BaseException) -> int:
        def run(_: argparse.Namespace) -> int:
            raise error

        monkeypatch.setattr("moesaic.commands.generate.run", run)
        return call("generate", "--prompt", "x").code

    kinds = MoesaicError.__subclasses__()
    assert len(kinds) >= 5
    assert [fails_with(kind("bad")) for kind in kinds] == [kind.exit_code for kind in kinds]
    assert fails_with(KeyboardInterrupt()) == 130
    with pytest.raises(ZeroDivisionError):  # a defect of ours is not dressed up as the user's mistake
        fails_with(ZeroDivisionError())


def test_main_takes_the_arguments_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["moesaic", "--version"])
    assert main() == 0


def test_a_reader_that_leaves_is_no_error(model: Path) -> None:
    argv = command("generate", model, "--prompt", "x", "--json", "--n", "200", "--max-tokens", "20", "--ignore-eos")
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 141
    assert "Traceback" not in err
    assert "rror" not in err
    assert err.startswith("moesaic: ")


# --- generate --------------------------------------------------------------------------------------------------------


def test_text_output_is_a_block_per_prompt(model: Path, llm: LLM) -> None:
    done = spawn("generate", model, "--raw", "--prompt", "the quick", "--prompt", "over", "--max-tokens", "6")
    params = SamplingParams(temperature=0, max_tokens=6)
    first, second = llm.generate(["the quick", "over"], params)
    blocks = [
        f"[{i}/2] {prompt}\n{each.text}\n-- {each.completions[0].finish_reason}: "
        f"{len(each.prompt_tokens)} prompt tokens, {len(each.tokens)} new\n\n"
        for i, prompt, each in ((1, "the quick", first), (2, "over", second))
    ]
    assert done.out == "".join(blocks)
    assert done.code == 0
    summary, speed = done.err.splitlines()
    assert "mixtral, 2 layers" in summary
    assert speed.startswith("moesaic: 2 answers, ")


def test_json_output(model: Path, llm: LLM) -> None:
    done = call(
        "generate", model, "--prompt", "the dog", "--json", "--n", "2", "--logprobs", "1", "--prompt-logprobs", "0",
        "--max-tokens", "4", "--temperature", "1", "--seed", "3",
    )  # fmt: skip
    lines = objects(done.out)
    prompt = llm.tokenizer.encode("<s><|user|>user: the dog\n<|user|>assistant: ", add_special_tokens=False)
    assert [line["index"] for line in lines] == [0, 1]
    assert lines[0]["tokens"] != lines[1]["tokens"]
    for line in lines:
        assert line["prompt"] == "the dog"
        assert line["text"] == llm.tokenizer.decode(line["tokens"])
        assert line["finish_reason"] == "length"
        assert line["usage"]["prompt_tokens"] == len(prompt)
        assert line["usage"]["completion_tokens"] == len(line["tokens"]) == 4
        assert [each["token"] for each in line["logprobs"]] == line["tokens"]
        assert [each and each["token"] for each in line["prompt_logprobs"]] == [None, *prompt[1:]]
    assert call("generate", model, "--prompt", "the dog", "--json", "--n", "2", "--logprobs", "1", "--prompt-logprobs",
                "0", "--max-tokens", "4", "--temperature", "1", "--seed", "3").out == done.out  # fmt: skip


def test_the_chat_template_is_used_unless_raw(model: Path, llm: LLM, tmp_path: Path) -> None:
    def size(*argv: str | Path) -> int:
        line = objects(call("generate", *argv, "--prompt", "hi", "--json", "--max-tokens", "1").out)[0]
        return int(line["usage"]["prompt_tokens"])

    def length(text: str) -> int:
        return len(llm.tokenizer.encode(text, add_special_tokens=False))

    chat = "<|user|>user: hi\n<|user|>assistant: "
    assert size(model) == size(model, "--chat") == length("<s>" + chat)
    assert size(model, "--system", "be brief") == length("<s><|user|>system: be brief\n" + chat)
    assert size(model, "--raw") == length("<s>hi")
    plain = write_model(tmp_path / "plain", chat=False)
    assert size(plain) == length("<s>hi")
    assert "chat template" in call("generate", plain, "--chat", "--prompt", "hi").error
    assert call("generate", plain, "--chat", "--prompt", "hi").code == 4
    assert "--system" in call("generate", model, "--raw", "--system", "x", "--prompt", "hi").error


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_a_file_has_one_prompt_per_line(model: Path, tmp_path: Path, source: str) -> None:
    raw = "\ufeffthe dog\r\n\n  \n# no comment\u2028here\ncafé".encode()
    (tmp_path / "prompts.txt").write_bytes(raw)
    name = "-" if source == "stdin" else tmp_path / "prompts.txt"
    done = call("generate", model, "--raw", "--file", name, "--json", "--max-tokens", "1", stdin=raw)
    assert [line["prompt"] for line in objects(done.out)] == ["the dog", "# no comment\u2028here", "café"]


def test_a_json_lines_file(model: Path, llm: LLM, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "the dog", "max_tokens": 3, "stop": "zz", "logit_bias": {"20": 100}},
        {"prompt": [5, 6, 7], "temperature": 1, "seed": 4, "stop_token_ids": [1]},
        {"messages": [{"role": "user", "content": "hi"}]},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    first, second, third = objects(call("generate", model, "--file", file, "--json", "--max-tokens", "5").out)
    assert first["tokens"] == [20, 20, 20]
    assert second["prompt"] == [5, 6, 7]
    assert second["usage"]["prompt_tokens"] == 3
    params = SamplingParams(temperature=1, seed=4, max_tokens=5, stop_token_ids=(1,))
    assert second["tokens"] == llm.generate([5, 6, 7], params)[0].tokens
    assert third["prompt"] == lines[2]["messages"]
    assert third["tokens"] == llm.chat(lines[2]["messages"], SamplingParams(temperature=0, max_tokens=5))[0].tokens


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "JSON"),
        ("[" * 100000, "JSON"),
        ("[1]", "object"),
        ('{"text": "x"}', "prompt"),
        ('{"prompt": "x", "messages": []}', "prompt"),
        ('{"prompt": 3}', "prompt"),
        ('{"prompt": ""}', "empty"),
        ('{"prompt": []}', "empty"),
        ('{"messages": "x"}', "messages"),
        ('{"messages": []}', "messages"),
        ('{"prompt": "x", "tempreature": 1}', "tempreature"),
        ('{"prompt": "x", "temperature": "hot"}', "temperature"),
        ('{"prompt": "x", "temperature": NaN}', "temperature"),
        ('{"prompt": "x", "top_k": 1.5}', "top_k"),
        ('{"prompt": "x", "top_k": true}', "top_k"),
        ('{"prompt": "x", "top_p": 2}', "top_p"),
        ('{"prompt": "x", "stop": [3]}', "stop"),
        ('{"prompt": "x", "logit_bias": {"one": 3}}', "logit_bias"),
        ('{"prompt": "x", "min_tokens": 9, "max_tokens": 8}', "min_tokens"),
    ],
)
def test_a_wrong_json_line_is_named(model: Path, tmp_path: Path, line: str, told: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line)
    done = call("generate", model, "--file", file)
    assert done.code == 5
    assert f"{file}:2: " in done.error
    assert told in done.error


def test_the_default_number_of_tokens(model: Path, tmp_path: Path) -> None:
    def new(path: Path, *argv: str) -> int:
        line = objects(call("generate", path, "--raw", "--prompt", "a", "--json", "--ignore-eos", *argv).out)[0]
        assert line["usage"]["prompt_tokens"] == 2
        return int(line["usage"]["completion_tokens"])

    assert new(model) == LENGTH - 2 < options.DEFAULT_MAX_TOKENS
    longer = write_model(tmp_path / "longer", max_position_embeddings=300)
    assert new(longer) == 256
    assert new(longer, "--min-tokens", "270") == 270
    assert new(longer, "--max-tokens", "280") == 280
    done = call("generate", longer, "--raw", "--prompt", "a", "--max-tokens", "299")
    assert done.code == 5
    assert "max_tokens" in done.err.splitlines()[-1]


def test_the_checkpoint_decides_how_to_sample(model: Path, tmp_path: Path) -> None:
    hot = write_model(tmp_path / "hot")
    (hot / "generation_config.json").write_text('{"do_sample": true, "temperature": 5.0}')

    def tokens(path: Path, *argv: str) -> Any:
        return objects(call("generate", path, "--prompt", "a", "--json", "--max-tokens", "12", *argv).out)[0]["tokens"]

    greedy = tokens(model)
    assert tokens(hot, "--temperature", "0") == greedy
    assert len({tuple(tokens(hot, "--seed", str(seed))) for seed in range(3)}) == 3
    assert "--top-k without effect" in call("generate", model, "--prompt", "a", "--top-k", "3", "--max-tokens", "1").err


def test_the_embedded_model_is_named_when_it_is_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("moesaic.assets.HERE", tmp_path)
    with pytest.raises(CheckpointError, match="embedded model"):
        embedded_model()
    done = call("generate", "--prompt", "x")
    assert done.code == 3
    assert "embedded model" in done.error


def test_the_prompts_of_make_run() -> None:
    lines = (HERE / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert 4 <= len(lines) <= 8
    assert all(line.strip() == line and line for line in lines)
