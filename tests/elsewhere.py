"""A device that is not the CPU, for machines without one: real numbers, strict about company.

    with elsewhere():
        model = moved(base.load())
        model(ids.to(HERE))     # works
        model(ids)              # raises MixedDevices, as CUDA does

Tensors of this device keep their numbers in a tensor of the CPU. Every operation looks at where its
tensors are, as CUDA's do: all on one device, but that a CPU tensor of no dimension is a number, and
that CPU indices may pick from a tensor elsewhere. `numpy()` fails, `cpu()` brings the numbers back.
The device is called "meta" because autograd asks a driver about any other.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HERE = torch.device("meta")
aten = torch.ops.aten
CROSSING = {aten.copy_, aten._to_copy}
PICKING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class MixedDevices(RuntimeError):
    """Tensors of two devices met in one operation."""


class Away(torch.Tensor):
    """A tensor of the other device."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=HERE,
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"Away({self.held})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return done(operation, args, kwargs or {})


class _Elsewhere(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        with self:  # under inference_mode operations come whole that autograd takes apart
            parts = operation.decompose(*args, **(kwargs or {}))
        return done(operation, args, kwargs or {}) if parts is NotImplemented else parts


class _Made(TorchFunctionMode):
    """What is no operation that could be seen: filling a new tensor, reading all numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.tolist and isinstance(args[0], Away):
            return args[0].held.tolist()
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], _index(args[1]), *args[2:])
        goes = kwargs.get("device")
        if function in (torch.tensor, torch.as_tensor) and goes is not None:
            made = function(*args, **{**kwargs, "device": None})
            return made.to(goes)
        return function(*args, **kwargs)


@contextmanager
def elsewhere():
    """Tensors are made on the other device wherever `device=HERE` is said."""
    # Inference mode cannot make some views of a wrapped tensor: its tensors have no version.
    with mock.patch.object(torch, "inference_mode", torch.no_grad), _Elsewhere(), _Made():
        yield


def moved(module):
    """`module` with its parameters and buffers on the other device, in place."""
    seen = {}
    for own in module.modules():
        for table in (own._parameters, own._buffers):
            for key, value in table.items():
                if value is None or isinstance(value, Away):
                    continue
                if id(value) not in seen:
                    other = Away(value.detach().clone())
                    if table is own._parameters:
                        other = nn.Parameter(other, requires_grad=value.requires_grad)
                    seen[id(value)] = other
                table[key] = seen[id(value)]
    return module


def done(operation, args, kwargs):
    """One operation on the numbers, after a look at where its tensors are."""
    packet = operation.overloadpacket
    given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    away = any(isinstance(one, Away) for one in given)
    assert not any(one.is_meta and not isinstance(one, Away) for one in given), "made unseen"
    if away and packet not in CROSSING:
        judged = given
        if packet in PICKING and isinstance(args[0], Away):
            judged = [one for one in tree_leaves((args[0], args[2:])) if torch.is_tensor(one)]
        for one in judged:
            if not isinstance(one, Away) and one.dim():
                shapes = [(tuple(t.shape), str(t.device)) for t in given]
                raise MixedDevices(f"{operation} on tensors of two devices: {shapes}")
    goes = kwargs.get("device")
    if goes is not None:
        away = torch.device(goes).type == HERE.type
        kwargs = {**kwargs, "device": "cpu"}
    found = operation(*tree_map(_numbers, args), **tree_map(_numbers, kwargs))
    if found is not None and packet.__name__.endswith("_") and packet.__name__[0] != "_":
        return args[0]
    return tree_map(_wrapped, found) if away else found


def _index(given):
    """Lists and ranges of an index as tensors of the CPU, which may pick from any other."""
    if isinstance(given, tuple):
        return tuple(map(_index, given))
    return torch.tensor(given) if isinstance(given, list | range) else given


def _numbers(one):
    return one.held if isinstance(one, Away) else one


def _wrapped(one):
    return Away(one) if isinstance(one, torch.Tensor) else one
