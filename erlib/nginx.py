"""The load balancer in front of the gateways: real NGINX, gRPC, round robin (papers, section III-A)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from erlib import processes
from erlib.processes import StartError

# Every limit whose default would cut a long streaming run short is set: 60 s read timeouts (a queued request may wait
# longer for its first token), 128 concurrent streams, 1,000 requests a connection, retries.
_CONFIG = """\
worker_processes 1;  # one worker, so that round robin is exact
daemon off;
pid "{run}/nginx.pid";
error_log stderr warn;
events {{ worker_connections 16384; }}
http {{
  access_log off;
  client_body_temp_path "{run}/body"; proxy_temp_path "{run}/proxy"; fastcgi_temp_path "{run}/fastcgi";
  uwsgi_temp_path "{run}/uwsgi"; scgi_temp_path "{run}/scgi";
  upstream gateways {{
{servers}
    keepalive 1024;
  }}
  server {{
    listen {host}:{port} http2;
    http2_max_concurrent_streams 8192;
    keepalive_requests 1000000000;
    keepalive_timeout 24h;
    client_max_body_size 64m;
    client_body_timeout 24h;
    grpc_read_timeout 24h;
    grpc_send_timeout 24h;
    grpc_next_upstream off;
    grpc_socket_keepalive on;
    location / {{ grpc_pass grpc://gateways; }}
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
        self._run = work_dir / "nginx"
        self._config = _CONFIG.format(
            run=self._run,
            host=host,
            port=port,
            servers="\n".join(f"    server {upstream};" for upstream in upstreams),
        )
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
        self._run.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        config = self._run / "nginx.conf"
        config.write_text(self._config)
        self.process = processes.spawn([find(), "-p", self._run, "-c", config], self.log)
        processes.wait_until(
            lambda: processes.listening(self.port, self.host), self.process, "NGINX", self.log, timeout_s
        )
