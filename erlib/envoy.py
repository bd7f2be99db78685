"""The fast front, in NGINX's place: Envoy asks a gateway where a request belongs and relays the tokens itself.

A request that is complete when it arrives goes from Envoy straight to its expert, once the processor of a gateway
(:mod:`erlib.processor`) has named it; all others go to the gateways in turn, as with :mod:`erlib.nginx`. Tokens of the
former cost no Python, and go on when the gateways are gone. The extra ``envoy`` brings Envoy and its messages.

What is different for a request that goes straight: a stream that an expert's death cuts off is reset, which gRPC's
clients call INTERNAL, where a gateway says UNAVAILABLE. An error that the expert sends as its first response is passed
on, and counted, but not tried again elsewhere; no gateway notices an expert that falls silent, for which clients have
deadlines, which Envoy passes on as they came. ``er-forward-ns`` ends with the answer to Envoy, and Envoy's own hop
behind it is in no span; ``er-first-byte-ns`` is Envoy's, from the first byte of the prompt to the expert on, and comes
with the first response.
"""

from __future__ import annotations

import importlib.util
import resource
import subprocess
from collections.abc import Sequence
from pathlib import Path

from erlib import processes, wire
from erlib.processes import StartError

CLUSTER = "er-cluster"
"""The header by which Envoy picks a cluster."""
NAMESPACE = "er"
"""Of what Envoy keeps of a request: what its client is told, and its log says."""
FAILED = "failed"
"""There, the beginning of the expert's first response, if that is an error."""
TOLD = ["er-gateway", "er-expert", *(f"er-{span}-ns" for span in ("queue", "vectorise", "svd", "kmeans", "forward"))]
"""What a processor tells Envoy of a request."""
INSTALL = ".venv/bin/python scripts/install.py envoy"

