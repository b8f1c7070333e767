"""Bytes of all tensors that are alive, exactly, moment by moment: also of autograd's, also of fake ones."""

import contextlib
import weakref
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Follows every storage that an operation returns until it dies; `now` and `peak` are bytes.

    What an operation takes and gives back inside itself is not seen, nor are the buffers of a communication library.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
        self.now += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class SentBytes(TorchDispatchMode):
    """Adds up the whole tensors of collectives, an all-reduce twice: bytes on a ring before the factor (n - 1) / n."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            sizes = [leaf.numel() * leaf.element_size() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.bytes += max(sizes, default=0) * (2 if "allreduce" in func.name() else 1)
        return func(*args, **(kwargs or {}))


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind some tensors, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@contextlib.contextmanager
def fake_job(world_size: int) -> Iterator[FakeTensorMode]:
    """A job of which only rank 0 exists, whose tensors have shapes and no memory.

    DeepSpeed asks tensors for numbers (norms, flags); a fake one answers 1, or False. For the whole process: use it in
    one of its own.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    new_group = dist.new_group
    dist.new_group = lambda *args, backend=None, **kwargs: new_group(*args, **kwargs)  # gloo groups, too, are fake
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    FakeTensor.item = FakeTensor.__float__ = lambda tensor: 1.0
    FakeTensor.tolist = lambda tensor: [1.0] * tensor.numel()
    FakeTensor.__bool__ = lambda tensor: False
    FakeTensor.data_ptr = lambda tensor: 0
    # Fake parameters cannot be converted in place: `in_compute_type` does it, and DeepSpeed finds it done.
    torch.nn.Module.bfloat16 = torch.nn.Module.float = lambda module: module
    torch.nn.Module.to = lambda module, *args, **kwargs: module
    with FakeTensorMode() as mode:
        yield mode


def in_compute_type(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model with new parameters of that type, their notes kept."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                converted = torch.nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
                converted.__dict__.update(parameter.__dict__)
                module._parameters[name] = converted
    return model
