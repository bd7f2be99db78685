"""OpenAI's interface to the router, driven by OpenAI's own client through NGINX, gateways and real engines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import shlex
import socket
import time

import aiohttp
import httpx
import openai
import pytest
from tokenizers import AddedToken, Tokenizer, models
from tritonclient.grpc import service_pb2 as pb

from erlib.machine import processes
from erlib.serving import http_front, openai_api, wire
from tests.support.ports import BASE_PORT
from tests.support.standin_expert import eventually, response, setting

PROMPT = "The goalie stopped thirty shots and the team went home with two points"
PORT = BASE_PORT + 450
URL = f"http://127.0.0.1:{PORT}"


def start_front(port, router, tokenizer, log, *arguments, limit=""):
    """A front as a process, with the shell's `limit`s."""
    command = processes.python("-m", "erlib.serving.openai_api", "--port", str(port), "--tokenizer", tokenizer)
    words = shlex.join(map(str, [*command, "--router", router, *arguments]))
    front = processes.spawn(["bash", "-c", f"{limit} exec {words}"], log)
    processes.wait_until(lambda: processes.listening(port), front, "front", log, 60)
    return front


@pytest.fixture(scope="module")
def client(expert_router, tokenizer, tmp_path_factory):
    front = start_front(PORT, expert_router.targets[0], tokenizer, tmp_path_factory.mktemp("front") / "openai.log")
    with openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as connected:
        yield connected
    processes.stop([front])


@pytest.fixture
def nobody(tokenizer, tmp_path):
    """A front whose router is not there."""
    front = start_front(PORT + 1, f"127.0.0.1:{PORT + 2}", tokenizer, tmp_path / "openai.log")
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
    *tokens, usage = events
    assert [event.choices[0].finish_reason for event in tokens] == [None] * 19 + ["length"]
    assert usage.choices == []
    assert usage.usage.completion_tokens == 20
    assert usage.usage.prompt_tokens == len(Tokenizer.from_file(str(tokenizer)).encode(PROMPT).ids)
    whole = client.completions.create(**forced(prompt=PROMPT, max_tokens=20))
    assert whole.choices[0].text == "".join(event.choices[0].text for event in tokens)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage == usage.usage


def test_the_answer_is_that_of_the_router(client, expert_router):
    from tests.support.stacks import answer

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
    pieces = [
        one.choices[0] for one in client.chat.completions.create(**forced(messages=messages, max_tokens=7, stream=True))
    ]
    assert "".join(piece.delta.content for piece in pieces) == said.choices[0].message.content
    assert [piece.delta.role for piece in pieces] == ["assistant"] + [None] * 6
    assert [piece.finish_reason for piece in pieces] == [None] * 6 + ["length"]


def test_models(client):
    assert [model.id for model in client.models.list()] == ["expert-router"]
    assert client.models.retrieve("expert-router") == client.models.list().data[0]
    for name in ("gpt-4", "org/model"):
        with pytest.raises(openai.NotFoundError) as error:
            client.models.retrieve(name)
        assert error.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="gpt-4", prompt=PROMPT)
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_several_prompts_get_a_choice_each(client):
    prompts = [PROMPT, "How fast is the new graphics card?", "The senate voted on taxes"]
    several = client.completions.create(**forced(prompt=prompts, max_tokens=6))
    alone = [client.completions.create(**forced(prompt=prompt, max_tokens=6)) for prompt in prompts]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert [choice.text for choice in several.choices] == [one.choices[0].text for one in alone]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(several.usage, name) == sum(getattr(one.usage, name) for one in alone)


def test_an_answer_without_a_length_has_what_the_prompt_leaves_of_the_context(client):
    long = "word " * 495
    text = client.completions.create(**forced(prompt=long))
    assert text.usage.total_tokens == 512
    assert text.choices[0].finish_reason == "length"
    chat = client.chat.completions.create(**forced(messages=[{"role": "user", "content": long}], max_tokens=None))
    assert chat.usage.total_tokens == 512


@pytest.mark.parametrize(
    "asked", [{"max_tokens": 5000}, {"max_tokens": 5, "prompt": "word " * 600}, {"prompt": "word " * 600}]
)
@pytest.mark.parametrize("stream", [True, False])
def test_what_exceeds_the_context_is_the_clients_mistake(client, asked, stream):
    with pytest.raises(openai.BadRequestError, match="512") as error:
        client.completions.create(**forced(prompt=PROMPT, stream=stream) | asked)
    assert error.value.code == "context_length_exceeded"


