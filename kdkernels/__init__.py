"""Fused kernels for distilling and fine-tuning compact language models.

Public names come from :mod:`kdkernels.api`; kernel contracts are in :mod:`kdkernels.ops`.
"""

import os
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

if "_KDKERNELS_COMPLETE" in os.environ:
    # A shell asks for completions, on every Tab: that takes the command line alone, and no torch.
    from importlib.util import find_spec, module_from_spec

    _spec = find_spec("kdkernels.api")
    assert _spec is not None
    sys.modules["kdkernels.api"] = module_from_spec(_spec)
    _public: list[str] = []
else:
    from kdkernels import ops
    from kdkernels.api import *  # noqa: F403  # the façade: this package is its API
    from kdkernels.api import __all__ as _public

try:
    __version__ = version("kdkernels")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [*_public, "__version__", "ops"]


def __getattr__(name: str) -> ModuleType:
    # Imported when asked for: they need transformers and Lightning, which take seconds.
    if name in ("hf", "lightning"):
        return import_module(f"kdkernels.api.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