# Every limit whose default would break a long streaming run of many users is set, with the reason beside it.
_CONFIG = """\
static_resources:
  listeners:
  - address: {{socket_address: {{address: {host}, port_value: {port}}}}}
    enable_reuse_port: false  # a port that is in use is noticed
    per_connection_buffer_limit_bytes: 1048576  # of a slow client's answers; twice the largest prompt, for a retry
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: front
          codec_type: HTTP2
          http2_protocol_options:
            max_concurrent_streams: 8192  # 1,024 by default: the next stream is refused
            max_outbound_frames: 1048576  # 10,000 by default: a client that stops for some seconds would be cut off
            initial_stream_window_size: 262144  # a processor is sent this much at once, and takes no more than a prompt
          common_http_protocol_options:
            idle_timeout: 0s  # 1 h by default, then the client's connection is closed
            max_headers_count: 10000  # 100 by default; gRPC limits the size of metadata only
          max_request_headers_kb: 1024  # 60 by default; gateways and experts say what is too large
          stream_idle_timeout: 0s  # 5 min by default: a queued request may wait longer for its first token
          generate_request_id: false  # experts see what the client has sent
          skip_xff_append: true
          server_header_transformation: PASS_THROUGH
          access_log:  # tells each gateway how the requests have ended that it sent to experts
{loggers}
          route_config:
            request_headers_to_remove: [x-forwarded-proto, x-envoy-expected-rq-timeout-ms]
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match:
                  path: {stream_infer}
                  headers:
                  - {{name: {cluster}, string_match: {{prefix: expert-}}}}
                  - {{name: er-explain, present_match: false}}
                  - {{name: triton_grpc_error, present_match: false}}
                route:
                  cluster_header: {cluster}
                  timeout: 0s  # 15 s by default, for the whole answer
                  retry_policy: {{num_retries: 1, {another_host}}}  # on what the processor asks for
                request_headers_to_remove: [{cluster}, er-sent-ns]
                response_headers_to_add:
{told}
              - match:
                  path: {stream_infer}
                  headers:
                  - {{name: {cluster}, string_match: {{prefix: gateway-}}}}
                  - {{name: er-explain, present_match: false}}
                  - {{name: triton_grpc_error, present_match: false}}
                route: {{cluster_header: {cluster}, timeout: 0s}}
                request_headers_to_add: &peer
                - header: {{key: x-real-ip, value: "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"}}
                  append_action: OVERWRITE_IF_EXISTS_OR_ADD
                request_headers_to_remove: [{cluster}]
              - match:
                  path: {stream_infer}
                  headers:
                  - {{name: er-explain, present_match: false}}
                  - {{name: triton_grpc_error, present_match: false}}
                route: &gateways  # until the processor has said where
                  cluster: gateways
                  timeout: 0s
                  # A gateway that refuses the connection has seen nothing of the request: another one gets it.
                  retry_policy: {{retry_on: "connect-failure,refused-stream", num_retries: 16, {another_host}}}
              - match: {{prefix: /}}
                route: *gateways
                request_headers_to_add: *peer
                typed_per_filter_config:
                  envoy.filters.http.ext_proc:
                    "@type": type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExtProcPerRoute
                    disabled: true
          http_filters:
          - name: envoy.filters.http.ext_proc
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor
              grpc_service:
                envoy_grpc: {{cluster_name: gateways}}
                retry_policy:  # at once: the default waits 1 s before the second time
                  {{retry_on: "connect-failure,refused-stream", num_retries: 16, {another_host},
                  retry_back_off: {{base_interval: 0.001s, max_interval: 0.01s}}}}
              message_timeout: 3600s  # 200 ms by default: a burst of prompts takes longer to classify
              status_on_error: {{code: ServiceUnavailable}}  # which gRPC calls UNAVAILABLE
              mutation_rules: {{allow_envoy: true}}  # which requests are tried again
              forward_rules: {{allowed_headers: {{patterns: [{{exact: er-sent-ns}}]}}}}
              metadata_options: {{receiving_namespaces: {{untyped: [{namespace}]}}}}
              processing_mode:
                request_header_mode: SEND
                request_body_mode: FULL_DUPLEX_STREAMED  # the only mode that lets a client keep its stream open
                request_trailer_mode: SEND  # which that mode asks for
                response_header_mode: SKIP
                response_body_mode: NONE  # tokens never leave Envoy
                response_trailer_mode: SKIP
          - name: envoy.filters.http.lua  # whether the first response is an error, as erlib.wire.is_error tells it
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua
              default_source_code:
                inline_string: |
                  function envoy_on_response(reply)
                    if not reply:streamInfo():dynamicMetadata():get("{namespace}") then return end
                    for part in reply:bodyChunks() do
                      if part:length() > 7 and part:getBytes(5, 1) == "\\n" then  -- then its length, then its text
                        local at = part:getBytes(6, 1):byte() < 128 and 7 or 8
                        local text = part:getBytes(at, math.min(part:length() - at, 200)):gsub("[^ -~]", "?")
                        reply:streamInfo():dynamicMetadata():set("{namespace}", "{failed}", text)
                      end
                      return  -- all others pass without a look
                    end
                  end
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
              suppress_envoy_headers: true
  clusters:
{clusters}
"""

_LOGGER = """\
          - name: envoy.access_loggers.http_grpc
            filter:
              metadata_filter:
                matcher: {{filter: {namespace}, path: [{{key: er-gateway}}], value: {{string_match: {{exact: "{i}"}}}}}}
                match_if_key_not_found: false
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig
              common_config:
                log_name: gateway-{i}
                transport_api_version: V3
                grpc_service: {{envoy_grpc: {{cluster_name: gateway-{i}}}}}
              additional_response_headers_to_log: [grpc-status]
              additional_response_trailers_to_log: [grpc-status]"""

_ANOTHER_HOST = """\
host_selection_retry_max_attempts: 16, retry_host_predicate: [{name: envoy.retry_host_predicates.previous_hosts, \
typed_config: {"@type": type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate}}]"""

