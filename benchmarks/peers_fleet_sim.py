"""The part of :mod:`benchmarks.peers` that runs under vllm-sr-sim's own Python: it knows nothing of the workbench.

Reads a question as JSON from standard input, writes the answer as JSON to standard output. ``workload``: requests of
its bundled Azure lengths. Else: a fleet of one pool replays a trace in the form of its semantic router.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import fleet_sim
from fleet_sim.workload.synthetic import CdfWorkload, PoissonWorkload
from fleet_sim.workload.trace import TraceWorkload

LONGEST = 8192
"""Tokens of a request: the last of the bundled Azure lengths."""


def workload(question: dict[str, Any]) -> list[list[float]]:
    """Arrival, input and output tokens of each request, drawn by its own generator."""
    lengths = json.loads((Path(fleet_sim.__file__).parent / "data" / "azure_cdf.json").read_text(encoding="utf-8"))
    drawn = PoissonWorkload(question["rate"], CdfWorkload(lengths), question["requests"], seed=0).generate()
    return [[arrival, request.l_in, request.l_out] for arrival, request in drawn]


class Fleet:
    """GPUs of one kind, with step times as vllm-sr-sim computes them from hardware and model."""

    def __init__(self, question: dict[str, Any]):
        model = getattr(fleet_sim, question["model"])
        self._width = question["width"]
        serving = fleet_sim.ServingConfig(tp=self._width, dtype_bytes=2, max_slots=question["slots"])
        self.profile = fleet_sim.ProfileBuilder().build(fleet_sim.H100_SXM, model, serving)
        self._trace = TraceWorkload(question["trace"], fmt="semantic_router").generate()
        self._bound_s = question["ttft_s"]

    def p99_ttft_s(self, instances: int, faster: float = 1.0) -> float:
        """Nearest rank over all requests of the trace; those that a full queue turns away count as infinite."""
        requests = [
            (at / faster, fleet_sim.Request(its.req_id, at / faster, its.l_in, its.l_out, its.category))
            for at, its in self._trace
        ]
        pool = fleet_sim.PoolConfig("all", self.profile, instances, LONGEST)
        result = fleet_sim.Fleet(fleet_sim.FleetConfig(pools=[pool])).run(requests)
        waits = sorted(its.ttft for its in result.completed if its.ttft is not None)
        place = -(-99 * len(requests) // 100) - 1
        return waits[place] if place < len(waits) else float("inf")

    def fewest_gpus(self) -> dict[str, Any]:
        """That keep to the bound at the trace's own rate."""
        for instances in range(1, 17):
            if (found := self.p99_ttft_s(instances)) <= self._bound_s:
                return {"gpus": instances * self._width, "ttft_p99_s": found}
        return {"gpus": None, "ttft_p99_s": None}

    def most_requests_per_s(self, gpus: int, at_most: float) -> float:
        """That so many GPUs carry, in the trace's rhythm, within a twentieth; not asked beyond `at_most`."""
        rate = (len(self._trace) - 1) / self._trace[-1][0]
        instances, carried, failed = gpus // self._width, 0.0, at_most
        if self.p99_ttft_s(instances, at_most / rate) <= self._bound_s:
            return at_most
        while failed > max(1.05 * carried, 0.1):
            tried = (carried * failed) ** 0.5 or failed / 2
            if self.p99_ttft_s(instances, tried / rate) <= self._bound_s:
                carried = tried
            else:
                failed = tried
        return carried


def main() -> None:
    """Answer one question."""
    question = json.load(sys.stdin)
    if "workload" in question:
        answer: Any = workload(question)
    elif "azure" in question:
        answer = len(TraceWorkload(question["azure"], fmt="azure_csv").generate())
    else:
        fleet = Fleet(question)
        answer = fleet.fewest_gpus() | {"slots": fleet.profile.n_slots(LONGEST)}
        answer |= {"most_requests_per_s": fleet.most_requests_per_s(question["gpus"], question["at_most"])}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
