"""Expert Router workbench: the two papers' systems and experiments.

Rooms are listed in the order in which data flows through them; each imports only earlier ones, which CI checks::

    paths, cache, machine   where things are; what is kept by its content; processes that end with us
    provenance, config      which code made something; profiles and configurations, validated
    workload                corpora, and the prompts cut from them
    routing                 c-BTM's clusterer, other routers, how they compare
    engines                 what stands for the papers' models on a laptop; Table I, recomputed
    experts                 one expert trained per cluster, as c-BTM's are; what routing to them is worth
    serving                 messages, Triton, NGINX, the stack of them, an OpenAI front
    gateway                 the routing gateway, a process of its own
    load                    users, resumable sweeps, the record of each request, metrics (TTFT, TPOT, throughput)
    paper_scale             eight H100s in virtual time and in real time; replicas; the papers' harness
    claims                  what the papers claim, checked
    report                  figures and tables of both papers, figures of our own, all of it on one page
    cluster, dgx            a Ray cluster's nodes; TensorRT-LLM on GPUs: nobody but scripts and one table imports them
"""

import os
import sys
from importlib.util import find_spec

if sys.version_info[:2] not in ((3, 11), (3, 12)) or not find_spec("pydantic"):  # e.g. the system's own Python
    sys.exit(
        f"error: {sys.executable} lacks the workbench's packages: "
        "./run_all.sh installs them, after which .venv/bin/python has them"
    )

# No forked child of ours speaks gRPC: it starts another program, or computes. gRPC, which would rather have it speak
# gRPC, may crash it on its way there; it has to be told before it is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
