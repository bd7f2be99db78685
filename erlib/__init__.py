"""Expert Router workbench: the two papers' systems and experiments, module by module.

Modules are listed in the order in which data flows through them; each imports only earlier ones::

    paths, config                     where things are; profiles and engine specifications
    corpus, clusterer, prompts        text, the c-BTM router's model, the workloads
    engines, openvino                 specification -> built engine; memory arithmetic
    triton, gateway, nginx, stack     one server; the routing gateway; the balancer; all of it
    users, records, metrics, sweep    the user simulator; what it measured; resumable sweeps
    figures                           every figure and table of both papers
"""
