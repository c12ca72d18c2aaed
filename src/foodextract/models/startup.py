"""Fast start: what transformers imports and extraction never uses is imported on first use.

Importing a model class of transformers also imports scipy, accelerate and PyTorch's compiler with sympy, which takes
longer than PyTorch itself. Inside `deferred_imports` these modules are stand-ins. A name taken from one is resolved
when it is called or inspected, so training or compiling later in the same process works as usual. Modules that are
already loaded are left alone.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

UNUSED = (
    "accelerate",
    "num2words",
    "scipy",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.fx.experimental.symbolic_shapes",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.ops",
)


class _Deferred:
    """A function or class that is resolved on first use. While imports are deferred, calls (of decorators) are, too."""

    def __init__(self, module: str, resolve: Callable[[], Any]) -> None:
        self._module, self._resolve = module, resolve

    def __call__(self, *args: Any, **options: Any) -> Any:
        if _FINDER in sys.meta_path:
            return _Deferred(self._module, lambda: self._resolve()(*args, **options))
        return self._resolve()(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._resolve(), name)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else self._resolve().__get__(instance, owner)

    def __instancecheck__(self, instance: object) -> bool:
        return self._module in sys.modules and isinstance(instance, self._resolve())


class _StandIn(ModuleType):
    """A module whose names are imported on first use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if _FINDER not in sys.meta_path:
            return getattr(importlib.import_module(self.__name__), name)
        return _Deferred(self.__name__, lambda: getattr(importlib.import_module(self.__name__), name))


class _Finder(MetaPathFinder, Loader):
    """Finds stand-ins for the modules `UNUSED` that are installed, and for modules within stand-ins."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        within = isinstance(sys.modules.get(name.rpartition(".")[0]), _StandIn)
        if within or (name in UNUSED and PathFinder.find_spec(name, path)):
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to execute."""


_FINDER = _Finder()


@contextmanager
def deferred_imports() -> Iterator[None]:
    """Import the modules `UNUSED` on first use instead of inside this block."""
    sys.meta_path.insert(0, _FINDER)
    try:
        yield
    finally:
        sys.meta_path.remove(_FINDER)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
            del sys.modules[name]


class SkipInitialization(torch.overrides.TorchFunctionMode):
    """Skip initial values on the meta device, where PyTorch would import its compiler. Loading sets every weight."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            tensor = kwargs.get("tensor", args[0] if args else None)
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        if func is torch.arange and torch.device(kwargs.get("device") or "cpu").type == "meta":
            kwargs = kwargs | {"device": "cpu"}  # rotary frequencies are computed from it
        return func(*args, **kwargs)
