"""Triton Python-backend model: one vLLM engine, in a process of its own, because it needs a newer numpy than Triton.

What the two say to each other is in ``process.py``. vLLM steps on while tokens are on their way to clients, and hears
of newcomers within :data:`WAIT_S`.
"""

import contextlib
import json
import os
import queue
import subprocess
import threading
import time
from multiprocessing import Pipe
from pathlib import Path

import inflight

EXPERT = "er-expert"
"""Metadata that names the expert of a request; Triton makes a parameter of it."""
WAIT_S = 0.002


class Engine(inflight.NoEviction):
    def __init__(self, parameters, adapters):
        slots, kv_blocks, context = (int(parameters[k]) for k in ("max_batch_size", "kv_blocks", "context_tokens"))
        super().__init__(slots, kv_blocks, int(parameters["kv_block_tokens"]), context)
        threading.Thread(target=_end_with_the_server, args=(os.getppid(),), daemon=True).start()
        self.connection, theirs = Pipe()
        self.process = subprocess.Popen(
            [f"{parameters['environment']}/bin/python", Path(__file__).with_name("process.py"), str(theirs.fileno())],
            stdin=subprocess.PIPE,  # nothing is written to it: it closes when we end, however we do
            pass_fds=[theirs.fileno()],
            env=os.environ | json.loads(parameters["variables"]),
        )
        theirs.close()
        engine_args = {"model": parameters["engine"], **json.loads(parameters["engine_args"])}
        self._send({"engine_args": engine_args, "adapters": adapters})
        try:
            said = json.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            said = {"failed": f"its process ended with code {self.process.wait()}"}
        if "failed" in said:
            raise RuntimeError(f"vLLM did not start: {said['failed']}")
        if said["kv_blocks"] < kv_blocks:
            raise RuntimeError(f"vLLM has {said['kv_blocks']} KV blocks, not the {kv_blocks} that it was asked for")
        self.may_admit = False  # something has changed since nobody could be
        self.steps = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def submit(self, sequence):
        super().submit(sequence)
        self.may_admit = True

    def step(self):
        if self.may_admit:
            self.may_admit = False
            for number, sequence in self.admit():
                asked = {"max_tokens": sequence.max_tokens, "end_id": sequence.end_id, "expert": sequence.expert}
                self._send({"add": number, "prompt": sequence.token_ids, **asked})
        ready = {}
        for number, tokens, done in self._generated():
            if sequence := self.running.get(number):  # or what it was too late to abort
                before = ready[number][1] if number in ready else []
                ready[number] = sequence, before + tokens, done
                if done:
                    self.release(number)
        for number in [number for number, sequence in self.running.items() if sequence.cancelled]:
            self._send({"abort": number})
            self.release(number)
            self.may_admit = True
        return list(ready.values())

    def _generated(self):
        """Of all steps that vLLM has made since we were here; it is waited for one, but not for long."""
        try:
            steps = [self.steps.get(timeout=WAIT_S)]
        except queue.Empty:
            return []
        steps += [self.steps.get_nowait() for _ in range(self.steps.qsize())]  # nobody else takes them
        if None in steps:
            raise RuntimeError(f"vLLM's process has ended with code {self.process.wait()}")
        self.may_admit = True
        return [generated for step in steps for generated in step]

    def _read(self):
        """Take all that vLLM says at once, lest it waits for us to read while we wait for it to."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                self.steps.put(json.loads(self.connection.recv_bytes()))
        self.steps.put(None)

    def _send(self, message):
        self.connection.send_bytes(json.dumps(message).encode())


def _end_with_the_server(server):
    """Triton's process of a model lives on if the server is killed, and so would vLLM's, which has the GPU's memory."""
    while os.getppid() == server:
        time.sleep(0.5)
    os._exit(1)


class TritonPythonModel(inflight.Model):
    def load(self, parameters):
        several = sorted((name for name in parameters if name.startswith("adapter-")), key=lambda name: int(name[8:]))
        self.experts = len(several)
        self.has_one_adapter = "adapter" in parameters
        names = ["adapter"] if self.has_one_adapter else several
        return Engine(parameters, [parameters[name] for name in names])

    def read(self, request):
        sequence = super().read(request)
        sequence.expert = 0 if self.has_one_adapter else self._expert(request) if self.experts else None
        return sequence

    def finalize(self):
        super().finalize()
        self.engine.close()

    def _expert(self, request):
        said = json.loads(request.parameters() or "{}").get(EXPERT)
        if said is None or not said.isdecimal() or int(said) >= self.experts:
            raise inflight.BadRequest(
                f"this server has {self.experts} experts, and metadata {EXPERT} must name one, not {said!r}"
            )
        return int(said)
