"""Properties that must hold for all inputs (found by hypothesis), extreme values, smallest sizes, threads, and every
wrong setting of the command lines.
"""

import importlib
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_distributed import MLP, RESNET, flags

import command
import exp_mlp_mnist as mlp
import exp_resnet_imagenet as imagenet
import files
import nn

ROOT = Path(__file__).resolve().parent.parent
settings.register_profile("project", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("project")

OPERATIONS = {"+": nn.add, "*": nn.mul, "/": nn.div, "-": lambda x, y: x - y, "**": nn.power}


# ---------------------------------------------------------------------------------------------- properties


@given(arrays.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=4), st.sampled_from(sorted(OPERATIONS)),
       st.integers(0, 2**32))
def test_broadcasting_and_its_gradients(shapes, name, seed):
    """As NumPy broadcasts, and the gradient of each operand has its shape and is the derivative along a direction."""
    rng = np.random.default_rng(seed)
    (shape_x, shape_y), shape = shapes.input_shapes, shapes.result_shape
    x, y, dx, dy = (rng.uniform(0.5, 2, s) for s in (shape_x, shape_y) * 2)
    g = rng.standard_normal(shape)

    def value(x, y):
        return OPERATIONS[name](nn.Tensor(x, requires_grad=True), nn.Tensor(y, requires_grad=True))

    tensors = nn.Tensor(x, requires_grad=True), nn.Tensor(y, requires_grad=True)
    out = OPERATIONS[name](*tensors)
    assert out.shape == shape
    if not out.size:
        return
    np.testing.assert_array_equal(out.data, eval(f"x {name} y"))
    out.backward(g)
    step = 1e-6
    up, down = (value(x + s * dx, y + s * dy).data for s in (step, -step))
    numeric = np.sum(g * (up - down)) / 2 / step
    exact = np.sum(tensors[0].grad * dx) + np.sum(tensors[1].grad * dy)
    assert tensors[0].grad.shape == x.shape and tensors[1].grad.shape == y.shape
    assert exact == pytest.approx(numeric, rel=1e-6, abs=1e-6)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.data())
def test_allocation(sizes, data):
    """Exactly the budget, at least one each, and largest first: some level caps all layers, to within one weight."""
    budget = data.draw(st.integers(len(sizes), sum(sizes)))
    for how in ("largest-first", "proportional"):
        kept = nn.allocate(sizes, budget, how)
        assert sum(kept) == budget and all(1 <= k <= s for k, s in zip(kept, sizes))
    kept = nn.allocate(sizes, budget)
    cut = [k for k, s in zip(kept, sizes) if k < s]
    assert max(cut, default=0) - min(cut, default=0) <= 1
    assert all(k == s for k, s in zip(kept, sizes) if cut and s < min(cut))
    assert max(kept) <= max(cut, default=max(sizes)) + 1
    with pytest.raises(ValueError, match="cannot keep"):
        nn.allocate(sizes, data.draw(st.sampled_from([len(sizes) - 1, sum(sizes) + 1])))


@given(st.lists(st.tuples(st.integers(1, 12), st.sampled_from([1, 4, 9])), min_size=1, max_size=6), st.data())
def test_whole_kernels(layers, data):
    """Multiples of the kernel, at least one each, never more than asked for and less by under the largest kernel."""
    kept = [data.draw(st.integers(1, n * unit)) for n, unit in layers]
    units = [unit for _, unit in layers]
    if sum(units) > sum(kept):
        with pytest.raises(ValueError, match="one in each layer makes"):
            nn.whole_units(kept, units)
        return
    whole = nn.whole_units(kept, units)
    assert all(k % u == 0 and k >= u for k, u in zip(whole, units))
    assert 0 <= sum(kept) - sum(whole) < max(units) * len(units)


@given(st.tuples(st.integers(1, 6), st.integers(1, 40)), st.floats(0.01, 1), st.sampled_from([0, 0.9]),
       st.sampled_from([0, 0.01]), st.integers(0, 2**32))