_CLUSTER = """\
  - name: {name}
    lb_policy: {policy}
    connect_timeout: 5s  # the default
    per_connection_buffer_limit_bytes: 1048576
    circuit_breakers:  # 1,024 of each by default, 3 retries: the next request would be refused
      thresholds: [{{max_connections: 65536, max_pending_requests: 65536, max_requests: 65536, max_retries: 65536}}]
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        common_http_protocol_options:
          idle_timeout: 0s  # 1 h by default: a burst finds connections open
          max_headers_count: 10000
        explicit_http_config:
          http2_protocol_options:
            # What waits for slow clients counts against the one connection that all streams share: little of each, so
            # that thousands of them block nobody else (16 and 24 MiB by default).
            initial_stream_window_size: 262144
            initial_connection_window_size: 1073741824
    load_assignment:
      cluster_name: {name}
      endpoints:
      - lb_endpoints:
{endpoints}"""
_ENDPOINT = "        - endpoint: {{address: {{socket_address: {{address: {0}, port_value: {2}}}}}}}"
_TOLD = '                - header: {{key: {name}, value: "{value}"}}'


def find() -> Path:
    """The Envoy executable of this environment.

    Raises
    ------
    StartError
        If there is none, or nothing that speaks to it; says how to install both.
    """
    found = importlib.util.find_spec("envoy")
    homes = [Path(home) for home in (found.submodule_search_locations or ())] if found else []
    for home in homes:
        if (home / "_bin" / "envoy").exists() and (home / "service" / "ext_proc").exists():
            return home / "_bin" / "envoy"
    raise StartError(f"serving.front: envoy (a gateway's --processor) needs Envoy, which is not installed: {INSTALL}")


class Envoy:
    """`experts` and `gateways` behind one port; see :meth:`start`.

    Parameters
    ----------
    port : int
    gateways : sequence of str
        Addresses of gateways that have a processor.
    experts : sequence of str
        As the gateways know them: one per cluster, in order, replicas joined by ``|``.
    work_dir : Path
    host : str
    """

    title = "Envoy"

    def __init__(
        self, port: int, gateways: Sequence[str], experts: Sequence[str], work_dir: Path, host: str = "127.0.0.1"
    ):
        self.host, self.port = host, port
        self.log = work_dir / "envoy.log"
        self._file = work_dir / "envoy.yaml"
        clusters = [_cluster("gateways", "ROUND_ROBIN", gateways)]
        clusters += [_cluster(f"gateway-{i}", "ROUND_ROBIN", [one]) for i, one in enumerate(gateways)]
        clusters += [_cluster(f"expert-{i}", "LEAST_REQUEST", one.split("|")) for i, one in enumerate(experts)]
        self.configuration = _CONFIG.format(
            host=host, port=port, stream_infer=wire.STREAM_INFER, cluster=CLUSTER, namespace=NAMESPACE, failed=FAILED,
            another_host=_ANOTHER_HOST, clusters="\n".join(clusters),
            loggers="\n".join(_LOGGER.format(i=i, namespace=NAMESPACE) for i in range(len(gateways))),
            told="\n".join(_TOLD.format(name=name, value=value) for name, value in _VALUES.items()),
        )  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """``host:port`` that clients connect to."""
        return f"{self.host}:{self.port}"

    def start(self, timeout_s: float = 10) -> None:
        """Start and wait until the port answers.

        Raises
        ------
        StartError
            If Envoy is missing, refuses its configuration or does not listen within `timeout_s`.
        """
        binary = find()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        self._file.write_text(self.configuration)
        # One thread that relays, as NGINX has.
        options = ("--concurrency", "1", "--disable-hot-restart", "-l", "warning")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.process = processes.spawn([binary, "-c", self._file, *options], self.log)
        resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (max(soft, min(65536, hard)), hard))
        processes.wait_until(
            lambda: processes.listening(self.port, self.host), self.process, "Envoy", self.log, timeout_s
        )


_VALUES = {name: f"%DYNAMIC_METADATA({NAMESPACE}:{name})%" for name in TOLD} | {
    "er-first-byte-ns": "%COMMON_DURATION(US_TX_BEG:US_RX_BEG:ns)%"
}


def _cluster(name: str, policy: str, addresses: Sequence[str]) -> str:
    endpoints = "\n".join(_ENDPOINT.format(*address.rpartition(":")) for address in addresses)
    return _CLUSTER.format(name=name, policy=policy, endpoints=endpoints)
