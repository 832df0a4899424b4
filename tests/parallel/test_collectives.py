"""Collectives inside compiled graphs."""

import torch
from torch._dynamo.backends.common import aot_autograd

from lcpt.parallel import groups
from lcpt.parallel.collectives import all_gather, all_to_all


def collectives_in_graphs():
    """Of a function that needs one of its two results, forwards and backwards."""
    groups.join("cpu")
    name = torch.distributed.group.WORLD.group_name
    found = {"forward": [], "backward": []}

    def noting(direction):
        def compiler(graph, inputs):
            arguments = [str(x) for node in graph.graph.nodes for x in (node.target, *node.args)]
            found[direction] += [x for x in arguments if x.startswith("lcpt.")]
            return graph

        return compiler

    @torch.compile(backend=aot_autograd(fw_compiler=noting("forward"), bw_compiler=noting("backward")), fullgraph=True)
    def exchange(x):
        all_gather(x, 1, name)
        return all_to_all(x, [len(x)], [len(x)], name)

    x = torch.randn(4, requires_grad=True)
    y = exchange(x)
    y.sum().backward()
    groups.leave()
    return found, torch.equal(y, x), torch.equal(x.grad, torch.ones(4))


def test_a_graph_keeps_collectives_whose_result_is_not_used(run_ranks):
    """On another rank it may be used: that one would wait."""
    [(found, *equal)] = run_ranks(collectives_in_graphs, 1, timeout=180)
    assert found["forward"] == ["lcpt.all_gather.default", "lcpt.all_to_all.default"]
    assert found["backward"] == ["lcpt.all_to_all.default"] and all(equal)
