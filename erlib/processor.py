"""A gateway's decision for Envoy: where a request belongs, said once, so that its tokens need not come here.

Two more services of a gateway that was started with ``--processor``, behind :mod:`erlib.envoy`, whose extra they need.

As an *external processor* it is sent every inference stream as it begins. One that is complete with its first message,
and whose expert is up by this gateway's breakers, is classified with this gateway's router and sent to that expert's
cluster, together with what its client is to be told. Every other one, which includes whatever is wrong, is sent to the
inference service of this same process, and so is read, limited, refused or relayed as ever; its requests, not their
answers, pass here once more, because Envoy does not let a processor leave a stream that may go on.

As an *access log* it is told how those that it has sent to experts have ended: it counts them, with the code that the
client saw, and suspects a replica that failed or whose first response was an error. Their tokens it does not see;
``er_tokens_total`` counts those that this process relays.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import grpc.aio
from envoy.data.accesslog.v3 import accesslog_pb2 as entries
from envoy.service.accesslog.v3 import als_pb2 as logs
from envoy.service.ext_proc.v3 import external_processor_pb2 as xds

from erlib import wire
from erlib.envoy import CLUSTER, FAILED, NAMESPACE
from erlib.service import Gateway
from erlib.telemetry import Request

COMPLETE_WITHIN_S = 0.02
"""A stream that has not ended this long after its headers is one that its client keeps open, or a slow one."""
_PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
_LOG = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"
_RETRY = {"x-envoy-retry-on": "connect-failure,refused-stream,reset", "x-envoy-retry-grpc-on": "unavailable"}
"""All before the first response; what a gateway, too, tries on a spare replica."""


class Processor(grpc.GenericRpcHandler):
    """What Envoy asks and tells `gateway`."""

    def __init__(self, gateway: Gateway):
        self._gateway = gateway

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method == _PROCESS:
            return grpc.stream_stream_rpc_method_handler(
                self._process, xds.ProcessingRequest.FromString, xds.ProcessingResponse.SerializeToString
            )
        if handler_call_details.method == _LOG:
            return grpc.stream_unary_rpc_method_handler(self._note, logs.StreamAccessLogsMessage.FromString)
        return None

    async def _process(self, _: AsyncIterator[xds.ProcessingRequest], context: grpc.aio.ServicerContext) -> None:
        """Decide about one stream, and hand all of it back."""
        began = await context.read()
        if began is grpc.aio.EOF:
            return
        until_s = time.monotonic() + COMPLETE_WITHIN_S
        headers = began.request_headers.headers.headers
        sent = next((header.raw_value.decode("latin-1") for header in headers if header.key == "er-sent-ns"), "")
        if began.request_headers.end_of_stream:  # no message at all
            await context.write(self._directed(None))
            return
        body, is_complete = b"", False
        reading: asyncio.Future[xds.ProcessingRequest] | None = None
        try:
            while not is_complete and len(body) <= self._gateway.limits.message_bytes:
                reading = asyncio.ensure_future(context.read())
                await asyncio.wait({reading}, timeout=max(0.0, until_s - time.monotonic()))
                if not reading.done():
                    break
                part, reading = reading.result(), None
                if part is grpc.aio.EOF:
                    return
                body += part.request_body.body
                is_complete = _is_last(part)
            message = message_of(body) if is_complete else None
            direct = None if message is None else await self._gateway.direct(message, sent)
            await context.write(self._directed(direct))
            if body or is_complete:  # an answer to what has not been asked would end the stream
                await context.write(_passed(body, is_complete))
            while not is_complete:
                part, reading = await (reading or context.read()), None
                if part is grpc.aio.EOF:
                    return
                is_complete = _is_last(part)
                await context.write(_passed(part.request_body.body, is_complete))
        finally:
            if reading is not None:
                reading.cancel()

    def _directed(self, direct: tuple[Request, bool] | None) -> xds.ProcessingResponse:
        """Where a stream goes: `direct` to an expert, which may have a spare replica, or here."""
        answer = xds.ProcessingResponse()
        decision = answer.request_headers.response
        decision.clear_route_cache = True
        headers = {CLUSTER: f"gateway-{self._gateway.index}"}
        if direct is not None:
            request, has_spare = direct
            headers = {CLUSTER: f"expert-{request.expert}", **(_RETRY if has_spare else {})}
            request.spans_ns["forward"] = time.monotonic_ns() - request.t_routed_ns
            told = {name: str(value) for name, value in self._gateway.who(request).items()}
            answer.dynamic_metadata.update({NAMESPACE: {**told, "id": request.id}})
        for name, value in headers.items():
            header = decision.header_mutation.set_headers.add().header
            header.key, header.raw_value = name, value.encode()
        return answer

    async def _note(self, told: AsyncIterator[logs.StreamAccessLogsMessage], _: grpc.aio.ServicerContext) -> bytes:
        """Count requests that have ended."""
        async for message in told:
            for entry in message.http_logs.log_entry:
                self._gateway.ended(ended(entry))
        return b""


def message_of(body: bytes) -> bytes | None:
    """The one gRPC message that is all of `body`; None: it is none, several, a part of one, or compressed."""
    is_one = len(body) >= 5 and body[0] == 0 and len(body) == 5 + int.from_bytes(body[1:5], "big")
    return body[5:] if is_one else None


def ended(entry: entries.HTTPAccessLogEntry) -> Request:
    """A request that Envoy relayed, as a log entry describes it."""
    common, reply = entry.common_properties, entry.response
    told = dict(common.metadata.filter_metadata[NAMESPACE])
    request = Request("stream", common.downstream_remote_address.socket_address.address, told["id"])
    request.expert = int(told["er-expert"])
    request.spans_ns = {
        name.removeprefix("er-").removesuffix("-ns"): int(value) for name, value in told.items() if name.endswith("-ns")
    }
    replica = common.upstream_remote_address.socket_address
    request.replica = f"{replica.address}:{replica.port_value}" if replica.address else ""
    request.expert_error = wire.status_of(told[FAILED])[0].name if FAILED in told else ""
    request.responses = int(FAILED in told)
    request.retries = max(0, common.upstream_request_attempt_count - 1)
    status = reply.response_trailers.get("grpc-status") or reply.response_headers.get("grpc-status")
    if status is not None:
        request.code = _CODES.get(status, grpc.StatusCode.UNKNOWN).name
    elif common.response_flags.downstream_connection_termination or common.response_flags.downstream_remote_reset:
        request.code = grpc.StatusCode.CANCELLED.name
    else:  # its stream is reset behind a response, which clients call
        request.code = grpc.StatusCode.INTERNAL.name
    return request


_CODES = {str(code.value[0]): code for code in grpc.StatusCode}


def _is_last(part: xds.ProcessingRequest) -> bool:
    return part.request_body.end_of_stream or part.HasField("request_trailers")


def _passed(body: bytes, is_last: bool) -> xds.ProcessingResponse:
    """Let Envoy send this part of the body on as it is."""
    answer = xds.ProcessingResponse()
    part = answer.request_body.response.body_mutation.streamed_response
    part.body, part.end_of_stream = body, is_last
    return answer
