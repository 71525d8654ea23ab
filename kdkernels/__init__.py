"""Fused kernels for distilling and fine-tuning compact language models.

Public names come from :mod:`kdkernels.api`; kernel contracts are in :mod:`kdkernels.ops`.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from kdkernels import ops
from kdkernels.api import *  # noqa: F403  # the façade: this package is its API
from kdkernels.api import __all__ as _public

try:
    __version__ = version("kdkernels")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [*_public, "__version__", "ops"]


def __getattr__(name: str) -> ModuleType:
    # Imported when asked for: it needs transformers, which takes seconds.
    if name == "hf":
        return import_module("kdkernels.api.hf")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
