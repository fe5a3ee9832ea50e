"""ChatTemplate against `apply_chat_template` of transformers, and against templates that mean harm."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from moesaic.errors import CheckpointError, RequestError, UnsupportedError
from moesaic.text.chat import ChatTemplate
from tests.text_support import real_tokenizer, write_checkpoint

SIMPLE = """{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'odd' %}{{ raise_exception('no odd role, got ' ~ message.role) }}{% endif %}
<|{{ message.role }}|>{{ message.content }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}
"""
TEMPLATES = {
    "simple": SIMPLE,
    "trimmed": "{% for m in messages %}[{{ m['role'] }}] {{ m.content | trim }}\n{% endfor %}",
    "loop controls": (
        "{%- for m in messages %}{% if loop.last %}{% break %}{% endif %}{% if m.role == 'system' %}{% continue %}"
        "{% endif %}{{ loop.index }}/{{ loop.length }}{{ m.content }}{{ loop.nextitem.role }}{% endfor %}"
    ),
    "tojson": "{{ messages | tojson }}|{{ tools | tojson(indent=2) }}|{{ {'a': '<é&>'} | tojson(sort_keys=true) }}",
    "tools": (
        "{% if tools is defined and tools %}{% for tool in tools %}{{ tool.function.name }}: "
        "{% for key, value in tool.function.parameters.properties.items() %}{{ key }}={{ value.type }},{% endfor %}\n"
        "{% endfor %}{% endif %}{{ messages[0].content }}"
    ),
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}",
    "macros": (
        "{% macro show(m, n=1) %}<{{ m.role }}:{{ m.content * n }}>{% endmacro %}{% set ns = namespace(count=0) %}"
        "{% for m in messages %}{% set ns.count = ns.count + 1 %}{{ show(m, n=2) }}{% endfor %}{{ ns.count }}"
        "{% for k, v in dict(a=1, b='x' ~ 2)|dictsort %}{{ k }}{{ v }}{% endfor %}{{ '%s-%s' % (1, 'a') }}"
        "{{ messages | map(attribute='role') | join(',') }}"
        "{{ messages | selectattr('role', 'eq', 'user') | list | length }}"
        "{{ 'a-b-c'.split('-')[-1] }}{{ messages[::-1][0].role }}{{ '{:>5}'.format('x') }}"
        "{% for a in [1, 2] if a > 1 %}{{ a }}{% else %}none{% endfor %}{{ 'y' | indent(3, true) }}"
    ),
    "recursive": (
        "{% for x in [[1, [2]], [3]] recursive %}"
        "{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}"
    ),
    "parts": (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m['content'] %}{{ part.type }}:{{ part.text }};{% endfor %}{% endif %}|{% endfor %}"
    ),
    "variables": "{{ enable_thinking | default(true) }}{{ documents is none }}{{ pad is defined }}{{ unk_token }}",
    "date": "{{ strftime_now('%Y') }}{{ messages[0].content }}",
    "whitespace": "  {% if true %}\n  kept\n  {% endif %}\n\n{# note #}\n  {{- 'x' }}\n",
}  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Wetter für <Stadt> & Land",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]
CALL = {"type": "function", "id": "c1", "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'}}
CHAT = [
    {"role": "system", "content": "Be brief. <b>&'\""},
    {"role": "user", "content": "  Hello 你好\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi! "},
    {"role": "user", "content": "And now?"},
]
TOOL_CHAT = [
    *CHAT,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "12 °C", "tool_call_id": "c1"},
    {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
]
roles = st.sampled_from(["system", "user", "assistant", "tool"])
chats = st.lists(st.fixed_dictionaries({"role": roles, "content": st.text(max_size=12)}), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp("chat"), "byte_level", unk_token="<unk>")
    return AutoTokenizer.from_pretrained(directory)


def both(oracle, template, messages, **options):
    ours = ChatTemplate({"default": template}, oracle.special_tokens_map)
    variables = options.pop("variables", {})
    options.setdefault("add_generation_prompt", True)
    expected = oracle.apply_chat_template(messages, chat_template=template, tokenize=False, **options, **variables)
    return ours.render(messages, variables=variables, **options), expected


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("options", [{}, {"tools": TOOLS}, {"variables": {"enable_thinking": False}}], ids=str)
def test_equals_transformers(oracle, template, options):
    ours, expected = both(oracle, template, CHAT, **options)
    assert ours == expected
    assert ours


@given(messages=chats, generate=st.booleans())
@settings(max_examples=25)
def test_equals_transformers_on_any_text(oracle, messages, generate):
    for name in ("simple", "trimmed", "tojson", "macros"):
        ours, expected = both(oracle, TEMPLATES[name], messages, add_generation_prompt=generate)
        assert ours == expected


PART = [{"type": "text", "text": "a part "}]


@pytest.mark.parametrize(
    ("template", "content"),
    [
        *((name, text) for name in ("simple", "trimmed", "parts") for text in ("Once upon", "a space  ")),
        ("parts", PART),
    ],
)
def test_continuing_the_final_message(oracle, template, content):
    options = {"continue_final_message": True, "add_generation_prompt": False}
    ours, expected = both(oracle, TEMPLATES[template], [*CHAT, {"role": "assistant", "content": content}], **options)
    assert ours == expected
    assert ours.rstrip().endswith(("upon", "space", "part"))


def test_parts_are_joined_for_templates_that_read_only_strings(oracle):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    template = ChatTemplate({"default": TEMPLATES["simple"]}, oracle.special_tokens_map)
    joined = template.render([{"role": "user", "content": "a\nb"}])
    assert template.render([{"role": "user", "content": parts}]) == joined
    ours, expected = both(oracle, TEMPLATES["parts"], [{"role": "user", "content": parts}])
    assert ours == expected == "text:a;text:b;|"


# --- where templates are found ---


def test_places_and_their_precedence(tmp_path):
    def found():
        return ChatTemplate.from_directory(tmp_path, {}).render(CHAT)

    (tmp_path / "chat_template.json").write_text('{"chat_template": "processor"}')
    assert found() == "processor"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "config"}')
    assert found() == "config"
    (tmp_path / "chat_template.jinja").write_text("jinja é")
    assert found() == "jinja é"
    extra = tmp_path / "additional_chat_templates"
    extra.mkdir()
    (extra / "rag.jinja").write_text("rag {{ documents | length }}")
    template = ChatTemplate.from_directory(tmp_path, {})
    assert template.names == ("default", "rag")
    assert template.render(CHAT, name="rag", variables={"documents": [{}, {}]}) == "rag 2"


def test_named_templates_equal_transformers(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools {{ tools | length }}"}]
    directory = write_checkpoint(tmp_path, "byte_level", chat_template=named)
    oracle = AutoTokenizer.from_pretrained(directory)
    ours = ChatTemplate.from_directory(directory, oracle.special_tokens_map)
    for tools in (None, TOOLS):
        assert ours.render(CHAT, tools=tools) == oracle.apply_chat_template(CHAT, tools=tools, tokenize=False)
    with pytest.raises(UnsupportedError, match="no chat template 'other'"):
        ours.render(CHAT, name="other")


def test_no_template_is_an_error_only_when_one_is_needed(tmp_path):
    template = ChatTemplate.from_directory(tmp_path, {})
    assert template.names == ()
    with pytest.raises(UnsupportedError, match="no chat template") as caught:
        template.render(CHAT)
    assert caught.value.remedy


@pytest.mark.parametrize("value", [3, [1], [{"name": "a"}], [{"name": "a", "template": 1}]])
def test_malformed_declarations(tmp_path, value):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template is malformed"):
        ChatTemplate.from_directory(tmp_path, {})


BROKEN = ["{% for %}", "{{ unclosed", "{% nope %}", "{{ x | no_such_filter }}", "{{" + "(" * 5000]


@pytest.mark.parametrize("source", BROKEN, ids=range(len(BROKEN)))
def test_broken_templates(source):
    with pytest.raises(CheckpointError, match="'default' is broken"):
        ChatTemplate({"default": source}, {}).render(CHAT)


# --- messages ---


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ("hello", "messages"),
        ({"role": "user", "content": "x"}, "messages"),
        (None, "messages"),
        ([], "messages"),
        (["hello"], r"messages\[0\]"),
        ([{"content": "x"}], r"messages\[0\]\.role"),
        ([{"role": 3, "content": "x"}], r"messages\[0\]\.role"),
        ([CHAT[0], {"role": "user"}], r"messages\[1\]\.content"),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], r"messages\[0\]\.content\[0\]"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\.content\[0\]"),
        ([{"role": "user", "content": "x", "extra": object()}], r"messages\[0\]"),
        ([{"role": "user", "content": "x", 3: 4}], r"messages\[0\]"),
    ],
)
def test_malformed_messages_are_named(messages, where):
    with pytest.raises(RequestError, match=f"^{where}:") as caught:
        ChatTemplate({"default": SIMPLE}, {}).render(messages)
    assert caught.value.remedy


def test_too_deep_messages():
    deep: list = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(RequestError, match="nested"):
        ChatTemplate({"default": SIMPLE}, {}).render([{"role": "user", "content": "x", "more": deep}])


def test_a_template_refuses_with_its_own_words():
    with pytest.raises(RequestError, match="no odd role, got odd"):
        ChatTemplate({"default": SIMPLE}, {}).render([{"role": "odd", "content": "x"}])


def test_a_template_that_fails_is_the_requests_failure():
    template = ChatTemplate({"default": "{{ messages[0].content + 1 }}{{ nothing.at.all }}"}, {})
    with pytest.raises(RequestError, match="TypeError"):
        template.render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("content", [{}, {"content": None}], ids=["absent", "none"])
def test_absent_content_of_a_tool_call(content):
    """Templates that test for None get None, the others an empty string; transformers 5 would leave the field out."""
    message = {"role": "assistant", "tool_calls": [CALL], **content}
    asks = "{% if messages[0]['content'] is none %}none{% else %}{{ messages[0]['content'] + '' }}{% endif %}"
    assert ChatTemplate({"default": asks}, {}).render([message]) == "none"
    reads = "<{{ messages[0].content.lstrip() + '' }}>{{ 'x' in messages[0].content }}"
    assert ChatTemplate({"default": reads}, {}).render([message]) == "<>False"


def test_messages_are_not_changed():
    messages = json.loads(json.dumps(TOOL_CHAT))
    ChatTemplate({"default": "{{ messages }}"}, {}).render(messages)
    assert messages == TOOL_CHAT


def test_both_endings_exclude_each_other():
    with pytest.raises(RequestError, match="exclude each other"):
        ChatTemplate({"default": SIMPLE}, {}).render(CHAT, continue_final_message=True)


def test_a_template_that_drops_the_message_cannot_continue_it():
    with pytest.raises(RequestError, match="cannot be continued"):
        ChatTemplate({"default": "x"}, {}).render(CHAT, continue_final_message=True, add_generation_prompt=False)


# --- hostile templates ---

HOSTILE = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursive macro": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive loop": "{% for i in range(50000) recursive %}{{ loop(range(50000)) }}{% endfor %}",
    "product": "{{ 'x' * 10**12 }}",
    "list product": "{% set a = [0] * 10**12 %}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "doubling +": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubling ~": "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling ~ in a macro": (
        "{% macro m(s) %}{% for i in range(60) %}{% set s = s ~ s %}{% endfor %}{% endmacro %}"
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = (n.s ~ n.s)|string %}{% endfor %}"
    ),
    "output": "{% set s = 'x' * 10**6 %}{% for i in range(1000) %}{{ s }}{% endfor %}",
    "center": "{{ 'x' | center(10**10) }}",
    "ljust": "{{ 'x'.ljust(10**10) }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "format filter": "{{ '%10000000000d' | format(1) }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__.keys() }}",
    "lambda globals": "{{ strftime_now.__globals__['json'] }}",
    "attr filter": "{{ '' | attr('__class__') }}{{ ('' | attr('__class__')).__mro__ }}",
    "format escape": "{{ '{0.__class__.__mro__}'.format('') }}",
    "namespace": "{% set n = namespace(__class__=1) %}",
    "mutation": "{{ messages.append(1) }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "import": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_hostile_templates_end_soon_in_a_request_error(source):
    start = time.perf_counter()
    with pytest.raises(RequestError):
        ChatTemplate({"default": source}, {}).render(CHAT)
    assert time.perf_counter() - start < 12.0


# --- the real ones ---


@pytest.mark.long
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3"])
def test_published_templates_equal_transformers(name):
    directory = real_tokenizer(name)
    oracle = AutoTokenizer.from_pretrained(directory)
    ours = ChatTemplate.from_directory(directory, oracle.special_tokens_map)
    thinking = [*CHAT, {"role": "assistant", "content": "yes", "reasoning_content": "because"}]
    for messages in (CHAT[1:2], CHAT, CHAT[:3], TOOL_CHAT, TOOL_CHAT[:5], thinking):
        # apply_chat_template drops a content that is None, on which both templates fail: go below it, and give each
        # what it can read.
        chat = messages if name == "deepseek_v3" else [{**m, "content": m["content"] or ""} for m in messages]
        for tools in (None, TOOLS):
            for variables in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
                for generate in (True, False):
                    options = {"tools": tools, "add_generation_prompt": generate}
                    (expected,), _ = render_jinja_template(
                        [chat], chat_template=oracle.chat_template, **options, **oracle.special_tokens_map, **variables
                    )
                    assert ours.render(messages, variables=variables, **options) == expected

    @given(messages=chats)
    @settings(max_examples=200)
    def check(messages):
        assert ours.render(messages) == oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    check()
