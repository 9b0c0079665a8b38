"""What is imported when: names of a package at their first use, the model once transformers has its auto classes."""

import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from threading import local
from types import ModuleType
from typing import Any


# loaded by every auto class and by the pipelines
AUTO_MODULE = "transformers.models.auto.configuration_auto"


def lazy_names(package: str, homes: Mapping[str, Collection[str]]) -> tuple[Callable[[str], Any], Callable[[], list]]:
    """
    Makes the functions `__getattr__` and `__dir__` of a package that imports names when they are first asked for.

    Args:
        package (`str`): Name of the package.
        homes (`Mapping[str, Collection[str]]`): By the name of a module inside it, the names that it provides.

    Returns:
        `tuple[Callable, Callable]`: `__getattr__` and `__dir__` (PEP 562).
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name in homes:
            return import_module(f"{package}.{name}")
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home_of[name]}"), name)

    return get, lambda: sorted({*vars(sys.modules[package]), *homes, *home_of})


class _AfterTransformers(local):
    """
    Watches the imports of transformers, without loading anything itself, and imports a module once the auto classes
    are there. It waits for the end of the outermost import, for until then parts of transformers are half loaded.
    Threads that import different parts of transformers for the first time, all at once, can meet them half loaded:
    import `synernet_hf.model` before they start.
    """

    # imports of transformers that this thread is in, and whether it asks the other finders
    depth, is_asking = 0, False

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        # a finder that asks the others too, as a second one of this kind does after a reload, must not come back here
        if name.partition(".")[0] != "transformers" or self.is_asking:
            return None
        self.is_asking = True
        try:
            specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
            spec = next(filter(None, specs), None)
        finally:
            self.is_asking = False
        # some loaders are shared by several modules
        if spec and spec.loader and not isinstance(spec.loader.exec_module, partial):
            spec.loader.exec_module = partial(self.execute, spec.loader.exec_module)
        return spec

    def execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        self.depth += 1
        try:
            execute(module)
        finally:
            self.depth -= 1
        if not self.depth and AUTO_MODULE in sys.modules:
            with suppress(ValueError):
                sys.meta_path.remove(self)
            import_module(self.module)


def import_with_auto_classes(module: str) -> None:
    """Imports a module as soon as the auto classes of transformers are imported: now, if they are already."""
    if AUTO_MODULE in sys.modules:
        import_module(module)
    else:
        sys.meta_path.insert(0, _AfterTransformers(module))


__all__ = ["import_with_auto_classes", "lazy_names"]
