"""Expert Router workbench: the two papers' systems and experiments, module by module.

Modules are listed in the order in which data flows through them; each imports only earlier ones::

    paths, config                             where things are; profiles and configurations
    corpus, clusterer, prompts                text, the c-BTM router's model, the workloads
    engines, openvino                         arithmetic of a configuration; its engine, built and measured
    wire, processes                           messages; child processes that never outlive us
    triton, gateway, nginx, stack             one server; the routing gateway; the balancer; all of it
    users, records, sweep                     the user simulator; the record of each request; resumable sweeps
    metrics, canvas, figures                  TTFT, TPOT, throughput; looks and provenance; every figure and table
"""
