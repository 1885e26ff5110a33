"""What a computation makes: its largest new tensor, and the products of its matrix products."""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LargestMade(TorchDispatchMode):
    """Context that watches torch operations.

    Attributes:
        largest: elements of the largest tensor that owns new memory.
        products: inner products computed by mm.
    """

    def __init__(self):
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        out = (kwargs or {}).get("out")
        known |= set() if out is None else {out.untyped_storage().data_ptr()}
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, made.untyped_storage().nbytes() // made.itemsize)
        if function.__name__.startswith("mm"):
            self.products += result.numel()
        return result
