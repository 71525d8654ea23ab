"""Distillation from start to end, behind ``kdkernels distill``.

One module per concern: ``config`` (what a run is), ``fetch`` (verified downloads), ``data``,
``sentiment`` and ``own_data`` (tasks), ``text`` and ``models`` (inputs and networks), ``train``
(the loops around ``kdkernels.kd_loss``), ``pipeline`` (units of work, resuming), ``store`` (files),
``measure``, ``results``, ``report``, ``plot`` and ``progress`` (what is shown), and ``runner``, the
door to all of it.
"""