def test_masked_weights_stay_zero_and_others_follow_the_dense_rule(shape, density, momentum, weight_decay, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < density
    p, free = nn.Parameter(rng.standard_normal(shape), mask), None
    free = nn.Parameter(p.data.copy())
    sgd, dense = (nn.SGD([q], 0.1, momentum, weight_decay, nesterov=momentum > 0) for q in (p, free))
    for _ in range(4):
        g = rng.standard_normal(shape)
        p.grad = free.grad = None
        p.accumulate(g.copy())
        free.accumulate(g * mask)
        sgd.step()
        dense.step()
    assert not p.data[~mask].any() and p.count == mask.sum()
    np.testing.assert_array_equal(p.data, free.data)


@given(st.floats(1e-6, 10), st.integers(1, 400), st.lists(st.integers(0, 400), max_size=4))
def test_schedules_only_fall(lr, epochs, milestones):
    for schedule in (nn.ConstantLR(lr), nn.CosineLR(lr, epochs), nn.MultiStepLR(lr, milestones)):
        rates = [schedule(epoch) for epoch in range(epochs + 1)]
        assert all(0 <= b <= a * (1 + 1e-12) for a, b in zip(rates, rates[1:])) and rates[0] <= lr
    assert nn.CosineLR(lr, epochs)(0) == lr and nn.CosineLR(lr, epochs)(epochs) == pytest.approx(0, abs=1e-12 * lr)
    passed = sum(m <= epochs for m in milestones)
    assert nn.MultiStepLR(lr, milestones)(epochs) == pytest.approx(lr * 0.1**passed)


# ---------------------------------------------------------------------------------------------- extreme values


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_large_logits(scale, dtype):
    """Loss and gradient are those of exact arithmetic: differences of logits, or 0."""
    logits = nn.Tensor(np.array([[scale, 0, -scale], [0, 0, 0], [-scale, scale, scale]], dtype), requires_grad=True)
    loss = nn.cross_entropy(logits, np.array([0, 1, 0]))
    loss.backward()
    assert loss.item() == pytest.approx((0 + math.log(3) + 2 * scale + math.log(2)) / 3, rel=1e-6)
    expected = np.array([[0, 0, 0], [1 / 3, -2 / 3, 1 / 3], [-1, 0.5, 0.5]]) / 3
    np.testing.assert_allclose(logits.grad, expected, atol=1e-7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("operation", [
    lambda x: nn.conv2d(x, nn.Tensor(np.ones((24, 24, 3, 3), np.float32)), 1, 1),  # tiles
    lambda x: nn.conv2d(x, nn.Tensor(np.ones((4, 24, 3, 3), np.float32)), 2, 1),  # rows
    lambda x: nn.BatchNorm2d(24)(x), lambda x: nn.BatchNorm2d(24)(x, relu=True), lambda x: nn.avg_pool2d(x, 2),
    lambda x: nn.max_pool2d(x, 2), nn.global_avg_pool, lambda x: nn.cross_entropy(x[:, :, 0, 0], np.zeros(2, int)),
    lambda x: nn.exp(x) * x])
def test_what_is_not_finite_is_not_hidden(value, operation):
    """One such number in the first channel's first entry: something that is not finite comes out, at the largest where
    minus infinity may be below all else.
    """
    x = np.random.default_rng(0).standard_normal((2, 24, 8, 8)).astype(np.float32)
    x[0, 0, 0, 0] = value
    with np.errstate(all="ignore"):
        out = operation(nn.Tensor(x)).data
    if not (value == -np.inf and out.shape == (2, 24, 4, 4)):  # the maximum leaves it out, and may
        assert not np.isfinite(out).all()


@pytest.mark.parametrize("experiment, more", [(MLP, {}), (RESNET, dict(width=3, base_width=2, limit=60))])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_run_that_meets_one_is_recorded_as_diverged(experiment, more, value, tmp_path, recwarn):
    def build(s, dataset):
        model = experiment.build(s, dataset)
        weights = model.parameters()[0].data.reshape(-1)
        weights[np.flatnonzero(weights)[0]] = value
        return model

    broken = replace(experiment, build=build)
    assert command.main(broken, flags(tmp_path, **(dict(width=12, epochs=2) | more))) == 1
    path, = tmp_path.rglob("result.json")
    assert files.read_json(path)["diverged"] and not recwarn.list


# ---------------------------------------------------------------------------------------------- smallest sizes


@pytest.mark.parametrize("experiment, words", [
    (MLP, dict(width=1, base_width=1, epochs=1)),  # width 1
    (MLP, dict(width=9, epochs=2, limit=3, batch=100)),  # fewer examples than a batch
    (MLP, dict(width=9, epochs=1, limit=1)),
    (RESNET, dict(width=1, base_width=1, epochs=1, limit=3)),
    (imagenet.EXPERIMENT, dict(width=1, base_width=1, epochs=1, classes=1, images=6, size=64, batch=4))])  # one class
def test_smallest_sizes(experiment, words, tmp_path):
    words = flags(tmp_path / "runs", data_dir=tmp_path / "data", **words)
    assert command.main(experiment, words) == 0
    path, = tmp_path.rglob("result.json")
    result = files.read_json(path)
    if experiment is imagenet.EXPERIMENT:
        assert result["best_test_acc"] == 1
    assert 0 <= result["final_test_acc"] <= 1 and not result["diverged"]


def test_one_image_has_no_variance(tmp_path, capsys):
    words = dict(width=1, base_width=1, epochs=1, classes=3, images=3, size=32, batch=8, data_dir=tmp_path / "data")
    assert command.main(imagenet.EXPERIMENT, flags(tmp_path / "runs", **words)) == 2  # 9 images: a batch of 8 and of 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors == ["exp_resnet_imagenet.py: batch_norm needs more than one value for each channel to train, not "
                      "images of (1, 8, 1, 1): choose another --batch or --limit, or fewer processes, so that "
                      "none has a single image of a batch"]


# ---------------------------------------------------------------------------------------------- threads


def state_after(tmp_path, script, words, threads, name):
    env = dict(os.environ, OPENBLAS_NUM_THREADS=str(threads), OMP_NUM_THREADS=str(threads))
    out = tmp_path / name
    subprocess.run([sys.executable, ROOT / "tests" / "test_distributed.py", script, *flags(out, **words)], env=env,
                   check=True, capture_output=True)
    path, = out.rglob("checkpoint.npz")
    arrays = files.load_arrays(path.read_bytes())
    return {name: array for name, array in arrays.items() if name.startswith(("model.", "optimizer."))}


@pytest.mark.parametrize("script, words, steps_differ", [
    ("mlp", dict(width=640, epochs=3), False),  # sparse products use one thread
    ("resnet", dict(width=16, base_width=16, epochs=1, limit=128, lr=0.01), True)])
def test_threads_and_bits(script, words, steps_differ, tmp_path):
    """The same seed and threads: the same bits. With 1 and 2 threads: of a sparse MLP the same bits; of a ResNet sums
    in another order, so that one step differs by rounding, below a millionth.
    """
    one, again, two = (state_after(tmp_path, script, words, threads, name)
                       for threads, name in ((1, "one"), (1, "again"), (2, "two")))
    for name, array in one.items():
        np.testing.assert_array_equal(array, again[name])
        np.testing.assert_allclose(two[name] * 1.0, array * 1.0, rtol=0, atol=1e-6 if steps_differ else 0)


# ---------------------------------------------------------------------------------------------- command line


def outcome(script, words, capsys):
    """(exit code, what is said on stderr) of a command; in this process, for speed."""
    try:
        code = command.main(importlib.import_module(script.removesuffix(".py")).EXPERIMENT, words)
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


SCRIPTS = sorted(path.name for path in ROOT.glob("exp_*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_loads_nothing_large(script):
    """So it answers at once: SciPy, matplotlib, CuPy and mpi4py are imported where they are used."""
    code = (f"import runpy, sys; sys.argv = ['{script}', '--help']\n"
            f"try: runpy.run_path('{ROOT / script}', run_name='__main__')\n"
            "finally: print(*sorted(sys.modules), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "--width" in done.stdout and f"python {script}" in done.stdout
    assert not {"scipy", "matplotlib", "cupy", "mpi4py", "scipy.sparse"} & set(done.stderr.split())


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("words, says", [
    (["--wdth", "8"], "unrecognized arguments: --wdth 8"), (["eight"], "unrecognized arguments: eight"),
    (["--width", "0"], "--width must be a number of at least 1, not 0"),
    (["--width", "2", "--base-width", "3"], "the wider base 3"), (["--lr", "-1"], "--lr must be a number of at least"),
    (["--epochs", "1e3"], "invalid int value: '1e3'"), (["--epochs"], "expected one argument"),
    (["--lr", "inf"], "--lr must be a number of at least 0, not inf"), (["--data", "mnits"], "--data is one of"),
    (["--sweep", "fig99"], "there is no figure 'fig99'"), (["--device", "tpu"], "--device is one of"),
    (["--metric", "worst"], "invalid choice: 'worst'"),
    (["--list", "fig99", "--plot", "fig99"], "only one of --sweep, --list and --plot"),
    (["--data", "synthetic", "--out", os.devnull], "Not a directory"),
    (["--data", "synthetic", "--data-dir", os.devnull + "/data"], "Not a directory"),
])
def test_wrong_settings_end_in_one_sentence(script, words, says, capsys):
    code, errors = outcome(script, words, capsys)
    assert code == 2 and says in errors and len(errors.splitlines()) == 1, errors


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_gpu_that_is_not_there(script, capsys):
    if nn.use_device("auto") == "gpu":
        nn.use_device("cpu")
        pytest.skip("a GPU is usable here")
    code, errors = outcome(script, ["--device", "gpu", "--data", "synthetic"], capsys)
    assert code == 2 and len(errors.splitlines()) == 1
    assert "a GPU was asked for but cannot be used" in errors or "--device is one of cpu, not gpu" in errors


def test_more_memory_than_there_is(tmp_path, capsys):
    assert command.main(MLP, flags(tmp_path, width=10**12, epochs=1)) == 1
    error, = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("exp_mlp_mnist.py: there is not enough memory for this (Unable to allocate")
    assert mlp.EXPERIMENT.script in error
