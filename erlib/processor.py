"""A gateway's decision for Envoy: where a request belongs, said once, so that its tokens need not come here.

Two more services of a gateway that was started with ``--processor``, behind :mod:`erlib.envoy`. As an *external
processor* it is sent each inference stream as it arrives. One that ends right behind its first message, and whose
expert is up, is classified with the gateway's own router and sent to the expert's cluster. All others, which includes
whatever is wrong, are sent to the gateways, which answer as ever.

As an *access log* it is told how those requests have ended, and counts them. Their tokens nobody counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import grpc.aio
from envoy.service.accesslog.v3 import als_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as xds

from erlib.envoy import CLUSTER, NAMESPACE
from erlib.service import Gateway
from erlib.telemetry import Request

COMPLETE_WITHIN_S = 0.02
"""A stream that has not ended by then is one that its client keeps open, or a slow one."""
_PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
_LOG = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"
_RETRY = {"x-envoy-retry-on": "connect-failure,refused-stream,reset", "x-envoy-retry-grpc-on": "unavailable"}
"""Before the first response, as a gateway does."""


class Processor(grpc.GenericRpcHandler):
    """What Envoy asks and tells a gateway."""

    def __init__(self, gateway: Gateway):
        self._gateway = gateway

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method == _PROCESS:
            return grpc.stream_stream_rpc_method_handler(
                self._process, xds.ProcessingRequest.FromString, xds.ProcessingResponse.SerializeToString
            )
        if handler_call_details.method == _LOG:
            return grpc.stream_unary_rpc_method_handler(
                self._log, als_pb2.StreamAccessLogsMessage.FromString, lambda _: b""
            )
        return None

    async def _process(
        self, _: AsyncIterator[xds.ProcessingRequest], context: grpc.aio.ServicerContext
    ) -> None:
        """Decide about one stream, and hand all of it back."""
        headers = (await context.read()).request_headers.headers.headers
        sent = next((header.raw_value.decode() for header in headers if header.key == "er-sent-ns"), "")
        body, is_complete = bytearray(), False
        deadline_s = time.monotonic() + COMPLETE_WITHIN_S
        reading = asyncio.ensure_future(context.read())
        while not is_complete:
            await asyncio.wait({reading}, timeout=max(0.0, deadline_s - time.monotonic()))
            if not reading.done():
                break
            if (question := reading.result()) is grpc.aio.EOF:
                return
            body += question.request_body.body
            is_complete = question.request_body.end_of_stream or question.HasField("request_trailers")
            if not is_complete:
                reading = asyncio.ensure_future(context.read())
        message = message_of(body) if is_complete else None
        await context.write(self._headed(self._gateway.direct(message, sent) if message is not None else None))
        if body or is_complete:
            await context.write(_passed(bytes(body), is_complete))
        while not is_complete:
            if (question := await reading) is grpc.aio.EOF:
                return
            is_complete = question.request_body.end_of_stream
            await context.write(_passed(question.request_body.body, is_complete))
            reading = asyncio.ensure_future(context.read())

    def _headed(self, direct: tuple[Request, bool] | None) -> xds.ProcessingResponse:
        """Where a stream goes: to the gateways, or `direct` to its expert."""
        answer = xds.ProcessingResponse()
        common = answer.request_headers.response
        common.clear_route_cache = True
        headers = {CLUSTER: "gateways"}
        if direct is not None:
            request, has_spare = direct
            headers = {CLUSTER: f"expert-{request.expert}", **(_RETRY if has_spare else {})}
            request.spans_ns["forward"] = time.monotonic_ns() - request.t_routed_ns
            told = {name: str(value) for name, value in self._gateway.who(request).items()}
            answer.dynamic_metadata.update({NAMESPACE: told})
        for name, value in headers.items():
            header = common.header_mutation.set_headers.add().header
            header.key, header.raw_value = name, value.encode()
        return answer

    async def _log(self, told: AsyncIterator[als_pb2.StreamAccessLogsMessage], _: grpc.aio.ServicerContext) -> None:
        async for message in told:
            for entry in message.http_logs.log_entry:
                print(entry, flush=True)


def message_of(body: bytes | bytearray) -> bytes | None:
    """The one gRPC message that is all of `body`; None: it is none, several, a part of one, or compressed."""
    is_one = len(body) >= 5 and body[0] == 0 and len(body) == 5 + int.from_bytes(body[1:5], "big")
    return bytes(body[5:]) if is_one else None


def _passed(body: bytes, last: bool) -> xds.ProcessingResponse:
    """Let Envoy send this part of the body on as it is."""
    answer = xds.ProcessingResponse()
    part = answer.request_body.response.body_mutation.streamed_response
    part.body, part.end_of_stream = body, last
    return answer
