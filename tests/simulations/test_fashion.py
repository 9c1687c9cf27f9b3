"""Fashion-MNIST is read as it lies on disk, and its network is the published one."""

import gzip
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from atoll.federation import parameters, training
from atoll.federation.errors import DataMissing
from atoll.federation.plan import Training
from atoll.federation.task import Examples, Task
from atoll.simulations import fashion, populations

installed = pytest.mark.skipif(
    not fashion.place().is_dir(), reason="dataset-fashion-mnist is not installed"
)


def packed(values: np.ndarray) -> bytes:
    """An IDX file, written from its description."""
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    return gzip.compress(head + values.tobytes(), compresslevel=0)


@given(arrays.arrays(np.uint8, arrays.array_shapes(max_dims=4, max_side=5)))
def test_what_is_written_is_read(values):
    read = fashion.idx(packed(values))
    assert read.dtype == np.uint8
    assert np.array_equal(read, values)


@given(st.data())
def test_a_file_that_is_cut_or_of_another_type_is_refused(data):
    whole = gzip.decompress(packed(np.arange(12, dtype=np.uint8).reshape(3, 4)))
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ValueError, match=r"IDX|values"):
        fashion.idx(gzip.compress(whole[:cut]))
    with pytest.raises(ValueError, match="IDX"):
        fashion.idx(gzip.compress(whole[:2] + b"\x0d" + whole[3:]))  # floats


def write(folder, images, labels, prefix="t10k"):
    folder.mkdir(exist_ok=True)
    (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(packed(images))
    (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(packed(labels))
    return folder


def test_pixels_lie_between_zero_and_one(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    labels = np.array([9, 0, 3, 3, 1], np.uint8)
    found = fashion.dataset(write(tmp_path, images, labels), "test")
    assert found.x.shape == (5, 1, 28, 28)
    assert (found.x.dtype, found.y.dtype) == (np.float32, np.int64)
    assert np.allclose(found.x[:, 0] * 255, images, atol=1e-4)
    assert found.y.tolist() == labels.tolist()


def test_missing_files_are_one_error_that_names_the_package(tmp_path):
    with pytest.raises(DataMissing, match=r"apt-get install dataset-fashion-mnist.*FASHION_MNIST"):
        fashion.dataset(tmp_path, "train")


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    images = np.zeros((5, 28, 28), np.uint8)
    with pytest.raises(DataMissing, match="images"):
        fashion.dataset(write(tmp_path, images, np.zeros(4, np.uint8)), "test")
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"not gzip")
    with pytest.raises(DataMissing, match="cannot be read"):
        fashion.dataset(tmp_path, "test")


def test_the_directory_is_debians_unless_the_environment_names_another(tmp_path):
    assert fashion.place({}) == fashion.DEBIAN
    assert fashion.place({fashion.VARIABLE: str(tmp_path)}) == tmp_path


def test_the_network_has_the_published_layers_and_size():
    task = fashion.FashionMnist()
    assert isinstance(task, Task)
    model = task.model(3)
    convolutions = (6 * 25 + 6) + (16 * 6 * 25 + 16)
    dense = (16 * 4 * 4 * 120 + 120) + (120 * 84 + 84) + (84 * 10 + 10)
    assert len(parameters.flatten(model)) == convolutions + dense == 44_426
    assert model(torch.zeros(2, *task.input_shape)).shape == (2, len(task.classes))
    assert np.array_equal(parameters.flatten(model), parameters.flatten(task.model(3)))
    assert not np.array_equal(parameters.flatten(model), parameters.flatten(task.model(4)))


def test_its_weights_survive_being_a_vector():
    """Their order in memory is not that of the vector."""
    task, x = fashion.FashionMnist(), torch.rand(4, 1, 28, 28)
    one, other = task.model(0), task.model(1)
    parameters.unflatten(other, parameters.flatten(one))
    assert torch.equal(one(x), other(x))


@installed
def test_the_images_that_debian_ships():
    for split, rows in (("train", 60_000), ("test", 10_000)):
        found = fashion.dataset(fashion.place(), split)
        assert np.bincount(found.y).tolist() == [rows // 10] * 10
        assert found.x.shape == (rows, 1, 28, 28)
        assert (found.x.min(), found.x.max()) == (0.0, 1.0)


@installed
def test_the_network_learns_from_them():
    train = fashion.dataset(fashion.place(), "train")
    part = Examples(train.x[:3000], train.y[:3000])
    task = fashion.FashionMnist()
    model = task.model(0)
    how = Training(local_epochs=3, batch_size=32, learning_rate=0.02, momentum=0.9)
    weights = training.train(model, parameters.flatten(model), part, how, 0).weights
    test = fashion.dataset(fashion.place(), "test")
    done = training.evaluate(model, weights, Examples(test.x[:2000], test.y[:2000]))
    assert done.correct / done.rows > 0.65


@installed
def test_devices_hold_the_images_between_them():
    population = populations.named("fashion-mnist", 10, 42).population
    held = [population.examples(device, "train") for device in range(population.size)]
    assert sum(len(one.y) for one in held) == 60_000
    ((tested),) = populations.evaluated_on(population, 50)
    assert len(tested.y) == 10_000
