"""Tools and reasoning through the official client: a real server for each family, its answers dictated by a grammar.

The checkpoint is `tiny` under a chat template of the family, written here after its published form. What the model says
is held to one text, so that the whole way is taken: template, tokens, detokenising, parser, stream, client.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from moesaic.assets import embedded_model
from tests.serve_support import Server
from tests.test_serve_parsers import CODER, GLM, HERMES, OSS, TOOLS, V3, V31, WEATHER

# Each loops over messages and their calls, shows tools, and opens the answer as its family does.
HEAD = "{%- if tools %}[tools]{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif -%}"
DEEPSEEK = HEAD + (
    "{%- for m in messages %}<｜{{ m.role }}｜>{{ m.content or '' }}{% if m.tool_calls %}<｜tool▁calls▁begin｜>"
    "{% for c in m.tool_calls %}<｜tool▁call▁begin｜>{{ c.function.name + '<｜tool▁sep｜>' + c.function.arguments }}"
    "<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>{% endif %}{% endfor %}<｜Assistant｜><think>\n"
)
QWEN = HEAD + (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "{% endfor %}<|im_start|>assistant\n{% if false %}<think></think>{% endif %}"
)
ZAI = QWEN.replace("<tool_call>\n", "<tool_call>{# <arg_key> #}")
HARMONY = HEAD + (
    "{%- for m in messages %}<|start|>{{ m.role }}{% for c in m.tool_calls or [] %} to=functions.{{ c.function.name }}"
    "<|channel|>commentary json<|message|>{{ c.function.arguments | tojson }}<|call|>{% endfor %}<|message|>"
    "{{ m.content or '' }}<|end|>{% endfor %}<|start|>assistant"
)
BOTH = [("weather", json.loads(WEATHER)), ("time", {})]
FAMILIES: dict[str, tuple[str, list[tuple[str, str, str, list[Any]]]]] = {
    # template, then (what the model says, content, reasoning, calls)
    "deepseek": (DEEPSEEK, [("Hm.\n</think>\n\nI look." + V31, "I look.", "Hm.", BOTH),
                            ("Hm.\n</think>\n\n" + V3, "", "Hm.", BOTH), ("Hm.\n</think>\n\nNo.", "No.", "Hm.", [])]),
    "qwen": (QWEN, [(HERMES, "", "", BOTH), ("<think>\nHm.\n</think>\n\n" + CODER, "", "Hm.", BOTH)]),
    "glm": (ZAI, [("<think>Hm.</think>\n" + GLM, "", "Hm.", BOTH)]),
    "gpt-oss": (HARMONY, [(OSS, "", "Need the weather.", BOTH[:1]),
                          ("<|channel|>final<|message|>No.", "No.", "", [])]),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Server]]:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    shutil.copytree(embedded_model(), folder)
    (folder / "chat_template.jinja").write_text(FAMILIES[request.param][0])
    server = Server(str(folder), "--served-model-name", "m")
    yield request.param, server
    assert server.stop() == 0
    assert "Traceback" not in server.text()


def asked(said: str, **more: Any) -> dict[str, Any]:
    question = [{"role": "user", "content": "How is the weather in Bern?"}]
    return {"model": "m", "messages": question, "tools": TOOLS, "max_tokens": 700, "extra_body": {"choice": [said]},
            **more}  # fmt: skip


def calls_of(found: Any) -> list[Any]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in found or ()]


def test_calls_and_reasoning(family: tuple[str, Server]) -> None:
    name, server = family
    client = server.client()
    for said, content, reasoning, calls in FAMILIES[name][1]:
        choice = client.chat.completions.create(**asked(said)).choices[0]
        message = choice.message
        assert calls_of(message.tool_calls) == calls
        assert (message.content or "").strip() == content
        assert (getattr(message, "reasoning_content", None) or "").strip() == reasoning
        assert choice.finish_reason == ("tool_calls" if calls else "stop")
        assert len({call.id for call in message.tool_calls or ()}) == len(calls)


def test_streamed(family: tuple[str, Server]) -> None:
    name, server = family
    for said, content, reasoning, calls in FAMILIES[name][1]:
        texts: dict[str, str] = {"content": "", "reasoning_content": ""}
        pieces: dict[int, dict[str, str]] = {}
        reasons = []
        for chunk in server.client().chat.completions.create(**asked(said), stream=True):
            choice = chunk.choices[0]
            for part in texts:
                texts[part] += getattr(choice.delta, part, None) or ""
            for call in choice.delta.tool_calls or ():
                one = pieces.setdefault(call.index, {"name": "", "arguments": "", "id": call.id})
                one["name"] += call.function.name or ""
                one["arguments"] += call.function.arguments or ""
            reasons.append(choice.finish_reason)
        assert [(one["name"], json.loads(one["arguments"])) for _, one in sorted(pieces.items())] == calls
        assert (texts["content"].strip(), texts["reasoning_content"].strip()) == (content, reasoning)
        assert [each for each in reasons if each] == ["tool_calls" if calls else "stop"]


SHAPE = {"type": "object", "required": ["a"], "additionalProperties": False,
         "properties": {"a": {"const": "</think> x"}}}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_held_to_a_form_is_the_answer(family: tuple[str, Server], stream: bool) -> None:
    """It leaves no room for reasoning, although the prompt may have opened it, nor for calls."""
    _, server = family
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SHAPE}}
    for asks in ({"response_format": form}, {"extra_body": {"choice": ["yes", "yes, yes"]}},
                 {"extra_body": {"regex": "[0-9]{3}"}}):  # fmt: skip
        given = {**asked(""), "extra_body": {}, "max_tokens": 60, **asks}
        found = server.client().chat.completions.create(**given, stream=stream)
        deltas = [chunk.choices[0].delta for chunk in found] if stream else [found.choices[0].message]
        text = "".join(delta.content or "" for delta in deltas)
        assert not any(getattr(delta, "reasoning_content", None) or delta.tool_calls for delta in deltas)
        if "response_format" in asks:
            assert json.loads(text) == {"a": "</think> x"}
        else:
            assert re.fullmatch("yes|yes, yes|[0-9]{3}", text), text


def test_a_conversation_goes_on_with_what_the_tool_said(family: tuple[str, Server]) -> None:
    """The message that the client got goes back as it is, and is shown to the model as the model writes it."""
    name, server = family
    said, _, _, calls = FAMILIES[name][1][0]
    client = server.client()
    first = client.chat.completions.create(**asked(said)).choices[0].message
    given = asked("Rain.", tool_choice="none" if name == "glm" else "auto")
    given["messages"] += [first.model_dump(exclude_none=True)]
    rain = {"role": "tool", "content": "rain"}
    given["messages"] += [{**rain, "tool_call_id": call.id} for call in first.tool_calls or ()]
    if name != "gpt-oss":
        assert (client.chat.completions.create(**given).choices[0].message.content or "").strip() in ("Rain.", "")
    tokens = server.post("/tokenize", {"messages": given["messages"]}).json()["tokens"]
    text = server.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert text.count("weather") >= len(calls[:1])
    assert "Bern" in text.partition("?")[2]
    assert text.count("rain") == len(calls)


def test_what_is_not_supported_is_refused_by_name(family: tuple[str, Server]) -> None:
    _, server = family
    strict = [{"type": "function", "function": {"name": "f", "strict": True}}]
    for more, param in (
        ({"tool_choice": "required"}, "tool_choice"), ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice"),
        ({"tools": strict}, "tools"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as refused:
            server.client().chat.completions.create(**asked("x", **more))
        assert refused.value.param == param
