"""OpenAI's interface to the router, driven by OpenAI's own client through NGINX, gateways and real engines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time

import aiohttp
import httpx
import openai
import pytest
from aiohttp import web
from conftest import BASE_PORT
from standin_expert import eventually, setting
from tokenizers import Tokenizer, models

from erlib import openai_api, processes, wire

PROMPT = "The goalie stopped thirty shots and the team went home with two points"
PORT = BASE_PORT + 450
URL = f"http://127.0.0.1:{PORT}"


@pytest.fixture(scope="module")
def client(expert_router, tokenizer, tmp_path_factory):
    log = tmp_path_factory.mktemp("front") / "openai.log"
    command = processes.python("-m", "erlib.openai_api", "--port", str(PORT), "--tokenizer", tokenizer)
    front = processes.spawn([*command, "--router", expert_router.targets[0]], log)
    processes.wait_until(lambda: processes.listening(PORT), front, "front", log, 60)
    with openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as connected:
        yield connected
    processes.stop([front])


@pytest.fixture
def nobody(tokenizer, tmp_path):
    """A front whose router is not there."""
    log = tmp_path / "openai.log"
    command = processes.python("-m", "erlib.openai_api", "--port", str(PORT + 1), "--tokenizer", tokenizer)
    front = processes.spawn([*command, "--router", f"127.0.0.1:{PORT + 2}"], log)
    processes.wait_until(lambda: processes.listening(PORT + 1), front, "front", log, 60)
    yield f"http://127.0.0.1:{PORT + 1}/v1"
    processes.stop([front])


def forced(**arguments):
    return {"model": "expert-router", "extra_body": {"ignore_eos": True}} | arguments


def test_a_stream_has_an_event_per_token_and_adds_up_to_the_whole_answer(client, tokenizer):
    events = list(
        client.completions.create(
            **forced(prompt=PROMPT, max_tokens=20, stream=True, stream_options={"include_usage": True})
        )
    )
    *tokens, last, usage = [event for event in events if event.choices or event.usage]
    assert len(tokens) in (20, 21)  # the bytes of a character that was cut come as one more
    assert last.choices[0].finish_reason == "length"
    assert usage.usage.completion_tokens == 20
    assert usage.usage.prompt_tokens == len(Tokenizer.from_file(str(tokenizer)).encode(PROMPT).ids)
    whole = client.completions.create(**forced(prompt=PROMPT, max_tokens=20))
    assert whole.choices[0].text == "".join(event.choices[0].text for event in tokens)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage == usage.usage


def test_the_answer_is_that_of_the_router(client, expert_router):
    from test_stack import answer

    text = b"".join(response.text for response in answer(expert_router.targets[0], PROMPT, 12))
    whole = client.completions.create(**forced(prompt=[PROMPT], max_tokens=12))
    assert whole.choices[0].text == text.decode("utf-8", "replace")


def test_a_chat_is_written_out(client):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": PROMPT}]},
    ]
    said = client.chat.completions.create(**forced(messages=messages, max_completion_tokens=7))
    assert said.choices[0].message.role == "assistant"
    assert said.usage.completion_tokens == 7
    plain = f"system: Be brief.\nuser: {PROMPT}\nassistant:"
    assert said.choices[0].message.content == (
        client.completions.create(**forced(prompt=plain, max_tokens=7)).choices[0].text
    )
    pieces = client.chat.completions.create(**forced(messages=messages, max_tokens=7, stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in pieces) == said.choices[0].message.content


def test_models(client):
    assert [model.id for model in client.models.list()] == ["expert-router"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "gpt-4"}, "model"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": [PROMPT, PROMPT]}, "one prompt per request, not 2"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 2}, "n:"),
        ({"stop": ["\n"]}, "stop:"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"extra_body": {"min_tokens": 3}}, "min_tokens is taken only if it equals max_tokens"),
    ],
)
def test_what_cannot_be_done_is_refused(client, changed, message):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(**forced(prompt=PROMPT, max_tokens=5) | changed)
    assert message in str(refusal.value)


def test_what_is_no_request_is_refused(client):
    assert httpx.post(f"{URL}/v1/completions", content=b"{").status_code == 400
    assert httpx.post(f"{URL}/v1/completions", content=b"\xff").status_code == 400
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(openai.BadRequestError, match="messages hold text only, not image_url"):
        client.chat.completions.create(**forced(messages=image))


def test_an_engines_refusal_is_an_error_with_a_status(client):
    with pytest.raises(openai.APIStatusError, match="exceed the 512"):
        client.completions.create(**forced(prompt=PROMPT, max_tokens=5000, stream=True))


def test_without_a_router_nothing_hangs(nobody):
    began = time.monotonic()
    with (
        openai.OpenAI(base_url=nobody, api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIStatusError) as error,
    ):
        client.completions.create(model="expert-router", prompt=PROMPT)
    assert error.value.status_code == 503
    assert time.monotonic() - began < 30


# --- in front of experts that misbehave on command -------------------------------------------------------------


@contextlib.asynccontextmanager
async def before_standin():
    """A session with a front, behind it a gateway, behind that a stand-in."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    async with setting(1) as (door, (expert,)):
        runner = web.AppRunner(openai_api.Front(door.url, tokenizer).application(), handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        async with aiohttp.ClientSession(site.name) as session:
            yield session, expert, door
        await runner.cleanup()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("orders", ["first=60", "n=9999 gap=0.01"])
def test_a_client_that_leaves_is_noticed_by_the_expert(orders, stream):
    async def run() -> float:
        async with before_standin() as (session, expert, _):
            body = {"model": "expert-router", "prompt": f"0 {orders}", "stream": stream}
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5), session.post("/v1/completions", json=body) as reply:
                    await reply.read()
            left_s = time.monotonic()
            await eventually(lambda: bool(expert.requests[0].end))
            assert expert.requests[0].end == "cancelled"
            return expert.requests[0].t_end_s - left_s

    assert asyncio.run(run()) < 0.2


