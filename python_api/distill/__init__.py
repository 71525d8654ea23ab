"""Distillation from start to end, behind ``kdkernels distill``.

One module per concern: ``config`` (what a run is), ``fetch`` (verified downloads), ``units`` (units
of work, resuming), ``store`` (files), ``train`` (the training loop), ``tables`` and ``progress``
(what is shown), and ``runner``, the door to all of it.

Classification: ``data``, ``sentiment`` and ``own_data`` (tasks), ``text`` and ``models`` (inputs
and networks), ``pipeline``, ``measure``, ``results``, ``report``, ``plot``. Language models: the
same with ``lm_`` in front. Recipes from hidden states: ``recipes`` (what each learns from),
``recipes_fused`` and ``recipes_eager`` (the losses), and the same with ``recipe_`` in front.

Fine-tuning methods: ``task`` (the interface of what they train on), ``tasks`` (its
implementations), ``topics``, ``conll`` and ``squad`` (their data), ``index`` (files of pip's index,
without pip).
"""
