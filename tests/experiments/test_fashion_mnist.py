"""The Fashion-MNIST experiment: its smoke preset learns, and its network is what it claims."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpjax.data import load_fashion_mnist
from dpjax.errors import DpjaxError
from dpjax.mechanism import DPSGD

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "fashion_mnist"


def _load():
    spec = importlib.util.spec_from_file_location("fashion_mnist_experiment", FOLDER / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


experiment = _load()


def _smoke_config(**changes):
    """The smoke preset on the real images where they are, else on digits of the same shape."""
    try:
        load_fashion_mnist()
        dataset = "fashion_mnist"
    except DpjaxError:
        dataset = "digits"
    return dataclasses.replace(experiment.PRESETS["smoke"], dataset=dataset, **changes)


def test_smoke_preset_learns_within_its_budget_in_one_compilation(tmp_path):
    output = tmp_path / "results.json"
    config = _smoke_config(output=str(output))
    # The loop multiplies an integer count by a float in its batch statistics.
    with jax.numpy_dtype_promotion("standard"):
        summary = experiment.run(config)
    assert summary["mean_accuracy"] > 0.6  # guessing gives 0.1
    assert summary["epsilon"]["pld"] < summary["epsilon"]["rdp"] <= config.target_epsilon
    assert [result["compilations"] for result in summary["runs"]] == [1]
    assert json.loads(output.read_text()) == summary
    assert str(tmp_path) not in output.read_text()


def _convolution(image, kernel):
    """Stride 2, no padding, in float64 loops: [h, w, in] and [k, k, in, out]."""
    k = kernel.shape[0]
    rows, columns = ((size - k) // 2 + 1 for size in image.shape[:2])
    out = np.zeros((rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            window = image[2 * i : 2 * i + k, 2 * j : 2 * j + k]
            out[i, j] = np.tensordot(window, kernel, axes=3)
    return out


@pytest.mark.parametrize("size, k, channels", [(34, 8, 1), (12, 4, 3)])
def test_patches_times_matrix_is_a_strided_convolution(size, k, channels):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(size, size, channels)).astype(np.float32)
    kernel = rng.normal(size=(k, k, channels, 5)).astype(np.float32)
    # Row order of the matrix: column block, row block, row within, column within, channel.
    half = k // 2
    matrix = kernel.reshape(half, 2, half, 2, channels, 5).transpose(2, 0, 1, 3, 4, 5)
    found = experiment._patches(experiment._pixels_to_channels(jnp.asarray(image)), half)
    found = found @ matrix.reshape(-1, 5)
    expected = _convolution(image.astype(np.float64), kernel.astype(np.float64))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_group_norm_reads_one_image_and_standardises_each_group():
    x = 3.0 + 2.0 * jax.random.normal(jax.random.key(0), (5, 6, 8))
    grouped = np.asarray(experiment._group_norm(x)).reshape(30, experiment.GROUPS, -1)
    np.testing.assert_allclose(grouped.mean(axis=(0, 2)), 0.0, atol=1e-5)
    np.testing.assert_allclose(grouped.std(axis=(0, 2)), 1.0, atol=1e-4)


def test_a_blank_image_has_a_finite_gradient():
    example = {"image": jnp.zeros((28, 28, 1)), "label": jnp.int32(3)}
    params = experiment.init_params(jax.random.key(0))
    grads = jax.jit(jax.grad(experiment.loss_fn))(params, example)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(grads))


def test_validation_images_are_not_trained_on():
    config = _smoke_config(num_train=None, num_validation=100)
    dataset, held_out = experiment.load(config)
    whole, _ = experiment.load(dataclasses.replace(config, num_validation=0))
    assert len(dataset) == len(whole) - 100
    np.testing.assert_array_equal(held_out.labels, whole.arrays["label"][-100:])


def test_absent_data_gives_one_line(tmp_path):
    command = [sys.executable, FOLDER / "run.py", "--preset", "smoke", "--data", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no train-images-idx3-ubyte") and "apt-get install" in line


def test_committed_results_are_those_of_the_full_preset_and_keep_the_claim():
    results = json.loads((FOLDER / "results.json").read_text())
    full = json.loads(json.dumps(dataclasses.asdict(experiment.PRESETS["full"])))
    assert results["config"] == {name: full[name] for name in results["config"]}
    assert results["min_accuracy"] >= 0.86
    assert all(run["compilations"] <= 1 for run in results["runs"])
    # The epsilons belong to the noise, the sampling and the iterations that were used.
    mechanism = DPSGD(
        l2_clip_norm=full["l2_clip_norm"],
        sampling_probability=full["expected_batch_size"] / 60_000,
        iterations=full["iterations"],
        noise_multiplier=results["noise_multiplier"],
    )
    for accountant in ("rdp", "pld"):
        found = mechanism.epsilon(full["target_delta"], accountant)
        assert found == pytest.approx(results["epsilon"][accountant], rel=0.01)
    assert results["epsilon"][full["accountant"]] <= full["target_epsilon"]
