from __future__ import annotations

import random
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from tokcomp.data import DigitsDataset
from tokcomp.runs.batches import LoaderBatches, TensorBatches, check_batch_size, held_out_batches, part_of_batch
from tokcomp.runs.data import Part, check_labels, labels_of, open_dataset, split_off, spread_sample
from tokcomp.runs.distributed import World
from torch.utils.data import Dataset, IterableDataset


class Toy(Dataset):
    """Pictures of one grey each, with labels as given."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return Image.new("L", (4, 4), index), self.labels[index]


def noisy(image: Image.Image) -> torch.Tensor:
    """Draws from all three generators."""
    drawn = torch.tensor([torch.rand(()).item(), float(np.random.rand()), random.random()])
    return drawn.view(3, 1, 1) + image.getpixel((0, 0))[0]


def loader(batch_size=4, seed=0, labels=range(10), **options) -> LoaderBatches:
    return LoaderBatches(Part(Toy(list(labels)), transform=noisy), batch_size, seed, **options)


def collected(batches, start, stop):
    return [(images.clone(), labels.clone()) for images, labels in batches.iterate(start, stop)]


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True)
    )


def test_every_image_comes_once_before_any_comes_again():
    batches = loader(batch_size=4)
    labels = torch.cat([labels for _, labels in batches.iterate(0, 5)]).tolist()
    assert sorted(labels[:10]) == sorted(labels[10:]) == list(range(10))
    assert labels[:10] != labels[10:] != list(range(10))


def test_batches_follow_from_seed_and_step_alone():
    whole = collected(loader(), 0, 6)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    assert same(whole[3:], collected(loader(), 3, 6))
    assert same(whole, collected(loader(workers=2), 0, 6))
    assert not same(whole, collected(loader(seed=1), 0, 6))


def test_an_image_is_augmented_anew_each_time():
    images = torch.cat([images for images, _ in loader(batch_size=10).iterate(0, 3)])
    noise = images.flatten(1).frac()
    assert len({tuple(row) for row in noise.tolist()}) == 30


def test_loading_leaves_the_generators_alone():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    collected(loader(), 0, 2)
    after = torch.rand(()).item(), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    assert after == (torch.rand(()).item(), np.random.rand(), random.random())


@pytest.mark.parametrize(("world", "pieces"), [(2, 1), (1, 2), (2, 2), (4, 2)])
@pytest.mark.parametrize("batch_size", [16, 32])
def test_processes_and_pieces_divide_the_batch_in_mixup_pairs(world, pieces, batch_size):
    places = []
    for rank in range(world):
        mine = loader(batch_size, labels=range(50), world=World(rank, world), pieces=pieces)
        places.append([key for step in range(3) for key in mine.keys(step)])
    alone = loader(batch_size, labels=range(50))
    assert Counter(chain.from_iterable(places)) == Counter(key for step in range(3) for key in alone.keys(step))
    parts = world * pieces
    for part in range(parts):
        indices = part_of_batch(batch_size, part, parts)
        assert [batch_size - 1 - index for index in indices] == indices[::-1]


def test_odd_parts_divide_the_batch():
    assert sorted(chain.from_iterable(part_of_batch(9, part, 3) for part in range(3))) == list(range(9))


def test_a_subset_keeps_the_length_of_an_epoch():
    assert loader(batch_size=4, labels=range(10), epoch_images=41).steps_per_epoch == 10
    assert loader(batch_size=4, labels=range(10)).steps_per_epoch == 2
    assert loader(batch_size=64, labels=range(10)).steps_per_epoch == 1
    assert len(collected(loader(batch_size=64), 0, 1)[0][1]) == 64


def test_repeats_come_together_and_differ():
    keys = loader(batch_size=6, labels=range(4), repeats=3).keys(0)
    assert len(set(keys)) == 6 and sorted(Counter(index for index, _ in keys).values()) == [3, 3]


def test_tensor_batches_augment_the_whole_batch_alike_for_any_number_of_processes():
    images, labels = torch.arange(12.0).view(12, 1, 1, 1), torch.arange(12)

    def augment(pictures, generator):
        return pictures + torch.rand(pictures.shape, generator=generator)

    def run(**options):
        return collected(TensorBatches(images, labels, 8, 3, augment=augment, **options), 1, 4)

    alone = run()
    shares = [run(world=World(rank, 2)) for rank in range(2)]
    for step, (pictures, answers) in enumerate(alone):
        assert torch.equal(pictures.flatten().floor().long(), answers)
        together = torch.cat([share[step][0] for share in shares])
        assert torch.equal(together.flatten().sort().values, pictures.flatten().sort().values)
    plain = collected(TensorBatches(images, labels, 8, 3), 1, 4)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(plain, alone, strict=True))


def test_samples_are_spread_over_the_classes_and_differ_by_seed():
    labels = [0] * 50 + [1] * 30 + [2] * 20
    random.Random(0).shuffle(labels)
    chosen = spread_sample(Toy(labels), 10, seed=0)
    assert len(set(chosen)) == 10
    counts = Counter(labels[index] for index in chosen)
    assert all(abs(counts[label] - share) <= 1 for label, share in ((0, 5), (1, 3), (2, 2)))
    assert chosen == spread_sample(Toy(labels), 10, seed=0) != spread_sample(Toy(labels), 10, seed=1)
    assert spread_sample(Toy(labels), 100, 0) == list(range(100))


def test_the_held_out_part_is_taken_away():
    rest, held_out = split_off(Toy([0, 1] * 10), 6, seed=0)
    assert len(held_out) == 6 and sorted(rest + held_out) == list(range(20))
    assert Counter(index % 2 for index in held_out) == {0: 3, 1: 3}


def test_held_out_batches_cover_the_set_in_shares():
    part = Part(Toy(list(range(7))), transform=noisy)
    whole = torch.cat([labels for _, labels in held_out_batches(part, 3)()]).tolist()
    shares = [torch.cat([x for _, x in held_out_batches(part, 3, world=World(rank, 2))()]).tolist() for rank in (0, 1)]
    assert whole == list(range(7)) and shares == [[0, 2, 4, 6], [1, 3, 5]]


def test_labels_are_found_where_data_sets_keep_them(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    folder = open_dataset("", tmp_path, split="train")
    assert labels_of(folder).tolist() == [0, 1]
    assert labels_of(Part(folder, [1])).tolist() == [1]
    check_labels(folder, 2)
    assert labels_of(DigitsDataset(train=True)).shape == (1437,)
    import tarfile

    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "train.tar", "w") as archive:
        for name in ("cat", "dog"):
            archive.add(tmp_path / name, name)
    archived = open_dataset("", tmp_path / "tars" / "train.tar", split="train")
    assert labels_of(archived).tolist() == [0, 1]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("dataset", "classes", "message"),
    [
        (Stream(), 2, "must allow random access, got a stream"),
        (Toy([]), 2, "must hold at least one image, got none"),
        (Toy([0, 1]), 0, "the model must have a classifier, got num_classes = 0"),
        (Toy([0, None, 1]), 2, "every training image must have a label, got 1 of 3 without"),
        (Toy([0, -1, -1]), 2, "every training image must have a label, got 2 of 3 without"),
        (Toy([0, 1, 2]), 2, "as many classes as the model's head, 2, got 3"),
        (Toy([0, 1]), 10, "as many classes as the model's head, 10, got 2"),
        (DigitsDataset(train=True), 1000, "as many classes as the model's head, 1000, got 10"),
    ],
)
def test_unfit_data_is_refused(dataset, classes, message):
    with pytest.raises(ValueError, match=message):
        check_labels(dataset, classes)


def test_a_held_out_part_need_not_hold_every_class(tmp_path):
    """Fewer images than classes, in every draw; the whole set has as many as the head."""
    toy = Toy(list(range(50)) * 2)
    for seed in range(20):
        _, held_out = split_off(toy, 10, seed)
        check_labels(Part(toy, held_out), 50)
    with pytest.raises(ValueError, match="as many classes as the model's head, 49, got 50"):
        check_labels(Part(toy, [0, 1]), 49)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    check_labels(Part(open_dataset("", tmp_path, split="train"), [0]), 2)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"DATA '.*nowhere' could not be opened as a data set"):
        open_dataset("", tmp_path / "nowhere", split="train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 4, 1, False), r"multiple of 4 \(4 processes x 1 accumulated pieces\), got 10"),
        ((6, 2, 3, True), r"multiple of 12 \(2 processes x 3 accumulated pieces x pairs for mixup\), got 6"),
    ],
)
def test_batches_that_do_not_divide_are_refused(arguments, message):
    check_batch_size(12, 2, 3, mixes=True)
    with pytest.raises(ValueError, match=message):
        check_batch_size(*arguments)


def test_training_digits_are_drawn_anew_from_the_global_generator():
    digits = DigitsDataset(train=True)

    def drawn(seed):
        torch.manual_seed(seed)
        return np.asarray(digits[7][0])

    assert np.array_equal(drawn(0), drawn(0)) and not np.array_equal(drawn(0), drawn(1))
    assert digits[7][0].size == (32, 32) and len(digits) == 1437