def test_every_error_is_openais():
    """Whoever finds it, and with the field `param`, which is part of it."""

    async def run() -> list[tuple[int, dict]]:
        async with before_standin() as (session, _, _):
            good = {"model": "expert-router", "prompt": "0"}
            huge = b" " * (3 * wire.MAX_PROMPT_BYTES)
            replies = [
                await session.post("/v1/completion", json=good),
                await session.get("/v1/completions"),
                await session.post("/v1/completions", data=huge),
                await session.post("/v1/completions", json=good | {"n": 2}),
                await session.post("/v1/completions", json=good | {"prompt": "0 fail_after=0 code=INTERNAL"}),
                await session.post("/v1/completions", json=good | {"prompt": "0 " + "x" * 600_000}),
                await session.post("/v1/completions", json=good | {"prompt": "0 error=queue-full"}),
            ]
            return [(reply.status, await reply.json()) for reply in replies]

    seen = asyncio.run(run())
    assert [status for status, _ in seen] == [404, 405, 413, 400, 502, 429, 502]
    for status, body in seen:
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["message"]
        assert body["error"]["type"] == ("invalid_request_error" if status < 500 else "server_error")


def test_an_expert_that_dies_on_the_way_ends_the_stream_with_an_error():
    async def run() -> list[str]:
        async with before_standin() as (session, _, _):
            body = {"model": "expert-router", "prompt": "0 n=9 fail_after=2", "stream": True}
            async with session.post("/v1/completions", json=body) as reply:
                return [line.decode().removeprefix("data: ").strip() async for line in reply.content if line.strip()]

    *tokens, error, last = asyncio.run(run())
    assert [json.loads(one)["choices"][0]["text"] for one in tokens] == ["tt"] * 2
    assert "expert 0 failed" in json.loads(error)["error"]["message"]
    assert last == "[DONE]"


def test_health_is_that_of_the_router():
    async def run() -> list[int]:
        async with before_standin() as (session, _, door):
            up = (await session.get("/health")).status
            for one in door.gateway.experts:
                for replica in one.replicas:
                    replica.is_up = False
            return [up, (await session.get("/health")).status]

    assert asyncio.run(run()) == [200, 503]


def test_a_client_that_leaves_frees_its_slot(client, expert_router):
    """An answer of 480 tokens is cut off by the client; the engines stop counting long before its end."""

    def counted() -> int:
        return round(expert_router.counters()["expert_generated_tokens"])

    before = counted()
    body = {"model": "expert-router", "prompt": PROMPT, "max_tokens": 480, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{URL}/v1/completions", json=body) as reply:
        for line in reply.iter_lines():
            if line:
                assert json.loads(line.removeprefix("data: "))["choices"]
                break
    time.sleep(0.5)
    settled = counted()
    time.sleep(0.5)
    assert counted() == settled
    assert settled - before < 480
