"""The routing gateway's decision as an Envoy external processor: classify once, leave the relaying to Envoy.

Envoy holds a request back and sends its headers and body here as they arrive; as soon as the body holds one message,
this answers with the header by which Envoy picks the expert's cluster. Responses do not come here at all.

Run as ``python -m benchmarks.processor PORT CLUSTERER`` with ``xds-protos`` on the path.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import grpc
import grpc.aio
from envoy.service.ext_proc.v3 import external_processor_pb2 as xds

from erlib import wire
from erlib.clusterer import Clusterer

HEADER = "er-expert"


def _forward(body: bytes, last: bool) -> xds.ProcessingResponse:
    """Let Envoy send this part of the body on as it is."""
    answer = xds.ProcessingResponse()
    part = answer.request_body.response.body_mutation.streamed_response
    part.body, part.end_of_stream = body, last
    return answer


def _to_expert(expert: int) -> xds.ProcessingResponse:
    answer = xds.ProcessingResponse()
    header = answer.request_headers.response.header_mutation.set_headers.add().header
    header.key, header.raw_value = HEADER, f"expert-{expert}".encode()
    answer.request_headers.response.clear_route_cache = True
    return answer


def _refuse(reason: str) -> xds.ProcessingResponse:
    answer = xds.ProcessingResponse()
    answer.immediate_response.status.code = 200
    answer.immediate_response.grpc_status.status = grpc.StatusCode.INVALID_ARGUMENT.value[0]
    answer.immediate_response.details = reason
    return answer


def handler(model: Clusterer) -> grpc.RpcMethodHandler:
    """The one method: a stream of what Envoy asks about one request."""

    async def process(
        asked: AsyncIterator[xds.ProcessingRequest], _: grpc.aio.ServicerContext
    ) -> AsyncIterator[xds.ProcessingResponse]:
        body, routed = b"", False
        async for question in asked:
            if question.HasField("request_trailers"):
                answer = xds.ProcessingResponse()
                answer.request_trailers.SetInParent()
                yield answer
            if not question.HasField("request_body"):
                continue  # headers: what they hold does not matter, they are answered when the prompt is known
            part, last = question.request_body.body, question.request_body.end_of_stream
            if not routed:
                body = part = body + part
                if len(body) < 5 or len(body) < 5 + int.from_bytes(body[1:5], "big"):
                    continue
                try:
                    _, prompt = wire.prompt_of(body[5 : 5 + int.from_bytes(body[1:5], "big")])
                except wire.BadRequest as error:
                    yield _refuse(str(error))
                    return
                yield _to_expert(model.route(prompt)[0])
                routed = True
            yield _forward(part, last)

    return grpc.stream_stream_rpc_method_handler(
        process, xds.ProcessingRequest.FromString, xds.ProcessingResponse.SerializeToString
    )


async def serve(port: int, model: Clusterer) -> None:
    """Serve until the process is told to end."""
    server = grpc.aio.server(options=[*wire.CHANNEL_OPTIONS, ("grpc.so_reuseport", 0)])
    service = {"Process": handler(model)}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("envoy.service.ext_proc.v3.ExternalProcessor", service),)
    )
    if server.add_insecure_port(f"127.0.0.1:{port}") == 0:
        raise SystemExit(f"port {port} is in use")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), Clusterer.load(sys.argv[2])))
