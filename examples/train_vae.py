"""Train a small variational autoencoder on real 8x8 digits with kl_ext and, step by step beside it, with plain torch.

    python examples/train_vae.py                     (make demo runs this)
    python examples/train_vae.py --epochs 40 --latent-dim 8 --loss reference
    python examples/train_vae.py --pictures docs/pictures      (the picture of README.md too)
    torchrun --nproc-per-node=2 examples/train_vae.py       (the same losses, from two processes with half of each batch)

The model: the latent variables z of an image x of the digit y have the prior p(z | y) = N(mu_y, sigma_y^2), with a mean and a
variance learned for each of the ten classes. The encoder gives q(z | x, y) = N(mu, sigma^2), the decoder p(x | z, y). Each of
the 64 pixels counts the inked cells, 0 to 16, of a 4x4 block of the scanned digit, so the likelihood of a pixel is binomial and
the ELBO is a true lower bound of log p(x | y), in nats per image.

    loss = reconstruction + KL(q(z | x, y) || p(z | y)) + 0.1 KL(p(z | y) || N(0, 1))

The first divergence is `gaussian_kl_div` with the reduction "batchmean": summed over the latent dimensions and averaged over
the images in the pass that computes it. The second, which keeps the learned priors in one place and at one scale, is
`kl_div_single_loss`, summed over the latent dimensions and averaged over the classes.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

try:
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits
    from torch import Tensor, nn
    from tqdm import tqdm

    import data_parallel
    from vae_figure import DARK, LIGHT, PAPER, save_figure
except ModuleNotFoundError as error:
    sys.exit(f"The demo needs {error.name}: `make demo` installs everything, or `pip install '.[demo]'`.")

import kl_ext
import kl_ext.reference

CLASSES = 10
PIXELS = 64
CELLS = 16  # in the 4x4 block that a pixel counts
TRAINING_IMAGES = 1500  # of 1,797; the others are held out
BATCH = 100
HIDDEN = 256
LEARNING_RATE = 3e-3
PRIOR_WEIGHT = 0.1
ACTIVE_NATS = 0.01  # a latent dimension is active where its mean KL is above this
FORMULAS = {"kl_ext": "kl_ext", "reference": "plain torch"}
COLUMNS = ["formulas", "epoch", "loss", "reconstruction", "kl", "prior_kl", "elbo", "ms_per_step"]

# How far apart the two loss curves may be, relative to the loss. They differ by the rounding of float32, 6e-8, which training
# could amplify step by step; over seeds 0 to 5 and 1 to 256 latent dimensions it came to no more than 7e-8.
TOLERANCE = 1e-5


class ClassConditionalVAE(nn.Module):
    """Encoder, decoder and ten priors, with the objective; `losses` is kl_ext or kl_ext.reference."""

    log_choose: Tensor

    def __init__(self, latent_dim: int, losses: Any) -> None:
        super().__init__()
        self.losses = losses
        self.encoder = _perceptron(PIXELS + CLASSES, 2 * latent_dim)
        self.decoder = _perceptron(latent_dim + CLASSES, PIXELS)
        self.prior_mu = nn.Parameter(torch.randn(CLASSES, latent_dim))
        self.prior_log_var = nn.Parameter(torch.zeros(CLASSES, latent_dim))
        k = torch.arange(CELLS + 1.0)
        self.register_buffer("log_choose", torch.lgamma(k[-1] + 1) - torch.lgamma(k + 1) - torch.lgamma(k[-1] - k + 1))

    def encode(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, 64] counts and [batch] digits to mu and log_var, both [batch, latent_dim]."""
        mu, log_var = self.encoder(torch.cat([images / CELLS - 0.5, _one_hot(labels)], dim=1)).chunk(2, dim=1)
        return mu, log_var

    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        """[batch, latent_dim] and [batch] digits to the log-odds of ink in a cell, [batch, 64]."""
        logits: Tensor = self.decoder(torch.cat([z, _one_hot(labels)], dim=1))
        return logits

    def kl(self, mu: Tensor, log_var: Tensor, labels: Tensor, **reduction: Any) -> Tensor:
        """The divergence of q from the prior of the digit, reduced as asked."""
        return self.losses.gaussian_kl_div(mu, log_var, self.prior_mu[labels], self.prior_log_var[labels], **reduction)

    def forward(self, images: Tensor, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The reconstruction and the KL, per image, and the KL of the priors, per class: three scalars in nats."""
        mu, log_var = self.encode(images, labels)
        logits = self.decode(mu + (0.5 * log_var).exp() * noise, labels)
        log_likelihood = images * logits - CELLS * F.softplus(logits) + self.log_choose[images.long()]
        prior_kl = self.losses.kl_div_single_loss(self.prior_mu, self.prior_log_var)
        return -log_likelihood.sum(1).mean(), self.kl(mu, log_var, labels, reduction="batchmean"), prior_kl.sum(1).mean()


class Training:
    """One model on its way, with its optimiser, its history and its clock."""

    def __init__(self, name: str, model: ClassConditionalVAE, options: argparse.Namespace, steps: int) -> None:
        self.name = name
        self.model = model.to(options.device)
        self.terms = torch.compile(self.model) if options.compile else self.model
        self.processes = options.processes
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, LEARNING_RATE, total_steps=steps)
        self.seconds: list[float] = []
        self.sums = torch.zeros(4, device=options.device, dtype=torch.float64)
        self.history: list[dict[str, Any]] = []

    def step(self, images: Tensor, labels: Tensor, noise: Tensor) -> None:
        _synchronize(images.device)
        start = time.perf_counter()
        reconstruction, kl, prior_kl = self.terms(images, labels, noise)
        loss = reconstruction + kl + PRIOR_WEIGHT * prior_kl
        share = len(images) / BATCH
        terms = share * torch.stack([loss, reconstruction, kl, prior_kl]).detach()
        self.optimizer.zero_grad()
        (share * loss).backward()
        if self.processes > 1:
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            data_parallel.sum_over_processes([terms, *gradients])
        self.optimizer.step()
        self.schedule.step()
        _synchronize(images.device)
        self.seconds.append(time.perf_counter() - start)
        self.sums += terms

    def end_epoch(self, epoch: int, steps: int) -> None:
        loss, reconstruction, kl, prior_kl = (self.sums / steps).tolist()
        self.sums.zero_()
        milliseconds = 1e3 * statistics.median(self.seconds[-steps:])
        row = [self.name, epoch, loss, reconstruction, kl, prior_kl, -(reconstruction + kl), milliseconds]
        self.history.append(dict(zip(COLUMNS, row, strict=True)))


def _perceptron(inputs: int, outputs: int) -> nn.Sequential:
    hidden = [nn.Linear(inputs, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU()]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, outputs))


def _one_hot(labels: Tensor) -> Tensor:
    return F.one_hot(labels, CLASSES).float()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train_side_by_side(options: argparse.Namespace, images: Tensor, labels: Tensor) -> list[Training]:
    """Train with kl_ext and with the plain-torch formulas in turn: same start, same batches, same noise in every process."""
    torch.manual_seed(options.seed)
    start = ClassConditionalVAE(options.latent_dim, kl_ext)
    twin = ClassConditionalVAE(options.latent_dim, kl_ext.reference)
    twin.load_state_dict(start.state_dict())
    steps = len(images) // BATCH
    trainings = [
        Training("kl_ext", start, options, options.epochs * steps),
        Training("reference", twin, options, options.epochs * steps),
    ]
    interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log file needs few lines
    share = slice(options.rank, None, options.processes)  # of a batch
    total, hidden = options.epochs * steps, options.rank > 0
    with tqdm(total=total, unit="step", desc="training", mininterval=interval, disable=hidden) as progress:
        for epoch in range(1, options.epochs + 1):
            for batch in torch.randperm(len(images)).to(options.device).split(BATCH):
                noise = torch.randn(BATCH, options.latent_dim).to(options.device)
                for training in trainings:
                    training.step(images[batch[share]], labels[batch[share]], noise[share])
                trainings.reverse()  # neither is always the first to touch the batch
                progress.update()
            for training in trainings:
                training.end_epoch(epoch, steps)
            progress.set_postfix(elbo=f"{trainings[0].history[-1]['elbo']:.2f}", refresh=False)
    return sorted(trainings, key=lambda training: training.name)


@torch.no_grad()
def evaluate(training: Training, images: Tensor, labels: Tensor, noise: Tensor) -> dict[str, Any]:
    """What the table and the picture show of one model, on images that it has not seen."""
    model = training.model
    reconstruction, kl, _ = model(images, labels, noise)
    kl_by_dimension = model.kl(*model.encode(images, labels), labels, reduction="mean", dim=0)  # [latent_dim]
    return {
        "reconstruction": reconstruction.item(),
        "kl": kl.item(),
        "elbo": -(reconstruction + kl).item(),
        "kl_by_dimension": kl_by_dimension.cpu(),
        "active": int((kl_by_dimension > ACTIVE_NATS).sum()),
        "milliseconds": 1e3 * statistics.median(training.seconds[len(training.seconds) // 10 :]),  # without the warm-up
    }


@torch.no_grad()
def reconstruct(model: ClassConditionalVAE, images: Tensor, labels: Tensor) -> Tensor:
    """The expected counts [batch, 64] at the mean of q."""
    return CELLS * model.decode(model.encode(images, labels)[0], labels).sigmoid()


@torch.no_grad()
def sample(model: ClassConditionalVAE, rows: int, seed: int) -> Tensor:
    """Expected counts [rows, classes, 64] decoded from draws of each class's prior."""
    labels = torch.arange(CLASSES, device=model.prior_mu.device).repeat(rows)
    noise = torch.randn(len(labels), model.prior_mu.shape[1], generator=torch.Generator().manual_seed(seed))
    z = model.prior_mu[labels] + (0.5 * model.prior_log_var[labels]).exp() * noise.to(labels.device)
    return CELLS * model.decode(z, labels).sigmoid().reshape(rows, CLASSES, PIXELS)


def largest_difference(curve: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """Between the losses of two histories, relative to the loss; infinite where one of them is not finite."""
    pairs = [(row["loss"], other_row["loss"]) for row, other_row in zip(curve, other, strict=True)]
    if not all(math.isfinite(loss) for pair in pairs for loss in pair):
        return math.inf
    return max(abs(a - b) / abs(b) for a, b in pairs)


def print_table(results: dict[str, dict[str, Any]], held_out: int, latent_dim: int) -> None:
    rows = [
        (f"on {held_out} held-out images", "kl_ext", "plain torch"),
        ("reconstruction [nats per image]", *(f"{r['reconstruction']:.2f}" for r in results.values())),
        ("KL from the prior [nats per image]", *(f"{r['kl']:.2f}" for r in results.values())),
        ("ELBO [nats per image]", *(f"{r['elbo']:.2f}" for r in results.values())),
        (f"active latent dimensions (> {ACTIVE_NATS} nats)", *(f"{r['active']} of {latent_dim}" for r in results.values())),
        ("time per training step [ms]", *(f"{r['milliseconds']:.2f}" for r in results.values())),
    ]
    print()
    for label, *values in rows:
        print(f"  {label:<42}" + "".join(f"{value:>13}" for value in values))
    print()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog="torchrun --nproc-per-node=N %(prog)s trains in N processes, which share every batch: the losses are the same.",
    )

    def at_least(minimum: int) -> Any:
        def integer(text: str) -> int:
            try:
                value = int(text)
            except ValueError:
                raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None
            if value < minimum:
                raise argparse.ArgumentTypeError(f"expected at least {minimum}, got {value}")
            return value

        return integer

    parser.add_argument("--epochs", type=at_least(1), default=160, help="passes over the training images (%(default)s)")
    parser.add_argument("--latent-dim", type=at_least(1), default=16, help="number of latent variables (%(default)s)")
    parser.add_argument(
        "--loss",
        choices=list(FORMULAS),
        default="kl_ext",
        help="the formulas of the model that is shown; the other one is trained beside it to compare (%(default)s)",
    )
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="where to train (%(default)s); cuda: a GPU for each process"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of weights, batches and noise (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for vae.png and metrics.csv")
    help_text = "folder for demo-light.png and demo-dark.png too, the same picture for light and dark pages"
    parser.add_argument("--pictures", type=Path, help=help_text)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device; use --device cpu")
    options.device = data_parallel.device_of_this_process(options.device)
    if options.device.type == "cuda" and options.device.index >= torch.cuda.device_count():
        parser.error(f"--device cuda: expected a GPU for each process, and this torch sees {torch.cuda.device_count()}")
    options.rank, options.processes = data_parallel.rank_and_processes()
    if options.processes > BATCH:
        parser.error(f"expected at most {BATCH} processes, one for each image of a batch, got {options.processes}")
    return options


def main() -> int:
    options = parse_options()
    if options.processes > 1:
        data_parallel.connect(options.device)
    torch.set_num_threads(1)  # steps this small gain nothing from a second thread and stumble where cores are shared
    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))  # the same split for every seed
    images = torch.tensor(digits.data, dtype=torch.float32)[order].to(options.device)  # [1797, 64], counts 0 to 16
    labels = torch.tensor(digits.target)[order].to(options.device)
    seen, held_out = slice(0, TRAINING_IMAGES), slice(TRAINING_IMAGES, None)

    trainings = train_side_by_side(options, images[seen], labels[seen])
    if options.processes > 1:
        torch.distributed.destroy_process_group()
    if options.rank > 0:  # all have the same model by now: the first shows it
        return 0

    noise = torch.randn(len(images[held_out]), options.latent_dim).to(options.device)
    results = {t.name: evaluate(t, images[held_out], labels[held_out], noise) for t in trainings}
    print_table(results, len(noise), options.latent_dim)

    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for training in trainings:
            writer.writerows(training.history)

    shown = next(t for t in trainings if t.name == options.loss)
    firsts = [int((labels[held_out] == digit).nonzero()[0]) + TRAINING_IMAGES for digit in range(CLASSES)]
    figures = {options.out / "vae.png": PAPER}
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        figures |= {options.pictures / "demo-light.png": LIGHT, options.pictures / "demo-dark.png": DARK}
    for path, theme in figures.items():
        save_figure(
            path,
            theme,
            curves={FORMULAS[t.name]: [row["loss"] for row in t.history] for t in trainings},
            originals=images[firsts].cpu(),
            reconstructions=reconstruct(shown.model, images[firsts], labels[firsts]).cpu(),
            samples=sample(shown.model, 9, options.seed).cpu(),
            kl_by_dimension=results[shown.name]["kl_by_dimension"],
            active_nats=ACTIVE_NATS,
            subtitle=f"{FORMULAS[shown.name]}, {options.latent_dim} latent dimensions, held-out ELBO "
            f"{results[shown.name]['elbo']:.1f} nats",
        )
    print(f"  picture  {options.out / 'vae.png'}\n  metrics  {options.out / 'metrics.csv'}\n")

    difference = largest_difference(*(training.history for training in trainings))
    coincide = difference <= TOLERANCE
    print(f"  the loss curves {'coincide' if coincide else 'DO NOT COINCIDE'}: ", end="")
    print(f"largest relative difference {difference:.1e}, tolerance {TOLERANCE:.0e}")
    return 0 if coincide else 1


if __name__ == "__main__":
    sys.exit(main())