@pytest.mark.parametrize("max_tokens", [5, None])
def test_a_prompt_that_is_far_too_long_costs_nobody_time(client, max_tokens):
    """One word of 500,000 letters takes seconds to tokenise."""
    with pytest.raises(openai.BadRequestError, match="512") as error:
        client.completions.create(**forced(prompt="a" * 500_000, max_tokens=max_tokens))
    assert error.value.code == "context_length_exceeded"


def test_a_prompt_beyond_what_a_gateway_takes_is_too_large(client):
    """However much beyond: neither is one for which to try again, as 429 would say."""
    for n in (600_000, 5_000_000, 9_000_000):
        reply = httpx.post(f"{URL}/v1/completions", json=forced(prompt="word " * (n // 5), max_tokens=5), timeout=60)
        assert reply.status_code in (400, 413)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": [PROMPT, ""]}, "the prompt is empty"),
        ({"prompt": []}, "takes 1 to 64 prompts, not 0"),
        ({"prompt": [PROMPT] * 65}, "takes 1 to 64 prompts, not 65"),
        ({"prompt": [PROMPT, PROMPT], "stream": True}, "a stream takes 1 to 1 prompts, not 2"),
        ({"prompt": [1, 2]}, "only text is taken, no token ids"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"n": 2}, "n: 2 cannot be done here, only 1 or null"),
        ({"stop": ["\n"]}, "stop:"),
        ({"logprobs": 1}, "logprobs"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"temperature": "hot"}, "temperature"),
        ({"extra_body": {"repetition_penalty": 1.1}}, "repetition_penalty"),
        ({"extra_body": {"tpyo": 1}}, "tpyo: no field of this name"),
        ({"extra_body": {"min_tokens": 3}}, "min_tokens is taken only if it equals max_tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client, changed, message):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(**forced(prompt=PROMPT, max_tokens=5) | changed)
    assert message in str(refusal.value)
    (name, *_) = changed.get("extra_body", changed)
    assert refusal.value.param == name


def test_a_chat_holds_text_only(client):
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(openai.BadRequestError, match="messages hold text only, not image_url"):
        client.chat.completions.create(**forced(messages=image))
    said = [{"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}]
    with pytest.raises(openai.BadRequestError, match="messages hold text only"):
        client.chat.completions.create(**forced(messages=said))


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


END = 1
"""The end of sequence of the tokenizer below."""


@contextlib.asynccontextmanager
async def before_standin(end_id=END, **served):
    """A session with a front, behind it a gateway, behind that a stand-in."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.add_special_tokens([AddedToken("[END]", special=True)])
    async with setting(1, route=lambda _: (0, (1, 2, 3))) as (door, (expert,)):
        front = openai_api.Front(door.url, tokenizer, end_id).application(**served)
        async with (
            http_front.listening(front, "127.0.0.1", 0) as port,
            aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session,
        ):
            yield session, expert, door


def body(**arguments):
    return {"model": "expert-router", "prompt": "0"} | arguments


async def events(session, path="/v1/completions", **arguments):
    """Of a stream."""
    async with session.post(path, json=body(stream=True, **arguments)) as reply:
        lines = [line.decode().strip() async for line in reply.content]
    assert lines[-2] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2] if line]


def says(*tokens):
    """What makes a stand-in answer with these tokens (text, id), whatever it is asked."""
    return lambda _: [response(text, number) for text, number in tokens]


@pytest.mark.parametrize(
    ("asked", "end_id", "tokens", "finish"),
    [
        ({"max_tokens": 9}, END, 3, "stop"),
        ({"max_tokens": 3}, END, 3, "stop"),  # the last token that it may have
        ({"max_tokens": 2}, END, 2, "length"),
        ({"max_tokens": 3, "ignore_eos": True}, END, 3, "length"),
        ({"max_tokens": 5, "min_tokens": 5}, END, 4, "length"),  # the expert stops before that
        ({"max_tokens": 9}, None, 3, "stop"),
        ({"max_tokens": 2}, None, 2, "length"),
        ({"max_tokens": 9}, 5, 4, "length"),
    ],
)
def test_why_an_answer_ends_is_the_truth(asked, end_id, tokens, finish):
    async def run():
        async with before_standin(end_id) as (session, expert, _):
            expert.answer = says((b"a", 4), (b"b", 6), (b"", END), (b"c", 7))
            whole = await (await session.post("/v1/completions", json=body(**asked))).json()
            return whole, await events(session, **asked, stream_options={"include_usage": True})

    whole, (*seen, usage) = asyncio.run(run())
    assert whole["choices"][0]["finish_reason"] == finish
    assert whole["usage"]["completion_tokens"] == usage["usage"]["completion_tokens"] == tokens
    finishes = [one["choices"][0]["finish_reason"] for one in seen]
    assert finishes == [None] * (len(seen) - 1) + [finish]
    if not asked.get("min_tokens") and end_id != 5:
        assert len(seen) == tokens


def test_a_character_cut_between_tokens_comes_with_the_last_of_them():
    """And what remains of one that was never completed, with the answer's last token."""
    lion = "🦁".encode()

    async def run():
        async with before_standin() as (session, expert, _):
            expert.answer = says((lion[:1], 3), (lion[1:], 4), (b"!", 5), (lion[:2], 6))
            return await events(session, max_tokens=4)

    assert [one["choices"][0]["text"] for one in asyncio.run(run())] == ["", "🦁", "!", "\N{REPLACEMENT CHARACTER}"]


def test_what_a_request_does_not_limit_the_context_does():
    """As many tokens are asked for as the prompt leaves; where nobody says how many that are, 256."""

    def asked_for(message):
        request = pb.ModelInferRequest.FromString(message)
        position = [tensor.name for tensor in request.inputs].index("max_tokens")
        return int.from_bytes(request.raw_input_contents[position], "little")

    async def run(context_tokens):
        async with before_standin() as (session, expert, _):
            expert.context_tokens = context_tokens
            await session.post("/v1/completions", json=body())
            long = await session.post("/v1/completions", json=body(prompt="0" * 20_000))
            chat = {
                "model": "expert-router",
                "messages": [{"role": "user", "content": "0"}],
                "max_completion_tokens": 7,
            }
            await session.post("/v1/chat/completions", json=chat)
            return [asked_for(seen.message) for seen in expert.requests], (await long.json()).get("error", {}).get(
                "code"
            )

    assert asyncio.run(run(None)) == ([256, 256, 7], None)
    assert asyncio.run(run(100)) == ([99, 7], "context_length_exceeded")
    assert asyncio.run(run(1)) == ([7], "context_length_exceeded")


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
        async with before_standin() as (session, expert, _):
            huge = b" " * (3 * wire.MAX_PROMPT_BYTES)
            prompts = [
                "0 fail_after=0 code=INTERNAL",
                "0 fail_after=0 code=INVALID_ARGUMENT",
                "0 fail_after=0 code=DEADLINE_EXCEEDED",
                "0 fail_after=0 code=UNAVAILABLE",
                "0 " + "x" * 600_000,
                "0 error=queue-full",
                "0 n=0",
            ]
            replies = [
                await session.post("/v1/completion", json=body()),
                await session.get("/v1/completions"),
                await session.request("BREW", "/v1/models"),
                await session.options("/v1/completions"),
                await session.get("/v1/models/a%ffb"),
                await session.post("/v1/completions", data=huge),
                await session.post("/v1/completions", json=body(n=2)),
                *[await session.post("/v1/completions", json=body(prompt=prompt)) for prompt in prompts],
            ]
            expert.answer = lambda _: [b"\xff\xff\xff"]  # no message
            replies.append(await session.post("/v1/completions", json=body()))
            return [(reply.status, await reply.json()) for reply in replies]

    seen = asyncio.run(run())
    assert [status for status, _ in seen] == [
        404, 405, 400, 405, 404, 413, 400,
        502, 400, 504, 503, 413, 502, 502,
        500,
    ]  # fmt: skip
    for status, said in seen:
        assert set(said["error"]) == {"message", "type", "param", "code"}
        assert said["error"]["message"]
        assert said["error"]["type"] == ("invalid_request_error" if status < 500 else "server_error")
        assert said["error"]["code"] is None or isinstance(said["error"]["code"], str)


MESSAGE = {"role": "user", "content": "0"}
NO_REQUESTS = [
    b"", b"{", b"null", b"[]", b"\xff", b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b"[" * 100_000, b'{"a":' * 100_000,
    b'{"model": "expert-router", "prompt": "0", "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"model": "expert-router", "prompt": "0", "max_tokens": 1e18}',
    b'{"model": "expert-router", "prompt": "0", "max_tokens": 1e400}',
    b'{"model": "expert-router", "prompt": "0", "temperature": NaN}',
    b'{"model": "expert-router", "prompt": "0", "temperature": -Infinity}',
    b'{"model": "expert-router", "prompt": "\\ud800"}',
    b'{"model": "expert-router", "prompt": "0", "prompt": 5}',
    b'{"prompt": "0"}',
    *[json.dumps(body(**one)).encode() for one in (
        {"prompt": None}, {"prompt": 5}, {"prompt": {}}, {"prompt": [None]}, {"prompt": [["0"]]}, {"model": 5},
        {"max_tokens": -1}, {"max_tokens": 1.5}, {"max_tokens": 2**31}, {"max_tokens": "many"}, {"stream": "maybe"},
        {"stream_options": 5}, {"min_tokens": -1}, {"top_k": "x"}, {"messages": []}, {"x" * 1000: 1},
    )],
]  # fmt: skip
NO_CHATS = [
    json.dumps({"model": "expert-router", "messages": messages}).encode()
    for messages in (
        None, [], {}, "0", [1] * 100_000, [None], [{}], [{"role": "user"}], [{"content": "0"}],
        [MESSAGE | {"content": None}], [MESSAGE | {"content": 5}], [MESSAGE | {"content": [1] * 100_000}],
        [MESSAGE | {"content": [{"type": "text"}]}], [MESSAGE | {"content": [{"type": "text", "text": None}]}],
        [MESSAGE | {"content": [{"type": "text", "text": 5}]}], [MESSAGE | {"content": [{}]}],
        [MESSAGE | {"content": [{"type": ["text"], "text": "0"}]}], [MESSAGE | {"role": 5}],
        [MESSAGE | {"role": "assistant", "content": None, "tool_calls": [{}]}], [MESSAGE | {"audio": {"id": "a"}}],
    )
]  # fmt: skip


def test_whatever_is_no_request_is_refused_in_one_line():
    async def run():
        async with before_standin() as (session, expert, _):
            head = {"Content-Type": "application/json"}
            asked = [("/v1/completions", one) for one in NO_REQUESTS] + [
                ("/v1/chat/completions", one) for one in NO_CHATS
            ]
            replies = [(data, await session.post(path, data=data, headers=head)) for path, data in asked]
            squeezed = await session.post(
                "/v1/completions", data=b"no gzip", headers=head | {"Content-Encoding": "gzip"}
            )
            replies.append((b"no gzip", squeezed))
            found = [(data, reply.status, await reply.json()) for data, reply in replies]
            assert expert.requests == []
            good = await session.post("/v1/completions", json=body(max_tokens=3))
            return found, good.status

    found, good = asyncio.run(run())
    for data, status, said in found:
        assert status == 400, data[:100]
        assert 0 < len(said["error"]["message"]) < 1100
        assert "\n" not in said["error"]["message"]
    assert good == 200


POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
NO_HTTP = [
    (b"nonsense\r\n\r\n", 400),
    (b"GET /v1/models HTTP/9.9\r\n\r\n", 400),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
    (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", 400),
    (b"GET /%ff%00 HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    (b"BREW /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"PUT /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    (POST + b"Content-Length: many\r\n\r\n", 400),
    (POST + b"Content-Length: -1\r\n\r\n", 400),
    (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
    (POST + b"Content-Length: 99999999999\r\n\r\n{}", 413),
    (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    (POST + b"Content-Length: 2\r\nExpect: nothing\r\n\r\n{}", 417),
    (POST + b"Content-Length: 2\r\n\r\n{}", 400),
]


@pytest.mark.parametrize(("sent", "status"), NO_HTTP)
def test_what_is_no_http_is_refused_as_everything_else(sent, status, caplog):
    async def run():
        async with before_standin() as (session, _, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", session._base_url.port)
            writer.write(sent)
            head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).decode().lower()
            length = int(next(line for line in head.splitlines() if line.startswith("content-length")).split()[1])
            said = json.loads(await reader.readexactly(length))
            writer.close()
            return head, said

    head, said = asyncio.run(run())
    assert head.split()[1] == str(status)
    assert "content-type: application/json" in head
    assert set(said["error"]) == {"message", "type", "param", "code"}
    # Whoever likes could fill the disk with it. What gRPC says when two event loops have shared its poller is not ours.
    assert [record for record in caplog.records if "PollerCompletionQueue" not in record.getMessage()] == []


def idle_connections(port, n):
    connections = []
    for _ in range(n):
        connections.append(socket.create_connection(("127.0.0.1", port), timeout=10))
    return connections


def test_idle_connections_keep_nobody_out(tokenizer, tmp_path):
    """There may be fewer files than idle clients: those who have asked for nothing go first."""
    log, port = tmp_path / "openai.log", PORT + 3
    front = start_front(port, "127.0.0.1:9", tokenizer, log, limit="ulimit -n 256;")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as early:
            assert early.get("/v1/models").status_code == 200
            idle = idle_connections(port, 400)
            assert early.get("/v1/models").status_code == 200  # on its connection
            for _ in range(3):
                assert httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=10).status_code == 200
        assert log.stat().st_size < 10_000
        for one in idle:
            one.close()
    finally:
        processes.stop([front])


def test_the_limit_of_open_files_is_raised(tokenizer, tmp_path):
    port = PORT + 3
    front = start_front(port, "127.0.0.1:9", tokenizer, tmp_path / "openai.log", limit="ulimit -S -n 64;")
    try:
        soft, hard = resource.prlimit(front.pid, resource.RLIMIT_NOFILE)
        assert soft == min(hard, http_front.MOST_FILES)
        idle = idle_connections(port, 100)
        time.sleep(0.2)
        for one in idle:
            one.setblocking(False)
            with pytest.raises(BlockingIOError):  # neither closed nor answered
                one.recv(1)
            one.close()
    finally:
        processes.stop([front])


def test_who_says_nothing_is_hung_up_on(monkeypatch):
    """Neither a connection without a request nor a request that never ends keeps its place."""
    monkeypatch.setattr(http_front, "IDLE_S", 0.2)
    monkeypatch.setattr(openai_api, "BODY_TIMEOUT_S", 0.2)

    async def run():
        async with before_standin() as (session, _, _):
            seen = []
            for sent in (b"", b"GET /v1/mod", POST, POST + b"Content-Length: 2\r\n\r\n{"):
                reader, writer = await asyncio.open_connection("127.0.0.1", session._base_url.port)
                writer.write(sent)
                seen.append(await asyncio.wait_for(reader.read(12), 5))
                writer.close()
            return seen

    assert asyncio.run(run()) == [b"", b"", b"", b"HTTP/1.1 408"]


NOTHING = {
    # OpenAI's
    "audio": [], "best_of": [1], "echo": [False], "frequency_penalty": [0, 0.0], "function_call": ["none"],
    "functions": [[]], "logit_bias": [{}], "logprobs": [False, 0], "max_completion_tokens": [], "max_tokens": [],
    "metadata": [{}, {"a": "b"}], "modalities": [["text"]], "n": [1], "parallel_tool_calls": [True, False],
    "prediction": [], "presence_penalty": [0], "prompt_cache_key": ["a"], "reasoning_effort": ["none"],
    "response_format": [{"type": "text"}], "safety_identifier": ["a"], "seed": [7], "service_tier": ["auto"],
    "stop": [[], ""], "store": [False], "stream": [False], "stream_options": [{}], "suffix": [""],
    "temperature": [0, 1.0], "tool_choice": ["none", "auto"], "tools": [[]], "top_logprobs": [0], "top_p": [1],
    "user": ["a"], "verbosity": ["medium"], "web_search_options": [],
    # vLLM's
    "add_generation_prompt": [True], "add_special_tokens": [True, False], "allowed_token_ids": [[]], "bad_words": [[]],
    "cache_salt": [], "chat_template": [], "chat_template_kwargs": [{}], "continue_final_message": [False],
    "documents": [[]], "guided_json": [], "ignore_eos": [False], "include_reasoning": [True],
    "include_stop_str_in_output": [False], "length_penalty": [1.0], "logits_processors": [[]], "min_p": [0, 0.0],
    "min_tokens": [0], "mm_processor_kwargs": [{}], "priority": [0], "prompt_logprobs": [0],
    "repetition_penalty": [1, 1.0], "request_id": ["a"], "return_token_ids": [False], "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True], "stop_token_ids": [[]], "structured_outputs": [{}], "top_k": [-1, 0, 50],
    "truncate_prompt_tokens": [], "use_beam_search": [False], "vllm_xargs": [{}],
}  # fmt: skip


def test_fields_that_ask_for_nothing_change_nothing():
    async def run():
        async with before_standin() as (session, expert, _):
            asked = [(name, value) for name, values in NOTHING.items() for value in [None, *values]]
            chat = {"model": "expert-router", "messages": [MESSAGE]}
            seen = []
            for path, base in (("/v1/completions", body()), ("/v1/chat/completions", chat)):
                for name, value in asked:
                    if name == "max_completion_tokens" and path == "/v1/completions":
                        continue
                    async with session.post(path, json=base | {name: value}) as reply:
                        seen.append((path, name, value, reply.status))
            calls = [pb.ModelInferRequest.FromString(seen.message) for seen in expert.requests]
            assert len({call.id for call in calls}) == len(calls)  # by which logs tell requests apart
            for call in calls:
                call.ClearField("id")
            return seen, {call.SerializeToString() for call in calls}

    seen, messages = asyncio.run(run())
    assert [one for one in seen if one[-1] != 200] == []
    assert len(messages) == 2  # one for every completion, one for every chat


def test_messages_as_clients_send_them_on():
    """An assistant's message has null for what it does not hold."""

    async def run():
        async with before_standin() as (session, expert, _):
            said = MESSAGE | {
                "role": "assistant",
                "tool_calls": None,
                "refusal": None,
                "audio": None,
                "annotations": [],
            }
            parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
            messages = [
                MESSAGE,
                said,
                said | {"content": None, "tool_calls": []},
                MESSAGE | {"content": parts, "name": "x"},
            ]
            chat = {"model": "expert-router", "messages": [{"role": "0", "content": "system"}, *messages]}
            reply = await session.post("/v1/chat/completions", json=chat)
            return reply.status, wire.prompt_of(expert.requests[0].message)[1]

    status, prompt = asyncio.run(run())
    assert (status, prompt) == (200, "0: system\nuser: 0\nassistant: 0\nassistant: \nuser: a b\nassistant:")


def test_a_page_in_a_browser_cannot_ask_unless_it_is_allowed_to():
    """It may send text or a form to anybody; for JSON its browser asks first, and is not answered."""
    page, ask = {"Origin": "https://chat.example"}, {"Access-Control-Request-Method": "POST"}
    data = json.dumps(body(max_tokens=2))

    async def run(origins):
        async with before_standin(origins=origins) as (session, expert, _):
            for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", ""):
                head = page | ({"Content-Type": kind} if kind else {})
                skip = [] if kind else ["Content-Type"]
                async with session.post("/v1/completions", data=data, headers=head, skip_auto_headers=skip) as reply:
                    assert (reply.status, "Content-Type" in (await reply.json())["error"]["message"]) == (400, True)
            assert expert.requests == []
            wanted = ask | {"Access-Control-Request-Headers": "authorization, content-type"}
            first = await session.options("/v1/completions", headers=page | wanted)
            foreign = await session.options("/v1/completions", headers={"Origin": "https://other.example"} | wanted)
            answer = await session.post("/v1/completions", json=body(stream=True), headers=page)
            wrong = await session.post("/v1/completions", json=body(n=2), headers=page)
            name = "Access-Control-Allow-Origin"
            replies = (first, foreign, answer, wrong)
            headers = first.headers.get("Access-Control-Allow-Headers")
            return [(one.status, one.headers.get(name)) for one in replies], headers

    ours = "https://chat.example"
    assert asyncio.run(run([])) == ([(405, None), (405, None), (200, None), (400, None)], None)
    some = [(204, ours), (405, None), (200, ours), (400, ours)]
    assert asyncio.run(run([ours])) == (some, "authorization, content-type")
    every = [(204, "*"), (204, "*"), (200, "*"), (400, "*")]
    assert asyncio.run(run(["*"])) == (every, "authorization, content-type")


def test_a_page_cannot_make_itself_a_neighbour_by_a_name_that_leads_here():
    async def run(on_loopback):
        async with before_standin(on_loopback=on_loopback) as (session, _, _):
            names = ["127.0.0.1:9000", "localhost:9000", "LOCALHOST", "[::1]:9000", "10.0.0.7"]
            names += ["evil.example:9000", "localhost.evil.example", "127.0.0.1.evil.example", "", "[", "a b"]
            replies = [await session.get("/v1/models", headers={"Host": name}) for name in names]
            assert all([set(await reply.json()) for reply in replies])
            return [reply.status for reply in replies]

    assert asyncio.run(run(True)) == [200] * 5 + [403] * 6
    assert asyncio.run(run(False)) == [200] * 11


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
    settled, deadline = before, time.monotonic() + 30
    while settled != (settled := counted()):
        assert time.monotonic() < deadline
        time.sleep(1)
    assert 0 < settled - before < 400
