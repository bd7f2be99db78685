"""What may be asked through OpenAI's interface: two kinds of requests, read and checked.

Clients send more than they want: every field may be null or say what OpenAI and vLLM do by default. That is taken, and
so is what changes nothing about a greedy answer. What would change the answer and cannot be done is refused by name.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from erlib.serving import wire
from erlib.serving.http_front import Refused

MOST_PROMPTS = 64
"""Of one request."""

_WITHOUT_EFFECT = {
    "early_stopping", "parallel_tool_calls", "include_reasoning",
    "user", "safety_identifier", "metadata", "store", "request_id", "cache_salt", "prompt_cache_key",
    "prompt_cache_retention", "prediction", "service_tier", "priority",
}  # fmt: skip
"""Fields of OpenAI's and vLLM's interfaces that change nothing about these experts' answers, whatever they say."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "use_beam_search": (False,), "beam_width": (1,),
    "echo": (False,), "suffix": ("",), "logprobs": (False, 0), "top_logprobs": (0,), "prompt_logprobs": (0,),
    "stop": ([], ""), "stop_token_ids": ([],), "include_stop_str_in_output": (False,), "bad_words": ([],),
    "logit_bias": ({},), "allowed_token_ids": ([],), "logits_processors": ([],),
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,),
    "response_format": ({"type": "text"},), "structured_outputs": ({},), "verbosity": ("medium",),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "reasoning_effort": ("none",), "modalities": (["text"],), "audio": (), "web_search_options": (), "documents": ([],),
    "add_special_tokens": (True, False), "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,), "continue_final_message": (False,), "chat_template": (),
    "chat_template_kwargs": ({},), "mm_processor_kwargs": ({},), "truncate_prompt_tokens": (),
    "return_token_ids": (False,), "return_tokens_as_token_ids": (False,), "vllm_xargs": ({},),
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "kv_transfer_params": (),
}  # fmt: skip
"""Fields of OpenAI's and vLLM's interfaces that cannot be done, and what they may say beside null."""


def _refusal(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: str
    content: str | None = None
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None

    @field_validator("content", mode="before")
    @classmethod
    def _join(cls, content: Any) -> Any:
        """Parts of text as one."""
        if not isinstance(content, list):
            return content
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else part
            if kind != "text":
                raise _refusal("messages", f"messages hold text only, not {kind}")
            if not isinstance(part.get("text"), str):
                raise _refusal("messages", "a message's part of the type 'text' needs a text")
            texts.append(part["text"])
        return "".join(texts)

    @model_validator(mode="after")
    def _says_text(self) -> _Message:
        if self.tool_calls or self.function_call or self.audio:
            raise _refusal("messages", "messages hold text only, no calls and no audio")
        if self.content is None and self.role != "assistant":
            raise _refusal("messages", f"a message of the role {self.role!r} needs a content")
        return self


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Request(BaseModel):
    """What both kinds of request have in common."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: str
    max_tokens: int | None = Field(None, ge=1, le=wire.MAX_TOKENS)
    stream: bool = False
    stream_options: _StreamOptions | None = None
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, description="only as load generators send it: equal to max_tokens")
    # numbers that change nothing about greedy answers
    temperature: float | None = None
    top_p: float | None = None
    min_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    length_penalty: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _asks_for_nothing_else(cls, body: Any) -> Any:
        """Leave out what says nothing, and refuse what cannot be done."""
        if not isinstance(body, dict):
            return body
        kept = {}
        for name, value in body.items():
            if value is None or name in _WITHOUT_EFFECT:
                continue
            if name in cls.model_fields:
                kept[name] = value
            elif name not in _NEUTRAL:
                raise _refusal(name[:100], f"{name[:100]}: no field of this name is known here; leave it out")
            elif value not in _NEUTRAL[name]:
                neutral = " or ".join(map(json.dumps, (*_NEUTRAL[name], None)))
                raise _refusal(name, f"{name}: {json.dumps(value)[:100]} cannot be done here, only {neutral}")
        return kept

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer; None: what the context leaves."""
        return self.max_tokens

    @property
    def is_forced(self) -> bool:
        """Whether no token ends the answer before its length."""
        if self.min_tokens and self.min_tokens != self.limit:
            raise Refused("min_tokens is taken only if it equals max_tokens", param="min_tokens")
        return self.ignore_eos or self.min_tokens > 0

    @property
    def includes_usage(self) -> bool:
        """Whether a stream is to end with it."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def texts(self) -> list[str]:
        """Prompts as the experts read them; each gets an answer."""
        raise NotImplementedError

    @classmethod
    def read(cls, body: bytes) -> Self:
        """Read a request.

        Raises
        ------
        Refused
        """
        try:
            asked = cls.model_validate_json(body)
        except ValidationError as error:
            raise _why(error) from None
        n, most = len(asked.texts), 1 if asked.stream else MOST_PROMPTS
        if not 1 <= n <= most:
            kind = "stream" if asked.stream else "request"
            raise Refused(f"a {kind} takes 1 to {most} prompts, not {n}", param="prompt")
        if not all(text.strip() for text in asked.texts):
            raise Refused("the prompt is empty", param="prompt")
        return asked


class Completion(_Request):
    prompt: str | list[str]

    @field_validator("prompt", mode="before")
    @classmethod
    def _is_text(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and not all(isinstance(one, str) for one in prompt):
            raise _refusal("prompt", "prompt: only text is taken, no token ids")
        return prompt

    @property
    def texts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class Chat(_Request):
    messages: Annotated[list[_Message], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=wire.MAX_TOKENS)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def text(self) -> str:
        lines = [f"{message.role}: {message.content or ''}" for message in self.messages]
        return "\n".join([*lines, "assistant:"])

    @property
    def texts(self) -> list[str]:
        return [self.text]


def _why(error: ValidationError) -> Refused:
    """What is wrong with a request, and the first field of which something is."""
    found = error.errors(include_url=False, include_input=False)
    lines = [
        one["msg"] if one["type"] == "refused" else f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg']}"
        for one in found
    ]
    param = found[0].get("ctx", {}).get("param") or ".".join(map(str, found[0]["loc"][:1]))
    return Refused("; ".join(lines), param=param or None)
