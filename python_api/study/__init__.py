"""A study of label regularisers, behind ``kdkernels study``.

``config`` (what a study is), ``grid`` (its trials), ``store`` (trials and results in a database,
by Optuna), ``tasks`` (names of tasks), ``students`` (the models), ``teacher`` (logits, computed
once), ``train`` (one trial), ``worker`` (takes trials until none is left), ``runner`` (the
command), ``estimate`` (the dry run), ``analysis`` (statistics), ``plot`` and ``report``.
"""
