"""Chats rendered as transformers renders them, and the errors of chats that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from slipstream.runtime.text.tokenizer import Tokenizer
from slipstream.sdk.errors import InvalidRequest
from slipstream.tests.text.tiny_tokenizers import byte_level

CHATML = """{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
<|im_start|>system
You are helpful.<|im_end|>
    {% endif %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

LLAMA_3 = """{{- bos_token }}
{%- if custom_date is defined %}{% set date = custom_date %}
{%- elif strftime_now is defined %}{% set date = strftime_now("%d %b") %}
{%- else %}{% set date = "26 Jul" %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' + (tool_call.arguments | tojson) + "}" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{% endfor %}"""

QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=messages|length - 1, multi=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi and message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.multi = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
    {%- if index > 100 %}{%- break %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {% generation %}
        {%- set content = message.content or '' %}
        {%- if loop.index0 > ns.last_query and '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' + content }}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + (tool_call.function | tojson) + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
        {% endgeneration %}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

TEMPLATES = {"chatml": CHATML, "llama 3": LLAMA_3, "mistral": MISTRAL, "qwen": QWEN}

Chat = list[dict[str, Any]]

TALK: Chat = [
    {"role": "user", "content": "  What is <b>2 & 2</b>?\n"},
    {"role": "assistant", "content": "<think>hm</think>\n\n4 — vier 你好"},
    {"role": "user", "content": "Sure?"},
]
SYSTEM: Chat = [{"role": "system", "content": "Be brief. "}, *TALK]
TOOLS: Chat = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The weather <here> & "there", größer',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
TOOL_TALK: Chat = [
    {"role": "user", "content": "Weather in Köln?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}],
    },
    {"role": "tool", "content": '{"sky": "grey"}'},
]


def make(directory: Path, config: dict[str, Any]) -> Tokenizer:
    byte_level().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"} | config))
    return Tokenizer.from_directory(directory, strftime_now=lambda layout: f"formatted {layout}")


def theirs(template: str | dict[str, str]) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>", chat_template=template
    )


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize(
    ("family", "chat", "tools", "extra"),
    [
        ("chatml", TALK, None, {}),
        ("chatml", SYSTEM, None, {}),
        ("llama 3", TALK, None, {"custom_date": "1 May"}),
        ("llama 3", SYSTEM, None, {"custom_date": "1 May"}),
        ("llama 3", SYSTEM, TOOLS, {"custom_date": "1 May"}),
        ("llama 3", TOOL_TALK[:2], TOOLS, {"custom_date": "1 May"}),
        ("mistral", TALK, None, {}),
        ("qwen", TALK, None, {}),
        ("qwen", SYSTEM, None, {"enable_thinking": False}),
        ("qwen", SYSTEM, TOOLS, {}),
        ("qwen", TOOL_TALK, TOOLS, {"enable_thinking": True}),
    ],
)
def test_rendering_equals_transformers(
    tmp_path: Path, family: str, chat: Chat, tools: Chat | None, extra: dict[str, Any], generation: bool
) -> None:
    tokenizer = make(tmp_path, {"chat_template": TEMPLATES[family]})
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=generation, tools=tools, **extra)
    expected = theirs(TEMPLATES[family]).apply_chat_template(
        chat, tools=tools, add_generation_prompt=generation, tokenize=False, **extra
    )
    assert rendered == expected


def test_named_templates_are_chosen_as_transformers_does(tmp_path: Path) -> None:
    named = {"default": CHATML, "tool_use": QWEN}
    tokenizer = make(tmp_path, {"chat_template": [{"name": k, "template": v} for k, v in named.items()]})
    for tools in (None, TOOLS):
        expected = theirs(named).apply_chat_template(TALK, tools=tools, add_generation_prompt=True, tokenize=False)
        assert tokenizer.apply_chat_template(TALK, tools=tools) == expected


def test_only_a_tool_template(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, {"chat_template": [{"name": "tool_use", "template": QWEN}]})
    with pytest.raises(InvalidRequest, match=r"only: tool_use"):
        tokenizer.apply_chat_template(TALK)


def test_where_templates_are_found(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert make(tmp_path, {}).apply_chat_template(TALK) == "json"
    assert make(tmp_path, {"chat_template": "config"}).apply_chat_template(TALK) == "config"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert make(tmp_path, {"chat_template": "config"}).apply_chat_template(TALK) == "file"


def test_the_date_is_an_argument(tmp_path: Path) -> None:
    assert "Today Date: formatted %d %b" in make(tmp_path, {"chat_template": LLAMA_3}).apply_chat_template(TALK)
    assert "Today Date: 26 Jul" in Tokenizer.from_directory(tmp_path).apply_chat_template(TALK)


def test_text_parts_are_joined(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, {"chat_template": CHATML})
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    in_parts = tokenizer.apply_chat_template([{"role": "user", "content": parts}])
    assert in_parts == tokenizer.apply_chat_template([{"role": "user", "content": "one\ntwo"}])


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("hello", "must be a list"),
        ({"role": "user", "content": "x"}, "must be a list"),
        ([], "at least one"),
        (["hello"], "message 0 must be {role, content}"),
        ([{"content": "x"}], "message 0 must be {role, content}"),
        ([{"role": 3, "content": "x"}], "message 0 must be {role, content}"),
        ([{"role": "user"}], "message 0 has no content"),
        ([{"role": "user", "content": 3}], "content must be a string or a list"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "type 'image_url' are not supported"),
        ([{"role": "user", "content": ["x"]}], "each part must be"),
        ([{"role": "user", "content": "x", "extra": object()}], "object is not JSON data"),
        ([{"role": "assistant", "content": "x"}], "refuses them: Conversation roles must alternate"),
        ([{"role": "user", "content": None}], "failed on them: TypeError"),
    ],
)
def test_bad_messages_are_refused(tmp_path: Path, messages: Any, problem: str) -> None:
    tokenizer = make(tmp_path, {"chat_template": MISTRAL})
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.apply_chat_template(messages)
    assert caught.value.field == "messages"
    assert problem in str(caught.value)


def test_bad_tools_and_variables_are_refused(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, {"chat_template": QWEN})
    for tools in ("weather", [print]):
        with pytest.raises(InvalidRequest, match=r"^tools: "):
            tokenizer.apply_chat_template(TALK, tools=tools)  # type: ignore[arg-type]
    for extra in ({"chat_template": "x"}, {"helper": print}):
        with pytest.raises(InvalidRequest, match=r"^chat_template_kwargs: "):
            tokenizer.apply_chat_template(TALK, **extra)


def test_templates_run_in_a_sandbox(tmp_path: Path) -> None:
    for template in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}"):
        tokenizer = make(tmp_path, {"chat_template": template})
        with pytest.raises(InvalidRequest, match="refuses them"):
            tokenizer.apply_chat_template(TALK)


def test_a_model_without_templates_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        make(tmp_path, {}).apply_chat_template(TALK)
