"""Images and labels of the study: digits, CIFAR-10 in its own format, and what is made of them."""

import hashlib
import importlib
import os
import pickle
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from studies.label_noise.data import cifar10, digits, load

from .common import need, read_records, run


def load_digits(labels="true", noise=0.25, size=16, examples=None, seed=0):
    return load("digits", labels, noise, size, examples, "", seed)


# ---- digits ----


def test_digits_are_set_aside_by_class():
    from sklearn.datasets import load_digits as all_digits

    train, train_labels, test, test_labels = digits(seed=0)
    assert train.shape == (1440, 1, 8, 8)
    assert test.shape == (357, 1, 8, 8)
    everything = all_digits()
    ours = torch.cat([train, test]).flatten(1).numpy() * 16
    order, theirs = np.lexsort(ours.T), np.lexsort(everything.data.T)
    assert np.array_equal(ours[order], everything.data[theirs])
    labels = torch.cat([train_labels, test_labels]).numpy()
    assert np.array_equal(labels[order], everything.target[theirs])
    counts = torch.bincount(train_labels), torch.bincount(test_labels)
    assert torch.allclose(counts[0] / 1440, counts[1] / 357, atol=0.003)


def test_images_are_scaled_and_standardised_by_the_training_images():
    images = load_digits()
    assert images.train.shape == (1440, 1, 16, 16)
    assert images.test.shape == (357, 1, 16, 16)
    assert images.train.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.train.std().item() == pytest.approx(1, abs=1e-5)
    assert images.test.mean().item() == pytest.approx(0, abs=0.02)
    assert images.test.mean().item() != pytest.approx(0, abs=1e-5)
    small = digits(0)[0]
    middle = torch.nn.functional.avg_pool2d(images.train, 2)
    correlation = np.corrcoef(middle.flatten(), small.flatten())[0, 1]
    assert correlation > 0.95, "scaling moved the images"
    assert images.classes == 10


# ---- labels ----


def test_random_labels_have_nothing_to_do_with_the_images():
    images = load_digits("random")
    assert (images.given == images.truth).double().mean().item() == pytest.approx(0.1, abs=0.03)
    assert torch.bincount(images.given, minlength=10).min() > 144 - 4 * 144**0.5
    assert not torch.equal(images.given, load_digits("random", seed=1).given)
    assert torch.equal(images.given, load_digits("random").given)


@pytest.mark.parametrize("noise", [0.25, 0.5])
def test_noisy_labels_are_wrong_for_exactly_that_share(noise):
    images = load_digits("noisy", noise)
    assert images.mislabeled.sum() == round(noise * 1440)
    assert images.given.min() == 0
    assert images.given.max() == 9
    shift = (images.given - images.truth)[images.mislabeled] % 10
    counts = torch.bincount(shift, minlength=10)
    assert counts[0] == 0
    expected = noise * 1440 / 9
    assert (counts[1:] - expected).abs().max() < 4 * expected**0.5, "not even over the classes"
    assert torch.equal(images.test_truth, load_digits("true").test_truth)


# ---- CIFAR-10 ----


def forget_torchvision():
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def loader():
    """Return torchvision's CIFAR10, and leave the process as it was.

    The build of torchvision on PyPI is for CUDA: beside a torch without CUDA its extension does
    not load, and importing it fails at the first op that the extension should have brought. The
    loader needs none of them, so here their schemas are declared, without any kernel. Other
    packages look for a torchvision and fail with that one: it lies in a folder of its own, where
    nobody finds it before and after these tests.
    """
    own = os.environ.get("ANDMASK_TORCHVISION", "")
    place = str(Path(own).resolve())
    need(find_spec("torchvision") or (own and Path(own, "torchvision").is_dir()), MISSING)
    with ExitStack() as stack:
        if own:
            forget_torchvision()
            sys.path.insert(0, place)
            stack.callback(sys.path.remove, place)
            stack.callback(forget_torchvision)
            importlib.invalidate_caches()
        try:
            from torchvision.datasets import CIFAR10
        except RuntimeError:
            forget_torchvision()
            need(own, MISSING)
            library = stack.enter_context(torch.library._scoped_library("torchvision", "FRAGMENT"))
            for op in ("nms", "qnms"):
                library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            from torchvision.datasets import CIFAR10
        yield CIFAR10


MISSING = "torchvision that works (make torchvision; ANDMASK_TORCHVISION=.venv/torchvision)"
BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5")
NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


@pytest.fixture
def folder(tmp_path, loader, monkeypatch):
    """Write a small CIFAR-10 as the archive has it, and let the loader expect these very files."""
    cifar10.cache_clear()
    inside = tmp_path / "cifar-10-batches-py"
    inside.mkdir()
    draw = np.random.default_rng(0)

    def write(name, content):
        raw = pickle.dumps(content, protocol=2)  # Python 2's, whose strings are read as str
        (inside / name).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()

    def batch(name):
        content = {
            "batch_label": name,
            "labels": [int(label) for label in draw.permutation(20) % 10],
            "data": draw.integers(0, 256, (20, 3 * 32 * 32), dtype=np.uint8),
            "filenames": [f"{name}_{number}.png" for number in range(20)],
        }
        return [name, write(name, content)]

    monkeypatch.setattr(loader, "train_list", [batch(name) for name in BATCHES])
    monkeypatch.setattr(loader, "test_list", [batch("test_batch")])
    meta = {"num_cases_per_batch": 20, "label_names": NAMES}
    meta_sum = write("batches.meta", meta | {"num_vis": 3072})
    monkeypatch.setattr(loader, "meta", loader.meta | {"md5": meta_sum})
    yield tmp_path
    cifar10.cache_clear()


def raw(folder, name):
    with (folder / "cifar-10-batches-py" / name).open("rb") as file:
        content = pickle.load(file, encoding="latin1")
    return content["data"].reshape(20, 3, 32, 32), content["labels"]


def test_cifar10_comes_through_whole_and_in_order(folder):
    train, train_labels, test, test_labels = cifar10(str(folder))
    images, labels = zip(*(raw(folder, name) for name in BATCHES), strict=True)
    assert train.dtype == torch.float32
    assert np.array_equal((train * 255).round().numpy(), np.concatenate(images))
    assert train_labels.tolist() == [label for part in labels for label in part]
    assert np.array_equal((test * 255).round().numpy(), raw(folder, "test_batch")[0])
    assert test_labels.tolist() == raw(folder, "test_batch")[1]
    assert train_labels.dtype == test_labels.dtype == torch.int64


def test_the_command_trains_on_cifar10(folder, tmp_path):
    sizes = "--examples 40 --batch 20 --width 2 --epochs 1 --seeds 0".split()
    which = "--part label-noise --norm group --tau 0.3".split()
    output = tmp_path / "runs"
    run(
        "label-noise", "--data", "cifar10", "--data-dir", folder, *sizes, *which, "--output", output
    )
    for record in read_records(output):
        settings = record["identity"]["settings"]
        assert (settings["data"], settings["size"], settings["examples"]) == ("cifar10", 32, 40)
        assert "folder" not in settings
        assert 0 <= record["final"]["test"] <= 1
    assert len(read_records(output)) == 2
