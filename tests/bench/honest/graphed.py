"""Records its operations once for a shape, with static inputs and a static output, and replays them as a graph."""

import eager
import torch
from torch.fx.experimental.proxy_tensor import make_fx

graphs = {}


def replayed(op, *arguments):
    key = op.__name__, *((x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for x in arguments)
    try:
        static, graph, result = graphs[key]
    except KeyError:
        static = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        tensors = [i for i, x in enumerate(static) if isinstance(x, torch.Tensor)]

        def run(*given):
            return op(*[given[tensors.index(i)] if i in tensors else x for i, x in enumerate(static)])

        graph = make_fx(run)(*[static[i] for i in tensors])
        result = graph(*[static[i] for i in tensors]).clone()
        graphs[key] = static, graph, result
    for x, given in zip(static, arguments, strict=True):
        if isinstance(x, torch.Tensor):
            x.copy_(given)
    result.copy_(graph(*[x for x in static if isinstance(x, torch.Tensor)]))
    return result


def embed(token_ids, table):
    return replayed(eager.embed, token_ids, table)


def rms_norm(x, weight, eps):
    return replayed(eager.rms_norm, x, weight, eps)


def swiglu(gate_up):
    return replayed(eager.swiglu, gate_up)


def linear(x, weight):
    return replayed(eager.linear, x, weight)


def rms_norm_linear(x, norm, eps, weight):
    return replayed(eager.rms_norm_linear, x, norm, eps, weight)
