"""Distil a fine-tuned encoder into BERT-Tiny in an ordinary PyTorch loop.

python examples/plain_loop.py            # real models and texts, downloaded once
python examples/plain_loop.py --quick    # the same on a few texts
python examples/plain_loop.py --data reviews.csv --teacher DIR --student DIR
"""

import torch
from shared import arguments, batches, load_models, load_texts

import kdkernels


def train(model, loss_of, make_batches, epochs, lr):
    """The loop, in which nothing but the loss is kdkernels'."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for epoch in range(epochs):
        for batch in make_batches(epoch):
            labels = batch.pop("labels", None)
            loss = loss_of(model(**batch).logits, batch, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    model.eval()


@torch.inference_mode()
def accuracy(model, test_batches):
    """In percent."""
    right = []
    for batch in test_batches:
        labels = batch.pop("labels")
        right.append(model(**batch).logits.argmax(-1) == labels)
    return 100 * torch.cat(right).float().mean().item()


def main():
    args = arguments(__doc__.splitlines()[0])
    corpus = load_texts(args.data, args.quick)
    torch.manual_seed(0)
    tokenizer, teacher, student = load_models(args, corpus)

    def from_labels(logits, batch, labels):
        return kdkernels.kd_loss(logits, None, labels)

    def from_teacher(logits, batch, labels):
        with torch.no_grad():
            target = teacher(**batch).logits
        return kdkernels.kd_loss(logits, target, temperature=2.0)

    part, epochs = corpus.train, 1 if args.quick else 3
    labelled = lambda epoch: batches(tokenizer, part.texts, part.labels, seed=epoch)  # noqa: E731
    unlabelled = lambda epoch: batches(tokenizer, corpus.transfer, seed=epoch)  # noqa: E731
    train(teacher, from_labels, labelled, epochs, lr=1e-4)
    train(student, from_teacher, unlabelled, epochs, lr=5e-4)
    for name, model in (("teacher", teacher), ("student", student)):
        score = accuracy(model, batches(tokenizer, corpus.test.texts, corpus.test.labels))
        print(f"{name}: {score:.1f} % of {len(corpus.test)} test texts")


if __name__ == "__main__":
    main()
