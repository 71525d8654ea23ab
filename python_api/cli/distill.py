"""``kdkernels distill``: fine-tune a teacher, distil it, compare."""

from __future__ import annotations

from typing import Annotated, Any

import typer

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

# Every option is None unless given: the defaults depend on --data and --quick, and a resumed run
# compares only what was given. Defaults are therefore written into the help texts.
Name = Annotated[str | None, typer.Option(help="Name of the run [default: demo].")]
Out = Annotated[str | None, typer.Option(help="Folder of all runs [default: runs].")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a stopped run.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="A tiny run that only shows that everything works.")
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Your texts, .csv or .jsonl: columns text, label (empty: unlabelled transfer text) "
        "and optionally split (train, dev, test, transfer)."
    ),
]
Teacher = Annotated[str | None, typer.Option(help="Your teacher, a transformers folder.")]
Student = Annotated[str | None, typer.Option(help="Your student, a transformers folder.")]
StudentLayers = Annotated[
    str | None, typer.Option(help="Layers of the teacher the student is cut from [default: 0,5].")
]
Labels = Annotated[
    int | None, typer.Option(help="Labelled training texts [default: 2000; own data: all].")
]
Transfer = Annotated[
    int | None, typer.Option(help="Unlabelled transfer texts [default: 10000; own data: all].")
]
Seeds = Annotated[str | None, typer.Option(help="Seeds of the students [default: 0,1,2].")]
Temperature = Annotated[
    float | None, typer.Option(help="Temperature of the distillation loss [default: 2].")
]
Alpha = Annotated[
    float | None,
    typer.Option(help="Weight of distillation; below 1 labelled texts join in [default: 1]."),
]
Epochs = Annotated[int | None, typer.Option(help="Epochs over the transfer texts [default: 2].")]
LabelEpochs = Annotated[
    int | None, typer.Option(help="Epochs of the labels-only student [default: 3].")
]
TeacherEpochs = Annotated[
    int | None,
    typer.Option(help="Epochs of fine-tuning the teacher; 0 uses it as it is [default: 3]."),
]
LearningRate = Annotated[
    float | None, typer.Option(help="Peak learning rate of the students [default: 4e-4].")
]
TeacherLearningRate = Annotated[
    float | None, typer.Option(help="Peak learning rate of the teacher [default: 1e-4].")
]
BatchSize = Annotated[int | None, typer.Option(help="Texts per step [default: 32].")]
MaxLength = Annotated[int | None, typer.Option(help="Longest text in tokens [default: 128].")]
TrainEmbeddings = Annotated[
    bool, typer.Option("--train-embeddings", help="Train the embeddings too (slower).")
]
Precision = Annotated[str | None, typer.Option(help="bf16, fp32 or auto [default: auto].")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or auto [default: auto].")]
Threads = Annotated[int | None, typer.Option(help="CPU threads [default: torch's].")]
Throughput = Annotated[
    bool | None,
    typer.Option(
        "--throughput/--no-throughput",
        help="Time the loss at language-model vocabularies [default: yes; with --quick: no].",
    ),
]


def distill(
    name: Name = None,
    out: Out = None,
    resume: Resume = False,
    quick: Quick = False,
    data: Data = None,
    teacher: Teacher = None,
    student: Student = None,
    student_layers: StudentLayers = None,
    labels: Labels = None,
    transfer: Transfer = None,
    seeds: Seeds = None,
    temperature: Temperature = None,
    alpha: Alpha = None,
    epochs: Epochs = None,
    label_epochs: LabelEpochs = None,
    teacher_epochs: TeacherEpochs = None,
    lr: LearningRate = None,
    teacher_lr: TeacherLearningRate = None,
    batch_size: BatchSize = None,
    max_length: MaxLength = None,
    train_embeddings: TrainEmbeddings = False,
    precision: Precision = None,
    device: Device = None,
    threads: Threads = None,
    throughput: Throughput = None,
) -> None:
    """Fine-tune a real teacher, distil it into a small student, and compare.

    Without options, a pretrained encoder and a sentiment task are downloaded once and three small
    students per arm are trained: on labels only, on the teacher's hard labels, by distillation.
    Everything is written to runs/NAME; --resume continues after an interruption.
    """
    options: dict[str, Any] = dict(locals())
    del options["resume"]
    # A flag that was not set is an option that was not given.
    options["quick"] = quick or None
    options["train_embeddings"] = train_embeddings or None
    _run({key: value for key, value in options.items() if value is not None}, resume)


def _run(given: dict[str, Any], resume: bool) -> None:
    """Runs the distillation; a failure is one sentence and an exit code."""
    from rich.console import Console

    from kdkernels.api.distill.errors import DistillError

    console = Console()
    try:
        for key in ("student_layers", "seeds"):
            if key in given:
                given[key] = _integers(given[key], key.replace("_", "-"))
        from kdkernels.api.distill.runner import distill as run_distillation

        run_distillation(given, resume, console)
    except ModuleNotFoundError as error:
        typer.echo(
            f"distill: the package {error.name} must be installed, got none; "
            "run `pip install 'kdkernels[distill]'`",
            err=True,
        )
        raise typer.Exit(EXIT_FAILED) from error
    except DistillError as error:
        typer.echo(f"distill: {error}", err=True)
        raise typer.Exit(EXIT_FAILED) from error
    except KeyboardInterrupt as error:
        typer.echo("distill: stopped; the same command with --resume continues", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from error


def _integers(listed: str, option: str) -> tuple[int, ...]:
    """Parses ``0,1,2``."""
    from kdkernels.api.distill.errors import DistillError

    try:
        return tuple(int(item) for item in listed.split(","))
    except ValueError as error:
        raise DistillError(
            f"{option} must be integers separated by commas, got {listed!r}"
        ) from error
