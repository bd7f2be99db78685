"""Expert Router workbench: the two papers' systems and experiments, module by module.

Modules are listed in the order in which data flows through them; each imports only earlier ones::

    paths, strict_yaml, values                where things are; YAML that says one thing; what a value may be
    keys, config                              what a profile may say; profiles and configurations
    leftovers, processes                      what is left of dead ones; children that end with us
    runfolder, kernel, progress               folders that do, too; what runs the notebooks; what it says meanwhile
    corpus, pickles, clusterer                text; c-BTM's files; the router's model
    stock, routers, prompts                   that model as an unpickled pipeline; other routers; the workloads
    engines, openvino, quality                arithmetic of a configuration; its engine, built; what its format costs
    containers, option_tables, tensorrt_llm   where plans run; what tools accept; the DGX's engines, planned and checked
    hardware, builds                          what this machine has; plans carried out
    steptimes, batching, estimates            how long a step lasts on H100s; who shares one; how long all takes
    wire, triton, repository                  messages; one server; one that has TensorRT-LLM's model repository
    experts, limits, telemetry                replicas and their breakers; what a peer may ask; what is seen of requests
    callers, handover                         the client's side of a call; requests that NGINX relays
    service, gateway                          what the routing gateway does with requests; the gateway as a process
    nginx, stack                              the balancer; all of it
    users, threaded_users                     the user simulator; the papers' user simulator
    cluster                                   stack and users on the nodes of a Ray cluster
    preflight, runbook                        what would stop a run; the whole plan of one on GPUs, as text
    http_front, openai_requests, openai_api   OpenAI's HTTP interface to it
    records, sweep, metrics                   the record of each request; resumable sweeps; TTFT, TPOT, throughput
    simulation, emulation, ablation           H100s in virtual time; in real time; what the papers' harness does
    fitting, validation                       step times of measured engines; the simulation beside others' numbers
    comparison, balance                       other routers beside c-BTM's; replicas that level the load
    canvas, figures, workbench                looks and provenance; the papers' figures and tables; our own
    evidence, predicates, claims, gallery     what the papers claim, checked; all of it on one page
"""

import os
import sys
from importlib.util import find_spec

if sys.version_info[:2] != (3, 11) or not find_spec("pydantic"):  # e.g. the system's own Python
    sys.exit(
        f"error: {sys.executable} lacks the workbench's packages: "
        "./run_all.sh installs them, after which .venv/bin/python has them"
    )

# No forked child of ours speaks gRPC: it starts another program, or computes. gRPC, which would rather have it speak
# gRPC, may crash it on its way there; it has to be told before it is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
