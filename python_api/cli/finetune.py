"""``kdkernels finetune``: fine-tune a pretrained or distilled model on a task, and score it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kdkernels.api.cli import complete
from kdkernels.api.cli.distill import Device, Out, Precision, Resume, Threads
from kdkernels.api.cli.runs import one_sentence, parse_lists

LISTS = {"student_layers": int, "seeds": int}

# As in ``kdkernels distill``: every option is None unless given.
Model = Annotated[
    str | None,
    typer.Option(
        help="The model, a transformers folder: a student of kdkernels distill, any encoder, also "
        "with a masked-language-model head [default: the demo's, downloaded]."
    ),
]
StudentLayers = Annotated[
    str | None,
    typer.Option(help="Layers of it to keep, such as 0,5; the others are cut out [default: all]."),
]
Task = Annotated[
    str | None,
    typer.Option(
        help="sentiment, r8, r52, 20news (topics), ner, qa, or of GLUE cola, sst-2, mrpc, qqp, "
        "sts-b, mnli, qnli, rte, wnli [default: sentiment].",
        autocompletion=complete.words(*complete.TASKS[:6], *complete.TASKS[8:]),
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Your own: texts as for kdkernels distill (sentiment), CoNLL columns (ner), SQuAD's "
        "JSON (qa). GLUE: the folder of the task's files, or the one with the folders of all "
        "tasks; needed, but for sts-b."
    ),
]
Labels = Annotated[int | None, typer.Option(help="Training examples [default: all].")]
Dev = Annotated[
    int | None,
    typer.Option(help="Dev examples, which choose the model that is kept [default: all]."),
]
Test = Annotated[int | None, typer.Option(help="Test examples [default: all].")]
Seeds = Annotated[str | None, typer.Option(help="One training for each [default: 0,1,2].")]
LearningRate = Annotated[
    float | None,
    typer.Option(help="Peak learning rate, with linear decay to zero [default: 1e-4]."),
]
Epochs = Annotated[int | None, typer.Option(help="Epochs [default: 3].")]
BatchSize = Annotated[int | None, typer.Option(help="Examples per step [default: 32].")]
MaxLength = Annotated[
    int | None,
    typer.Option(help="Longest input in tokens [default: 128; r8, r52: 96; qa: 192]."),
]
TrainEmbeddings = Annotated[
    bool | None,
    typer.Option(
        "--train-embeddings/--freeze-embeddings",
        help="Train the embeddings too, or not (faster) [default: train].",
    ),
]
Evaluations = Annotated[int | None, typer.Option(help="Dev figures while training [default: 6].")]
Patience = Annotated[
    int | None,
    typer.Option(
        help="Stop after so many dev figures without a better one, and keep the best weights "
        "[default: to the end]."
    ),
]
Name = Annotated[str | None, typer.Option(help="Name of the run [default: finetune].")]
Quick = Annotated[
    bool, typer.Option("--quick", help="A tiny run that only shows that everything works.")
]


def finetune(
    model: Model = None,
    task: Task = None,
    data: Data = None,
    student_layers: StudentLayers = None,
    labels: Labels = None,
    dev: Dev = None,
    test: Test = None,
    seeds: Seeds = None,
    lr: LearningRate = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    max_length: MaxLength = None,
    train_embeddings: TrainEmbeddings = None,
    evaluations: Evaluations = None,
    patience: Patience = None,
    precision: Precision = None,
    device: Device = None,
    threads: Threads = None,
    quick: Quick = False,
    name: Name = None,
    out: Out = None,
    resume: Resume = False,
) -> None:
    """Fine-tune a pretrained or distilled model on a task, and score it.

    The figures are the task's own, on its test examples: mean and standard deviation over seeds.
    Everything is written to runs/NAME, the best seed's model to runs/NAME/student; --resume
    continues after an interruption.
    """
    options: dict[str, Any] = dict(locals())
    del options["resume"]
    options["quick"] = quick or None  # a flag that was not set was not given
    given = {key: value for key, value in options.items() if value is not None}
    with one_sentence("finetune"):
        from rich.console import Console

        parse_lists(given, LISTS)
        from kdkernels.api.distill.runner import distill

        distill({"objective": "finetune", **given}, resume, Console())
