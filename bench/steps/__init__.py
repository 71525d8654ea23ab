"""Whole steps of the methods, measured as the ops are.

A file of this folder offers ``CASE`` as those of ``kdkernels.bench.cases``, without ``checks`` and
``triton_calls``; its inputs begin with the parameters of a model, and beside it has

- ``op``: the op whose backends it can run on;
- ``checked_rows``: the batch on which results and gradients are compared in float64;
- ``quick_shape``: what ``--quick`` measures.
"""

from __future__ import annotations

import pkgutil


def names() -> list[str]:
    """The steps that can be measured."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))
