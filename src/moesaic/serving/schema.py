"""What clients may send: OpenAI's requests, with the engine's further sampling fields under their own names.

Strict: no text for a number, no unknown field. What OpenAI knows and this server does not do is refused by name, unless
it says what would be done anyway (`NEUTRAL`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, JsonValue, model_validator

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,), "best_of": (None, 1), "echo": (None, False), "function_call": (None,), "functions": (None, []),
    "guided_choice": (None,), "guided_grammar": (None,), "guided_json": (None,), "guided_regex": (None,),
    "metadata": (None, {}), "modalities": (None, ["text"]), "prediction": (None,),
    "service_tier": (None, "auto", "default"), "store": (None, False), "suffix": (None, ""),
    "use_beam_search": (None, False), "verbosity": (None,), "web_search_options": (None,),
}  # fmt: skip
"""Parameters that are not supported, and the values with which they ask for nothing."""

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(max_length=4096)]
Filled = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]




class Fast(FailFast):
    """On lists: the first wrong entry ends the reading. Hashable, which members of a union must be."""

    __hash__ = object.__hash__


FAST = Fast()
MOST_BIASES = 4096
MOST_MESSAGES = 10_000


def asks_nothing(value: Any, neutral: Sequence[Any]) -> bool:
    return any(type(value) is type(each) and value == each for each in neutral)


def few(value: Any) -> Any:
    """An object that is too large by one entry, if it is too large at all: it is refused, and not read."""
    return dict(islice(value.items(), MOST_BIASES + 1)) if isinstance(value, dict) else value


class Strict(BaseModel):
    """The first thing wrong is enough to say: a body of a million wrong things must not make a million errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def one_stranger(cls, value: Any) -> Any:
        """Of unknown fields, only the first is kept, to be refused by name."""
        if not isinstance(value, dict):
            return value
        names = {field.alias or name for name, field in cls.model_fields.items()}
        known = {name: each for name, each in value.items() if name in names}
        strange = (name for name in value if name not in names)
        asking = (name for name in strange if not asks_nothing(value[name], cls.neutral.get(name, ())))
        return known | {name: value[name] for name in islice(asking, 1)}


class StreamOptions(Strict):
    include_usage: bool = False


class JSONSchema(Strict):
    name: Text = "answer"
    description: Text | None = None
    schema_: dict[str, JsonValue] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]


class JSONFormat(Strict):
    type: Literal["json_object"]


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JSONSchema


ResponseFormat = Annotated[TextFormat | JSONFormat | SchemaFormat, Field(discriminator="type")]


class Sampling(Strict):
    """What both kinds of completion have in common. None is: as the checkpoint recommends."""

    neutral = NEUTRAL
    model: Text
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], FAST, Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
                  BeforeValidator(few), Field(max_length=MOST_BIASES)] | None
    ) = None  # fmt: skip
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = Field(default=None, description="Only written to the log.")
    response_format: ResponseFormat | None = None
    regex: Filled | None = None
    choice: Annotated[list[Filled], FAST, Field(min_length=1, max_length=1024)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: Annotated[list[TokenId], FAST, Field(max_length=64)] | None = None
    include_stop: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None


class CompletionRequest(Sampling):
    prompt: (
        str | Annotated[list[TokenId], FAST, Field(min_length=1)]
        | Annotated[list[str], FAST, Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], FAST, Field(min_length=1)]], FAST, Field(min_length=1)]
    )  # fmt: skip
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    name: Text
    arguments: str


class ToolCall(Strict):
    id: Text | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], FAST] | None = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], FAST] | None = None
    tool_call_id: Text | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[JsonValue], FAST, Field(max_length=0)] | None = None


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.\-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: Text


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Sampling):
    messages: Annotated[list[Message], FAST, Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], FAST, Field(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    chat_template_kwargs: dict[str, JsonValue] | None = None


class TokenizeRequest(Strict):
    """Text, or a conversation as the chat template writes it."""

    model: Text | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], FAST, Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Strict):
    model: Text | None = None
    tokens: Annotated[list[TokenId], FAST]
    skip_special_tokens: bool = False
