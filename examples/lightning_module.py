"""Distil in Lightning: a module of a few lines, and validation with an average of its weights.

python examples/lightning_module.py            # real models and texts, downloaded once
python examples/lightning_module.py --quick
python examples/lightning_module.py --data reviews.csv --teacher DIR --student DIR
"""

import lightning.pytorch as pl
import torch
from shared import arguments, batches, load_models, load_texts
from torch.utils.data import DataLoader

import kdkernels


class Distilled(pl.LightningModule):
    """A model that learns from labels, or from a teacher as well."""

    def __init__(self, model, lr, teacher=None):
        super().__init__()
        self.model, self.lr = model, lr
        self.teachers = (teacher,)  # no submodule: checkpoints hold the student alone

    def training_step(self, batch, _):
        batch = dict(batch)  # the loaders give the same ones in every epoch
        (teacher,) = self.teachers
        if teacher is None:
            labels = batch.pop("labels")
            return kdkernels.kd_loss(self.model(**batch).logits, None, labels)
        return kdkernels.lightning.distill_step(
            self, batch, self.model, teacher, temperature=2.0, alpha=0.5
        )

    def validation_step(self, batch, _):
        batch = dict(batch)
        labels = batch.pop("labels")
        right = self.model(**batch).logits.argmax(-1) == labels
        self.log("accuracy", 100 * right.float().mean(), batch_size=len(labels))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=self.lr)


def main():
    args = arguments(__doc__.splitlines()[0])
    corpus = load_texts(args.data, args.quick)
    pl.seed_everything(0)
    tokenizer, teacher, student = load_models(args, corpus)
    loaders = [
        DataLoader(list(batches(tokenizer, part.texts, part.labels, seed)), batch_size=None)
        for part, seed in ((corpus.train, 0), (corpus.test, None))
    ]
    averaging = kdkernels.lightning.WeightAveragingCallback("ema", decay=0.98)
    quiet = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    for name, module, callbacks in (
        ("teacher", Distilled(teacher, 1e-4), []),
        ("student", Distilled(student, 5e-4, teacher), [averaging]),
    ):
        epochs = 1 if args.quick else 3
        trainer = pl.Trainer(max_epochs=epochs, callbacks=callbacks, accelerator="cpu", **quiet)
        trainer.fit(module, *loaders)
        print(f"{name}: {trainer.callback_metrics['accuracy']:.1f} % of {len(corpus.test)} texts")


if __name__ == "__main__":
    main()
