"""``kdkernels distill``: fine-tune a teacher, or take a language model, distil it, compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kdkernels.api.cli import complete
from kdkernels.api.cli.runs import one_sentence, parse_lists

METHODS = ("swa", "diito", "stark", "meta-kd")
# Options that are lists with commas.
LISTS: dict[str, Callable[[str], Any]] = {
    "student_layers": int,
    "seeds": int,
    "recipe": str.strip,
    "arms": str.strip,
    "swa_start": float,
    "swa_every": int,
    "levels": float,
    "lams": float,
    "domains": str.strip,
    "share": float,
}

# Every option is None unless given: the defaults depend on --data and --quick, and a resumed run
# compares only what was given. Defaults are therefore written into the help texts.
LM = "Language models (--objective lm)"
CLASSIFICATION = "Classification"
SWA = "Weight averaging (--method swa)"
DIITO = "Causal distillation (--method diito)"
STARK = "Sparse teachers (--method stark)"
META_KD = "Distillation across domains (--method meta-kd)"

Objective = Annotated[
    str | None,
    typer.Option(
        help="classification, or lm: a causal language model [default: classification].",
        autocompletion=complete.words(*complete.OBJECTIVES),
    ),
]
Name = Annotated[
    str | None, typer.Option(help="Name of the run [default: demo; lm: lm; swa: swa].")
]
Out = Annotated[str | None, typer.Option(help="Folder of all runs [default: runs].")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a stopped run.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="A tiny run that only shows that everything works.")
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Your texts, .csv, .tsv or .jsonl: columns text, label (empty: unlabelled transfer "
        "text) and optionally split (train, dev, test, transfer). lm: a UTF-8 text file, whose "
        "last tenth is held out, or wikitext-2 [default there]."
    ),
]
Teacher = Annotated[
    str | None,
    typer.Option(rich_help_panel=CLASSIFICATION, help="Your teacher, a transformers folder."),
]
Student = Annotated[
    str | None,
    typer.Option(rich_help_panel=CLASSIFICATION, help="Your student, a transformers folder."),
]
StudentLayers = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=CLASSIFICATION,
        help="Layers of the teacher the student is cut from [default: 0,5].",
    ),
]
Labels = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=CLASSIFICATION,
        help="Labelled training texts [default: 2000; own data: all].",
    ),
]
Transfer = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=CLASSIFICATION,
        help="Unlabelled transfer texts [default: 10000; own data: all].",
    ),
]
Dev = Annotated[
    int | None, typer.Option(rich_help_panel=SWA, help="Dev examples [default: all; qa: 300].")
]
Test = Annotated[
    int | None,
    typer.Option(rich_help_panel=SWA, help="Test examples [default: all; qa: 1000; 20news: 2500]."),
]
Seeds = Annotated[
    str | None, typer.Option(help="Seeds of the students [default: 0,1,2; lm: 0; swa: 0,1,2,3,4].")
]
Temperature = Annotated[
    float | None, typer.Option(help="Temperature of the distillation loss [default: 2; lm: 1].")
]
Alpha = Annotated[
    float | None,
    typer.Option(help="Weight of distillation; the labels have the rest [default: 1; lm: 0.5]."),
]
Epochs = Annotated[
    int | None,
    typer.Option(help="Epochs over the transfer texts [default: 1; own data, --recipe: 2]."),
]
LabelEpochs = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=CLASSIFICATION, help="Epochs of the labels-only student [default: 3]."
    ),
]
TeacherEpochs = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=CLASSIFICATION,
        help="Epochs of fine-tuning the teacher; 0 uses it as it is [default: 3].",
    ),
]
LearningRate = Annotated[
    float | None, typer.Option(help="Peak learning rate of the students [default: 4e-4; lm: 3e-3].")
]
TeacherLearningRate = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=CLASSIFICATION, help="Peak learning rate of the teacher [default: 1e-4]."
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(help="Texts per step; lm: blocks of tokens [default: 32; lm: 2].")
]
MaxLength = Annotated[
    int | None,
    typer.Option(rich_help_panel=CLASSIFICATION, help="Longest text in tokens [default: 128]."),
]
TrainEmbeddings = Annotated[
    bool, typer.Option("--train-embeddings", help="Train the embeddings too (slower).")
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="bf16, fp32 or auto [default: auto].",
        autocompletion=complete.words(*complete.PRECISIONS),
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda or auto [default: auto].",
        autocompletion=complete.words(*complete.DEVICES),
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads [default: torch's].")]
Throughput = Annotated[
    bool | None,
    typer.Option(
        "--throughput/--no-throughput",
        rich_help_panel=CLASSIFICATION,
        help="Time the loss at language-model vocabularies [default: yes; with --quick: no].",
    ),
]
RecipeNames = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        rich_help_panel=CLASSIFICATION,
        help="Distil from hidden states too, beside plain soft labels: tinybert, pkd, minilm, "
        "distilbert, or several with commas. Fewer texts: 3000 transfer [name: recipes].",
        autocompletion=complete.listed(*complete.RECIPES),
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=LM,
        help="The teacher: a transformers folder, or smollm2-135m (downloaded) [default].",
    ),
]
Layers = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=LM, help="First layers of the teacher that make a student [default: 4]."
    ),
]
SeqLen = Annotated[
    int | None, typer.Option(rich_help_panel=LM, help="Tokens of a block [default: 128].")
]
Tokens = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=LM, help="Training tokens, spread over the text [default: 40960]."
    ),
]
EvalTokens = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=LM,
        help="Test tokens, spread over the text; half as many dev tokens [default: 8192].",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(rich_help_panel=LM, help="Classes a token in the teacher's cache [default: 64]."),
]
Cache = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=LM,
        help="Folder of the teacher's cache, also one by kdkernels cache build; what it lacks is "
        "added [default: in the run].",
    ),
]
Route = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=LM,
        help="hidden: losses from hidden states and heads; logits: from full logits "
        "[default: hidden].",
        autocompletion=complete.words("hidden", "logits"),
    ),
]
Full = Annotated[
    bool,
    typer.Option(
        "--full",
        rich_help_panel=LM,
        help="For a GPU: all of the text in blocks of 512, 16 a step, 3 epochs, lr 1e-3, "
        "embeddings trained.",
    ),
]


Method = Annotated[
    str | None,
    typer.Option(
        help="swa: fine-tune with stochastic weight averaging, and compare; diito: distil with "
        "interchange interventions, and compare; stark: distil from teachers that are cut, and "
        "compare; meta-kd: distil a teacher of several domains into a student of each, and "
        "compare.",
        autocompletion=complete.words(*METHODS),
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(help="YAML file of options, as a run's config.yaml; flags come before it."),
]
Alignment = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=DIITO,
        help="single_middle, middle_late, multilayer or a JSON file: which layers are exchanged "
        "[default: multilayer; mlm: single_middle].",
        autocompletion=complete.words(*complete.ALIGNMENTS),
    ),
]
IndexMode = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=DIITO,
        help="aligned, or release: from the layer before, as the released code [default: aligned].",
    ),
]
Positions = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=DIITO,
        help="consecutive, random, or masked (mlm) [default: consecutive].",
    ),
]
Share = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=DIITO,
        help="Share of the shorter text that is exchanged [default: 0.3]. meta-kd: share of a "
        "domain's labels that students see, several with commas are compared [default: 1].",
    ),
]
Levels = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=STARK,
        help="Shares of heads and neurons that are cut of the teacher [default: 0.1,0.2,...,0.9].",
    ),
]
Lams = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=STARK,
        help="Shares of the teacher's own loss in the scores; several with commas are compared "
        "[default: 0.5].",
    ),
]
Per = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=STARK,
        help="batch, as the released code, or example: whose gradients are made positive "
        "[default: batch].",
        autocompletion=complete.words("batch", "example"),
    ),
]
HeldOut = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=STARK,
        help="Share of the training examples that give the scores and train nothing "
        "[default: 0.2].",
    ),
]
Faithful = Annotated[
    bool,
    typer.Option(
        "--faithful",
        rich_help_panel=STARK,
        help="Scores from the dev examples, which also choose the level, as the released code.",
    ),
]
StudentKind = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=STARK,
        help="dropped: layers of the teacher, --student-layers; pruned: the teacher, cut by "
        "--student-level [default: dropped].",
        autocompletion=complete.words("dropped", "pruned"),
    ),
]
StudentLevel = Annotated[
    float | None,
    typer.Option(rich_help_panel=STARK, help="Share cut of a pruned student [default: 0.7]."),
]
TeacherLabels = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=DIITO, help="Training examples of the teacher [default: by task]."
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=SWA,
        help="sentiment, r8, r52, 20news (topics), ner, qa, lm, or of GLUE cola, sst-2, mrpc, qqp, "
        "sts-b, mnli, qnli, rte, wnli, with the folder of its files as --data "
        "[default: sentiment].",
        autocompletion=complete.words(*complete.TASKS),
    ),
]
Arms = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=SWA,
        help="Some of ft, swa, kd, kd-swa [default: all; kd only where there are transfer texts]. "
        "diito: kd, diito, kd-time. meta-kd: own, mixed or meta, -, tinybert or metakd.",
        autocompletion=complete.listed(*complete.ARMS),
    ),
]
TransferEpochs = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=SWA, help="Epochs over the transfer texts; --epochs: labels [default: 1]."
    ),
]
Evaluations = Annotated[
    int | None, typer.Option(rich_help_panel=SWA, help="Dev figures while training [default: 6].")
]
SwaStart = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=SWA,
        help="Share of the training after which averaging starts; several with commas are "
        "compared [default: 0.5].",
    ),
]
SwaEvery = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=SWA,
        help="Steps from one averaged model to the next (K); several with commas are compared "
        "[default: 1].",
    ),
]
SwaLearningRate = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=SWA, help="Constant learning rate while averaging [default: --lr]."
    ),
]
Convention = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=SWA,
        help="paper: the weights at the start count as a model; torch: not [default: paper].",
    ),
]
Patience = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=SWA,
        help="Stop after so many evaluations of the average without a better one, and keep the "
        "best [default: to the end].",
    ),
]
DomainColumn = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=META_KD, help="Column of your data that names the domain [default: domain]."
    ),
]
Domains = Annotated[
    str | None,
    typer.Option(rich_help_panel=META_KD, help="Domains to train students of [default: all]."),
]
LeaveOut = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=META_KD,
        help="A domain that no teacher is trained on; students are of it alone.",
    ),
]
Stages = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=META_KD,
        help="2: states, then soft labels; 1: all terms at once [default: 2].",
    ),
]
Gamma1 = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=META_KD,
        help="Weight of the domain corruption of the teacher [default: 0.5].",
    ),
]
Gamma2 = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=META_KD, help="Weight of the transferable knowledge [default: 0.5]."
    ),
]
Teachers = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=META_KD, help="Folder of a run with the same data: take its teachers."
    ),
]
FaithfulTo = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=META_KD, help="paper, or code: as the released code [default: paper]."
    ),
]


def distill(
    objective: Objective = None,
    method: Method = None,
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
    recipe: RecipeNames = None,
    model: Model = None,
    layers: Layers = None,
    seq_len: SeqLen = None,
    tokens: Tokens = None,
    eval_tokens: EvalTokens = None,
    top_k: TopK = None,
    cache: Cache = None,
    route: Route = None,
    full: Full = False,
    task: Task = None,
    arms: Arms = None,
    dev: Dev = None,
    test: Test = None,
    transfer_epochs: TransferEpochs = None,
    evaluations: Evaluations = None,
    swa_start: SwaStart = None,
    swa_every: SwaEvery = None,
    swa_lr: SwaLearningRate = None,
    convention: Convention = None,
    patience: Patience = None,
    alignment: Alignment = None,
    index_mode: IndexMode = None,
    positions: Positions = None,
    share: Share = None,
    teacher_labels: TeacherLabels = None,
    levels: Levels = None,
    lams: Lams = None,
    per: Per = None,
    held_out: HeldOut = None,
    faithful: Faithful = False,
    student_kind: StudentKind = None,
    student_level: StudentLevel = None,
    domain_column: DomainColumn = None,
    domains: Domains = None,
    leave_out: LeaveOut = None,
    stages: Stages = None,
    gamma1: Gamma1 = None,
    gamma2: Gamma2 = None,
    teachers: Teachers = None,
    faithful_to: FaithfulTo = None,
    config: Config = None,
) -> None:
    """Fine-tune a real teacher, distil it into a small student, and compare.

    Without options, a pretrained encoder and a sentiment task are downloaded once and three small
    students per arm are trained: on labels only, on the teacher's hard labels, by distillation.
    With --objective lm, SmolLM2-135M's first layers are trained on WikiText-2: on the text alone,
    from the live teacher, and from its cached top-k.
    With --recipe, students learn from the teacher's hidden states as published recipes do.
    With --method swa, a model is fine-tuned with weight averaging and without, on --task.
    With --method diito, students are distilled with interchange interventions and without.
    With --method stark, they are distilled from teachers whose heads and neurons are cut.
    With --method meta-kd, one teacher of several domains is distilled into a student of each.
    Everything is written to runs/NAME; --resume continues after an interruption.
    """
    options: dict[str, Any] = dict(locals())
    del options["resume"]
    # A flag that was not set is an option that was not given.
    options["quick"] = quick or None
    options["train_embeddings"] = train_embeddings or None
    options["full"] = full or None
    options["faithful"] = faithful or None
    _run({key: value for key, value in options.items() if value is not None}, resume)


def _run(given: dict[str, Any], resume: bool) -> None:
    """Runs the distillation; a failure is one sentence and an exit code."""
    from rich.console import Console

    console = Console()
    with one_sentence("distill"):
        from kdkernels.api.distill.errors import require

        parse_lists(given, LISTS)
        objective = given.get("objective")
        require(objective not in METHODS, "objective", "be asked for by --method", objective)
        contract = "be asked for by kdkernels finetune"
        require(objective != "finetune", "objective", contract, objective)
        if "method" in given:
            method = given.pop("method")
            require("objective" not in given, "objective", "be left out with --method", method)
            require(method in METHODS, "method", f"be one of {', '.join(METHODS)}", repr(method))
            given["objective"] = method
        if "config" in given:
            from kdkernels.api.distill.config import read_values

            given = {**read_values(given.pop("config")), **given}
        _one_share(given)
        from kdkernels.api.distill.runner import distill as run_distillation

        run_distillation(given, resume, console)


def _one_share(given: dict[str, Any]) -> None:
    """Only one method compares several shares; to the others it is a number."""
    from kdkernels.api.distill.errors import require

    share = given.get("share")
    if isinstance(share, tuple) and given.get("objective") != "meta-kd":
        require(len(share) == 1, "share", "be one number without --method meta-kd", list(share))
        given["share"] = share[0]
