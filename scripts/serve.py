"""Bring one system up and keep it up until Ctrl-C: for a client of your own, or a load generator."""

from __future__ import annotations

import argparse
import contextlib
import functools
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a Python without erlib finds it there, and is told more

from erlib import config, paths
from erlib.load import backends, experiments
from erlib.machine import processes
from erlib.serving import stack

_LONGER = "--set scale.tokens=1 gives the papers' lengths"
_WATCH_S = 2.0
"""How often it looks for what has died."""


def main() -> int:
    args = _arguments()
    try:
        profile = config.load_profile(args.profile, config.read_overrides(args.set))
        (asked,) = backends.of(profile).configurations(profile, [args.configuration])
        if args.metrics and asked.routing in ("direct", "round_robin"):
            raise config.ConfigError(f"{asked.id} has no gateways, whose metrics --metrics would serve")
        (system,) = experiments.systems(profile, [asked])
        return _serve(profile, system, backends.of(profile).context_tokens(profile, asked), args)
    except (config.ConfigError, processes.StartError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _serve(profile: config.Profile, system: experiments.System, context: int, args: argparse.Namespace) -> int:
    settings, logs = profile.serving, paths.run_dir(profile.name) / "logs" / "serve"
    if args.openai:
        processes.require_free_ports([args.openai], settings.host)
    with stack.Stack(
        system.config, system.servers, system.routing, settings, system.router, logs, system.classifier,
        metrics_port=args.metrics, adapters=system.adapters,
    ) as running:  # fmt: skip
        front = None
        try:
            if args.openai:
                front = _start_front(args, settings, running, system, logs)
                print(f"OpenAI's interface: http://{settings.host}:{args.openai}/v1, model expert-router")
            print(f"gRPC (KServe v2, model ensemble): {', '.join(running.targets)}")
            print(f"experts: {', '.join(server.url for server in running.servers)}")
            if running.metrics_targets:
                print(f"Prometheus scrapes, of every gateway, http://HOST:PORT/metrics: {running.metrics_targets}")
            print(f"context: {context} tokens, prompt and answer{f'; {_LONGER}' if profile.scale.tokens > 1 else ''}")
            print(f"tokenizer: {system.tokenizer.parent}")
            with contextlib.suppress(SystemExit):  # a signal's; what we are for is done
                print(f"logs: {logs}\nCtrl-C stops everything", flush=True)
                while True:
                    time.sleep(_WATCH_S)
                    for line in running.revive():
                        print(line, file=sys.stderr, flush=True)
                    if front and front.poll() is not None:
                        print(f"OpenAI front died with code {front.returncode}; it is started again", file=sys.stderr)
                        front = _start_front(args, settings, running, system, logs)
        finally:
            if front:
                processes.stop([front], grace_s=1)
    return 0


def _start_front(
    args: argparse.Namespace,
    settings: config.ServingSettings,
    running: stack.Stack,
    system: experiments.System,
    logs: Path,
) -> subprocess.Popen[bytes]:
    command = processes.python(
        "-m", "erlib.serving.openai_api", "--port", str(args.openai), "--host", settings.host,
        "--router", running.targets[0], "--tokenizer", system.tokenizer, "--cors", *args.cors,
    )  # fmt: skip
    front, log = processes.spawn(command, logs / "openai.log"), logs / "openai.log"
    ready = functools.partial(processes.listening, args.openai, settings.host)
    try:
        processes.wait_until(ready, front, "OpenAI front", log, settings.start_timeout_s)
    except BaseException:
        processes.stop([front], grace_s=0)
        raise
    return front


def _arguments() -> argparse.Namespace:
    laptop = config.load_profile("laptop")
    contexts = [
        f"{name} {backends.of(laptop).context_tokens(laptop, config.load_configuration(name))}"
        for name in config.config_ids()
    ]
    parser = argparse.ArgumentParser(
        prog="python scripts/serve.py",
        description=__doc__,
        epilog=f"context of the laptop profile, in tokens, prompt and answer: {', '.join(contexts)}; {_LONGER}",
    )
    parser.add_argument("configuration", metavar="CONFIG", help="e.g. p2.E")
    parser.add_argument("--profile", default="laptop", metavar="NAME|FILE.yaml")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="change a profile key, as in ./run_all.sh (whose --help lists them)",
    )  # fmt: skip
    parser.add_argument("--openai", type=_port, metavar="PORT", help="also serve OpenAI's HTTP interface there")
    parser.add_argument(
        "--cors", nargs="+", default=[], metavar="ORIGIN",
        help="let pages from there ask it in a browser, e.g. https://chat.example; *: all pages",
    )  # fmt: skip
    parser.add_argument(
        "--metrics", type=_port, metavar="PORT", help="also serve Prometheus metrics: those of gateway i at PORT + i"
    )
    return parser.parse_args()


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port")
    return int(text)


if __name__ == "__main__":
    processes.end_on_signals(signal.SIGINT)
    sys.exit(main())
