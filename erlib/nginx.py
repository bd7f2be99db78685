"""The load balancer in front of the gateways: real NGINX, gRPC, round robin (papers, section III-A)."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from erlib import processes
from erlib.processes import StartError
from erlib.runfolder import RunFolder

# Every limit whose default would break a long streaming run of many users is set, with the reason beside it.
_CONFIG = """\
worker_processes 1;  # one worker, so that round robin is exact
worker_rlimit_nofile {open_files};  # a stream takes a connection to its gateway; 1,024 by default
daemon off;
pid "{run}/nginx.pid";
error_log stderr warn;
events {{ worker_connections 16384; }}  # clients' and gateways' together
http {{
  access_log off;
  client_body_temp_path "{run}/body"; proxy_temp_path "{run}/proxy"; fastcgi_temp_path "{run}/fastcgi";
  uwsgi_temp_path "{run}/uwsgi"; scgi_temp_path "{run}/scgi";
  upstream gateways {{
    # max_fails=0: a gateway that is being restarted refuses connections, which costs nothing. To leave it alone for ten
    # seconds after the first, as by default, would leave nobody where one after the other is restarted.
{servers}
    keepalive 1024;  # idle connections kept: a burst of streams finds them open
    keepalive_requests 1000000000;  # 1,000 by default, then the connection is closed
    keepalive_timeout 1h;  # 60 s by default
  }}
  server {{
    # so_keepalive: off by default; a client whose host has gone would hold its streams for client_body_timeout.
    # backlog: 511 by default; of more users who connect in the same instant, the rest would try again a second later.
    listen {host}:{port} http2 so_keepalive=5m:30s:4 backlog=4096;
    # By default, metadata whose names hold "_" or "." are dropped without a word, and those of more than 8 KB refused.
    underscores_in_headers on;
    ignore_invalid_headers off;
    large_client_header_buffers 8 128k;  # gateways say what is too large
    http2_max_concurrent_streams 8192;  # 128 by default: the next stream of a client's connection would wait
    keepalive_requests 1000000000;  # 1,000 streams by default, then the client's connection is closed
    keepalive_timeout 24h;  # 75 s by default: a client that thinks longer would have to connect again
    client_header_timeout 60s;  # the default: metadata come at once
    client_body_timeout 24h;  # 60 s by default: a stream that stays open sends nothing between its requests
    client_max_body_size 0;  # 1 MB by default; the body is all requests of a stream. Gateways limit each of them
    send_timeout 1h;  # 60 s by default: a slow client may take longer to make room for the next write
    grpc_connect_timeout 5s;  # 60 s by default: a gateway that does not answer is left to the others sooner
    grpc_read_timeout 24h;  # 60 s by default: a queued request may wait longer for its first token
    grpc_send_timeout 24h;  # 60 s by default: as for client_body_timeout
    grpc_buffer_size 64k;  # 4k by default: metadata that explain a routing decision must fit
    grpc_socket_keepalive on;  # a gateway's host that has gone is noticed
    # A gateway that refuses the connection has seen nothing of the request: the next one gets it. Nothing that was sent
    # is sent again, whatever happens to it: a POST is not, unless "non_idempotent" stood here.
    grpc_next_upstream error timeout;
    grpc_next_upstream_tries 0;
    grpc_set_header x-real-ip $remote_addr;  # the gateways' limits are per client
    grpc_set_header expect $http_expect;  # dropped by default
    # Metadata of answers that NGINX would take for orders to itself, or keep to itself.
    grpc_ignore_headers X-Accel-Redirect X-Accel-Charset;
    grpc_pass_header X-Accel-Redirect;
    grpc_pass_header X-Accel-Charset;
    grpc_pass_header X-Accel-Expires;
    grpc_pass_header X-Accel-Limit-Rate;
    grpc_pass_header X-Accel-Buffering;
    grpc_pass_header Date;
    grpc_pass_header Server;
    location / {{ grpc_pass grpc://gateways; }}
    # What NGINX itself has to refuse is said in gRPC's terms: UNAVAILABLE.
    error_page 502 503 504 = /unavailable;
    location = /unavailable {{
      internal;
      default_type application/grpc;
      add_header grpc-status 14 always;
      add_header grpc-message "no gateway answers" always;
      return 204;
    }}
  }}
}}
"""


def find() -> Path:
    """The nginx executable of this environment or of the system.

    Raises
    ------
    StartError
        If there is none; says how to install it.
    """
    beside_python = Path(sys.executable).parent / "nginx"
    for candidate in (beside_python, shutil.which("nginx"), "/usr/sbin/nginx"):
        if candidate and Path(candidate).exists():
            return Path(candidate)
    raise StartError("nginx is missing: apt-get install nginx-light, or conda env create -f environment.yml")


class Nginx:
    """Round robin over `upstreams` on one port; see :meth:`start`."""

    title = "NGINX"

    def __init__(self, port: int, upstreams: Sequence[str], work_dir: Path, host: str = "127.0.0.1"):
        self.host, self.port = host, port
        self.log = work_dir / "nginx.log"
        self._run_folder: RunFolder | None = None
        self._settings = {
            "host": host,
            "port": port,
            "open_files": min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
            "servers": "\n".join(f"    server {upstream} max_fails=0;" for upstream in upstreams),
        }
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
            If NGINX is missing, refuses its configuration or does not listen within `timeout_s`.
        """
        binary = find()
        self.log.unlink(missing_ok=True)
        self.clean_up()
        self._run_folder = RunFolder()
        run = self._run_folder.path
        run.chmod(0o711)  # started by root, it works as a user who may do less
        (run / "nginx.conf").write_text(_CONFIG.format(run=run, **self._settings))
        self.process = processes.spawn([binary, "-p", run, "-c", run / "nginx.conf"], self.log)
        processes.wait_until(
            lambda: processes.listening(self.port, self.host), self.process, "NGINX", self.log, timeout_s
        )

    def clean_up(self) -> None:
        """Remove what it needed while it ran."""
        if self._run_folder:
            self._run_folder.remove()
            self._run_folder = None
