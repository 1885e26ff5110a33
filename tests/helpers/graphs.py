"""What torch.compile compiles, counted, and run as it is."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch


@contextlib.contextmanager
def counted_graphs() -> Iterator[list[torch.fx.GraphModule]]:
    """Compile networks to themselves within the block, which gets the graphs.

    The backend hands the captured operations back uncompiled, so that values stay bit for bit.
    """
    graphs: list[torch.fx.GraphModule] = []
    original = torch.nn.Module.compile

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    def compile_to_itself(module: torch.nn.Module) -> None:
        original(module, backend=counting)

    torch._dynamo.reset()
    with mock.patch.object(torch.nn.Module, "compile", compile_to_itself):
        yield graphs
    torch._dynamo.reset()
