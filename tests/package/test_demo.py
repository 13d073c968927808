"""examples/train_vae.py trains with both formulas, leaves its picture and its metrics, and refuses bad options clearly."""

import csv
import functools
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NO_GLOO_LEFT = Path(__file__).resolve().parents[1] / "support" / "no_gloo_left.py"
EPOCHS = 2
SHORT = ("--epochs", EPOCHS, "--latent-dim", 5, "--seed", 3)

for module in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(module)

from PIL import Image  # noqa: E402


def train_vae(*options: object, cwd: Path, launcher: tuple[object, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run as `make demo` does, from a folder where nothing is imported by accident."""
    command = [sys.executable, *map(str, (*launcher, EXAMPLES / "train_vae.py", *options))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a short run printed, and its folder."""
    folder = tmp_path_factory.mktemp("demo")
    out, pictures = folder / "new" / "out", folder / "new" / "pictures"
    completed = train_vae(*SHORT, "--out", out, "--pictures", pictures, cwd=folder)
    assert completed.returncode == 0, completed.stderr
    assert "training" in completed.stderr, "no progress bar"
    return completed.stdout, folder / "new" / "out"


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_a_column_for_each_formula(demo):
    printed, _ = demo
    table = {line[:44].strip(): line[44:].split() for line in printed.splitlines()}
    assert table["on 297 held-out images"] == ["kl_ext", "plain", "torch"]
    for quantity in ("reconstruction", "KL from the prior", "ELBO"):
        kl_ext, plain = table[f"{quantity} [nats per image]"]
        assert kl_ext == plain
    assert all(float(milliseconds) > 0 for milliseconds in table["time per training step [ms]"])
    assert "of 5" in " ".join(table["active latent dimensions (> 0.01 nats)"])


def test_the_metrics_add_up(demo):
    _, folder = demo
    assert [(row["formulas"], int(row["epoch"])) for row in rows(folder)] == [
        (formulas, epoch) for formulas in ("kl_ext", "reference") for epoch in range(1, EPOCHS + 1)
    ]
    for row in rows(folder):
        reconstruction, kl, prior_kl = (float(row[name]) for name in ("reconstruction", "kl", "prior_kl"))
        assert float(row["elbo"]) == pytest.approx(-(reconstruction + kl))
        assert float(row["loss"]) == pytest.approx(reconstruction + kl + 0.1 * prior_kl)
        assert kl > 0
        assert prior_kl > 0
        assert float(row["ms_per_step"]) > 0


def test_training_lowers_the_loss(demo):
    _, folder = demo
    losses = [float(row["loss"]) for row in rows(folder) if row["formulas"] == "kl_ext"]
    assert all(later < earlier for earlier, later in pairwise(losses))


def test_the_loss_curves_coincide(demo):
    printed, folder = demo
    curves = {name: [float(row["loss"]) for row in rows(folder) if row["formulas"] == name] for name in ("kl_ext", "reference")}
    # Two epochs do not amplify the rounding of float32 yet: 1e-6 is 8 of its units.
    assert curves["kl_ext"] == pytest.approx(curves["reference"], rel=1e-6)
    assert "the loss curves coincide" in printed


def test_the_picture_is_a_png_of_readable_size(demo):
    _, folder = demo
    header = (folder / "vae.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(header[16:20], "big") >= 1000


def test_the_picture_has_two_versions_for_pages_whose_background_shows_through(demo):
    _, folder = demo
    picture, *versions = (
        Image.open(path).convert("RGBA")
        for path in (folder / "vae.png", *(folder.parent / "pictures" / f"demo-{theme}.png" for theme in ("light", "dark")))
    )
    assert min(picture.getpixel((0, 0))) >= 250  # white and opaque, in a palette
    for version in versions:
        assert version.size == picture.size
        assert version.getpixel((0, 0))[3] == 0
    assert versions[0].tobytes() != versions[1].tobytes()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_three_processes_have_the_losses_of_one(demo, tmp_path):
    """Of each batch they have 34, 33 and 33 images."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", NO_GLOO_LEFT)
    completed = train_vae(*SHORT, "--out", tmp_path, cwd=tmp_path, launcher=torchrun)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.count("the loss curves coincide") == 1, "one process speaks for all"
    expected, got = rows(demo[1]), rows(tmp_path)
    assert len(got) == len(expected)
    for row, whole in zip(got, expected):
        for name in ("loss", "reconstruction", "kl", "prior_kl"):
            assert float(row[name]) == pytest.approx(float(whole[name]), rel=1e-6), (name, row["formulas"], row["epoch"])


@pytest.mark.parametrize(
    ("options", "processes", "message"),
    [
        ([], 101, "expected at most 100 processes, one for each image of a batch, got 101"),
        (["--device", "cuda"], 8, "--device cuda: expected a GPU for each process, and this torch sees 7"),
    ],
)
def test_more_processes_than_images_of_a_batch_or_gpus_are_refused(options, processes, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    import train_vae

    last = str(processes - 1)
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "RANK": last, "LOCAL_RANK": last, "WORLD_SIZE": str(processes)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    monkeypatch.setattr(sys, "argv", ["train_vae.py", *options])
    with pytest.raises(SystemExit) as stopped:
        train_vae.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "argument --epochs: expected at least 1, got 0"),
        (["--epochs", "many"], "argument --epochs: expected an integer, got 'many'"),
        (["--latent-dim", "0"], "argument --latent-dim: expected at least 1, got 0"),
        (["--loss", "mse"], "argument --loss: invalid choice: 'mse'"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--seed", "-1"], "argument --seed: expected at least 0, got -1"),
        (["--device", "cuda"], "--device cuda: this torch sees no CUDA device; use --device cpu"),
        (["--epoch-count", "3"], "unrecognized arguments"),
    ],
)
def test_bad_options_are_refused_before_anything_is_trained(options, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    import train_vae

    monkeypatch.setattr(sys, "argv", ["train_vae.py", *options])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        train_vae.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_formulas_that_differ_by_a_hundredth_fail_the_demo(monkeypatch, request, tmp_path, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    import train_vae

    exact = train_vae.kl_ext.gaussian_kl_div
    monkeypatch.setattr(train_vae.kl_ext, "gaussian_kl_div", lambda *tensors, **how: 1.01 * exact(*tensors, **how))
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    monkeypatch.setattr(sys, "argv", ["train_vae.py", "--epochs", "1", "--latent-dim", "2", "--out", str(tmp_path)])
    assert train_vae.main() == 1
    assert "the loss curves DO NOT COINCIDE" in capsys.readouterr().out


def test_curves_that_part_or_end_in_nan_do_not_coincide(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from train_vae import TOLERANCE, largest_difference

    same, apart, nan = ([{"loss": 100.0}, {"loss": loss}] for loss in (50.0, 50.0 * (1 + 2 * TOLERANCE), float("nan")))
    assert largest_difference(same, same) == 0
    assert largest_difference(apart, same) > TOLERANCE
    assert not largest_difference(nan, same) <= TOLERANCE
    assert not largest_difference(same, nan) <= TOLERANCE
