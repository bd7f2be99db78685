"""Expert Router workbench: the two papers' systems and experiments, module by module.

Modules are listed in the order in which data flows through them; each imports only earlier ones::

    paths, config, processes                  where things are; profiles and configurations; children that end with us
    corpus, pickles, clusterer                text; c-BTM's files; the router's model
    stock, prompts                            that model as an unpickled scikit-learn pipeline; the workloads
    engines, openvino, quality                arithmetic of a configuration; its engine, built; what its format costs
    wire, triton, gateway, nginx, stack       messages; one server; the routing gateway; the balancer; all of it
    users, threaded_users                     the user simulator; the papers' user simulator
    records, sweep                            the record of each request; resumable sweeps
    steptimes, batching, simulation           H100 step times; in-flight batching; experiments in virtual time
    metrics, validation, canvas, figures      TTFT, TPOT, throughput; beside others' numbers; looks; every figure
    evidence, predicates, claims, gallery     what the papers claim, checked; all of it on one page
"""
