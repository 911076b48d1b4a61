"""kernels.py: the dense kernel against mpmath, the sparse one against sums over all masks, samples and networks."""

import warnings
from pathlib import Path

import numpy as np
import pytest

import kernels
from kernels import sparse_moments

METHODS = ("exact", "series", "enumerate", "sample")


def inputs(d, rng):
    """{kind: a pair (d,)}"""
    x, y = rng.standard_normal((2, d))
    heavy = rng.standard_t(1.2, (2, d))
    keep = rng.random((2, d)) < 0.5
    return {
        "random": (x, y),
        "correlated": (x, x + 0.1 * y),
        "opposed": (x, 0.5 * y - x),
        "heavy": tuple(heavy),
        "sparse": (x * keep[0], y * keep[1]),
        "heavy and sparse": tuple(heavy * keep),
        "disjoint": (x * (np.arange(d) % 2), y * (np.arange(d) % 2 == 0)),
        "signs": (np.sign(x), np.sign(y)),
        "images": (np.where(keep[0], -0.42, abs(x)), np.where(keep[1], -0.42, abs(y))),
        "one large": (x + 30 * np.eye(d)[0], y + 10 * np.eye(d)[0]),
    }


KINDS = list(inputs(1, np.random.default_rng(0)))


def mnist_like(pairs, rng, d=784):
    """Pairs (pairs, d) with what makes MNIST hard once each pixel is standardised: constant pixels, a background that
    is the same for both, rare large values."""
    rate = rng.beta(0.3, 1, d)
    rate[:100] = 0
    ink = (rng.random((2, pairs, d)) < rate) * rng.uniform(0.2, 1, (2, pairs, d))
    deviation = np.sqrt(np.maximum(rate * 0.41 - (rate * 0.6) ** 2, 1e-3))
    return np.where(rate > 0, (ink - 0.6 * rate) / deviation, 0)


def relative(a, b):
    return np.max(np.abs(np.array(a) / np.array(b) - 1))


# ---------------------------------------------------------------------------------------------- dense


def exact_relu_moment(mp, xx, yy, xy, order):
    xx, yy, xy = mp.mpf(float(xx)), mp.mpf(float(yy)), mp.mpf(float(xy))
    norm = mp.sqrt(xx * yy)
    cos = xy / norm if norm else mp.mpf(0)
    if cos <= -1:
        return mp.mpf(0)
    t = mp.acos(min(cos, 1))
    j = mp.sin(t) + (mp.pi - t) * mp.cos(t) if order == 1 else (
        3 * mp.sin(t) * mp.cos(t) + (mp.pi - t) * (1 + 2 * mp.cos(t) ** 2))
    return norm**order * j / (2 * mp.pi)


@pytest.mark.parametrize("order", [1, 2])
def test_relu_moment_against_mpmath(order):
    mp = pytest.importorskip("mpmath", reason="the reference for 12 digits")
    rng = np.random.default_rng(0)
    small = 10.0 ** -np.arange(1, 9, 0.25)
    angles = np.concatenate([rng.uniform(0, np.pi, 100), small, np.pi - small, [0, np.pi / 2, np.pi]])
    lengths = np.exp(rng.normal(0, 3, (2, len(angles))))
    xx, yy = lengths**2
    cases = np.array([xx, yy, lengths[0] * lengths[1] * np.cos(angles)])
    plain = np.array([(4, 9, 6), (4, 9, -6), (1, 1, 1), (1, 1, -1), (1, 1, 1 + 2**-52), (1, 1, 2**-52 - 1), (0, 3, 0),
                      (3, 5, 0), (1e-150, 1e-150, 5e-151), (1e150, 1e150, -0.5e150)]).T
    cases = np.concatenate([cases, plain], axis=1)
    values = kernels.relu_moment(*cases, order)
    assert np.isfinite(values).all()
    with mp.workdps(150):
        for case, value in zip(cases.T, values):
            wanted = exact_relu_moment(mp, *case, order)
            assert abs(mp.mpf(float(value)) - wanted) <= 1e-12 * wanted, case


def test_relu_moment_broadcasts_and_keeps_the_dtype():
    out = kernels.relu_moment(np.ones((3, 1), np.float32), np.ones(4, np.float32), np.float32(0.5), 1)
    assert out.shape == (3, 4) and out.dtype == np.float32
    assert [2 * np.pi * kernels.relu_moment(1.0, 1.0, 0.0, n) for n in (1, 2)] == pytest.approx([1, np.pi / 2])


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-14), (np.float32, 5e-7)])
def test_infinite_kernel(dtype, tolerance):
    rng = np.random.default_rng(1)
    X, Y = rng.standard_normal((1100, 30)), rng.standard_normal((1030, 30))  # more than one block each way
    X[3], Y[5], Y[6] = 0, X[7], -X[8]
    X, Y = X.astype(dtype), Y.astype(dtype)
    for A, B, out in ((X, Y, kernels.infinite_kernel(X, Y)), (X, X, kernels.infinite_kernel(X))):
        A, B = A.astype(float), B.astype(float)
        wanted = kernels.relu_moment((A * A).sum(1)[:, None], (B * B).sum(1), A @ B.T, 1) / 30
        assert out.dtype == dtype and np.abs(out - wanted).max() < tolerance * wanted.max()
    np.testing.assert_allclose(kernels.infinite_kernel(X), kernels.infinite_kernel(X).T, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.9, 1])
def test_exact_against_all_masks(kind, density):
    rng = np.random.default_rng(KINDS.index(kind))
    for d in (1, 2, 5, 14):
        x, y = inputs(d, rng)[kind]
        exact, wanted = (sparse_moments(x, y, density, method) for method in ("exact", "enumerate"))
        np.testing.assert_allclose(exact, wanted, rtol=1e-6, atol=1e-300)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "opposed"])
@pytest.mark.parametrize("density", [1e-9, 1e-3, 0.02, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_quadrature_against_all_masks(kind, density):
    """The integrals themselves, which sparse_moments uses only beyond 14 coordinates."""
    rng = np.random.default_rng(KINDS.index(kind))
    for d in (12, 13, 16):
        x, y = inputs(d, rng)[kind]
        x, y = (z[(x != 0) | (y != 0)] for z in (x, y))
        wanted = kernels.enumerate_pair(x, y, density)
        for rtol in (1e-6, 1e-7):
            *exact, error = kernels.exact_pair(x, y, density, rtol)
            assert relative(exact, wanted) < max(2 * rtol, 1e-6, 2 * error) and error < 1e-5  # error: an estimate


def test_opposed_vectors_are_exact_or_warned_about():
    rng = np.random.default_rng(2)
    for scale in (0.5, 0.1, 0.01):
        x = rng.standard_normal(18)
        y = scale * rng.standard_normal(18) - x
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exact = sparse_moments(x, y, 0.3)
        wrong = relative(exact, sparse_moments(x, y, 0.3, "enumerate")) > 3e-6
        assert caught or not wrong
    assert caught and "did not reach the relative tolerance 1e-06" in str(caught[0].message)


def test_exact_against_samples():
    """MNIST-like pairs, and a single coordinate beside many."""
    single = np.eye(200)[0], np.random.default_rng(6).standard_normal(200)
    for (x, y), densities in ((mnist_like(4, np.random.default_rng(3)), (8 / 635, 0.1)), (single, (0.02, 0.3))):
        for density in densities:
            exact = sparse_moments(x, y, density)
            *values, first, second = sparse_moments(x, y, density, "sample", masks=20_000, rng=np.random.default_rng(4))
            for value, wanted, error in zip(values, exact, (first, second)):
                assert np.all(abs(value - wanted) < 4 * error) and np.all(error < 0.1 * wanted)


@pytest.mark.parametrize("density", [1e-9, 1e-3, 0.2, 1])
def test_exact_special_pairs(density):
    """The same closed forms with few coordinates (sums over masks) and with many (integrals)."""
    rng = np.random.default_rng(5)
    for d in (8, 40):
        x = rng.standard_normal(d)
        square, fourth = (x**2).sum(), (x**4).sum()
        np.testing.assert_array_equal(sparse_moments(x, np.zeros(d), density), 0)
        np.testing.assert_allclose(sparse_moments(x, -3 * x, density), 0, atol=1e-20)
        parallel = 3 * square / 2, 9 * 1.5 * (square**2 + (1 - density) / density * fourth)
        np.testing.assert_allclose(sparse_moments(x, 3 * x, density), parallel, rtol=1e-12)


def test_exact_scales_broadcasts_and_is_symmetric():
    rng = np.random.default_rng(7)
    X, y = rng.standard_normal((2, 3, 25)), rng.standard_normal(25)
    first, second = sparse_moments(X, y, 0.2)
    assert first.shape == second.shape == (2, 3)
    np.testing.assert_allclose(sparse_moments(y, X, 0.2), (first, second), rtol=2e-6)
    np.testing.assert_allclose(sparse_moments(1e3 * X, 1e-9 * y, 0.2), (1e-6 * first, 1e-12 * second), rtol=2e-6)
    padded = np.concatenate([X, np.zeros((2, 3, 5))], -1), np.concatenate([y, np.zeros(5)])
    np.testing.assert_allclose(sparse_moments(*padded, 0.2), (first, second), rtol=1e-9)
    coarse, fine = (sparse_moments(X[0], y, 0.2, rtol=rtol) for rtol in (1e-3, 1e-8))
    assert 1e-8 < relative(coarse, fine) < 1e-3


# ---------------------------------------------------------------------------------------------- series


def test_series_converges_at_its_order():
    """Repeating the coordinates k times keeps all angles, so the relative error 1/(pd)^2 falls like 1/k^2."""
    x, y = np.random.default_rng(8).standard_normal((2, 20))
    errors = []
    for k in (8, 32, 128):
        series, exact = (sparse_moments(np.tile(x, k), np.tile(x + y, k), 0.2, method, rtol=1e-9)
                         for method in ("series", "exact"))
        errors.append(np.abs(np.array(series) / exact - 1))
    slopes = np.log(np.array(errors[1:]) / errors[:-1]) / np.log(4)
    assert (abs(slopes[0] + 2) < 0.35).all() and (abs(slopes[1] + 2) < 0.1).all(), slopes


def test_series_matrix_equals_series_pairs():
    rng = np.random.default_rng(9)
    X, Y = rng.standard_normal((530, 20)), rng.standard_normal((7, 20))  # more than one block
    X[0], Y[1], Y[2], Y[3] = 0, 2 * X[5], -X[6], 0
    for a, b in zip(kernels.series_moments(X, Y, 0.3), sparse_moments(X[:, None], Y, 0.3, "series")):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(sparse_moments(X[5], 2 * X[5], 0.3, "series"), sparse_moments(X[5], 2 * X[5], 0.3),
                               rtol=1e-7)
    dense = kernels.series_moments(X, Y, 1)[0] / 20
    np.testing.assert_allclose(dense, kernels.infinite_kernel(X, Y), atol=1e-14)


# ---------------------------------------------------------------------------------------------- networks


def test_measured_kernel_against_theory():
    """Over many networks: the mean is Kp_1/d, the mean squared distance from the dense limit is Theorem 1."""
    rng = np.random.default_rng(10)
    X, Y = mnist_like(3, rng, d=120)
    width, density = 40, 0.05
    theta = np.stack([kernels.measured_kernel(X, Y, width, density, rng).diagonal() for _ in range(3000)])
    first, _ = sparse_moments(X, Y, density)
    dense = kernels.infinite_kernel(X, Y).diagonal()
    for sample, wanted in ((theta, first / 120), ((theta - dense) ** 2, kernels.kernel_distance(X, Y, width, density))):
        error = sample.std(0, ddof=1) / np.sqrt(len(sample))
        assert (abs(sample.mean(0) - wanted) < 4 * error).all()


def test_measured_kernel_is_seeded_and_symmetric():
    X = np.random.default_rng(11).standard_normal((4, 9)).astype(np.float32)
    a, b = (kernels.measured_kernel(X, None, 50, 0.5, np.random.default_rng(1)) for _ in range(2))
    assert a.dtype == np.float32 and np.array_equal(a, b) and np.array_equal(a, a.T)
    np.testing.assert_allclose(a, kernels.measured_kernel(X, X.copy(), 50, 0.5, np.random.default_rng(1)), rtol=1e-6)


def test_kernel_distance_parts():
    rng = np.random.default_rng(12)
    x, y = rng.standard_normal((2, 5, 30))
    bias, variance = kernels.kernel_distance(x, y, 20, 0.1, split=True)
    np.testing.assert_allclose(bias + variance, kernels.kernel_distance(x, y, 20, 0.1))
    np.testing.assert_allclose(kernels.kernel_distance(x, y, 40, 0.1, split=True)[1], variance / 2)
    first, second = sparse_moments(x, y, 0.1)
    np.testing.assert_allclose(variance, (second - first**2) / (30**2 * 20))
    dense = 30 * kernels.infinite_kernel(x, y).diagonal()
    np.testing.assert_allclose(bias, ((first - dense) / 30) ** 2, rtol=1e-6)
    assert kernels.kernel_distance(x, y, 20, 1, split=True)[0].max() == 0


def test_formula_is_the_variance_of_orthogonal_inputs():
    """At p = 1 and x orthogonal to y, |x|^2 = |y|^2 = d, Eq. 4 is exact."""
    x, y = np.ones(64), np.tile([1.0, -1.0], 32)
    wanted = kernels.kernel_distance_formula(100, 1, 64)
    assert kernels.kernel_distance(x, y, 100, 1) == pytest.approx(wanted, rel=1e-12)
    assert kernels.kernel_distance_formula(1e30, 0.25, 64) == pytest.approx(1 / 1024)


@pytest.mark.parametrize("weights_per_input, d", [(8, 784), (0.5, 100), (300, 50)])
def test_optimal_density(weights_per_input, d):
    grid = np.linspace(1e-3, 1, 200_000)
    best = grid[np.argmin(kernels.kernel_distance_formula(weights_per_input / grid, grid, d))]
    assert kernels.optimal_density(weights_per_input, d) == pytest.approx(best, abs=1e-5)
    assert kernels.optimal_density(1e-3, 784) == pytest.approx(np.sqrt(1e-3 / 4 / 784), rel=0.1)


def test_optimal_width_against_all_widths():
    rng = np.random.default_rng(13)
    x, y = rng.standard_normal((2, 5, 30))
    x, y = x + 2, y - 2
    for weights, limits in ((2000, None), (lambda width: 2000 - width, (67, 600))):
        width, distance = kernels.optimal_width(x, y, weights, "series", widths=limits)
        least, greatest = limits or (67, 2000)
        kept = {n: weights(n) if callable(weights) else weights for n in range(least, greatest + 1)}
        every = {n: kernels.kernel_distance(x, y, n, min(1, kept[n] / (30 * n)), "series").mean() for n in kept}
        assert width == min(every, key=every.get) and distance == every[width]
        assert min(every) < width < max(every)


def test_an_interval_of_the_optimal_width():
    """Each resample's width is the best of all widths for its pairs, and 95 % of them lie between the ends."""
    rng = np.random.default_rng(14)
    x, y = rng.standard_normal((2, 6, 30)) + 3 * rng.standard_normal((2, 6, 1))
    every = np.array([kernels.kernel_distance(x, y, n, 2000 / (30 * n), "series") for n in range(67, 2001)])
    drawn = np.random.default_rng(3).integers(6, size=(40, 6))
    wanted = np.sort(67 + every[:, drawn].mean(-1).argmin(0))
    width, distance, (low, high) = kernels.optimal_width(x, y, 2000, "series", None, 40, np.random.default_rng(3))
    assert (width, distance) == kernels.optimal_width(x, y, 2000, "series")
    assert (low, high) == pytest.approx((wanted[1], wanted[38]), rel=0.05) and 67 < low < width < high < 2000
    starving = np.array([kernels.kernel_distance(x, y, n, (2000 - 9 * n) / (30 * n), "series") for n in range(52, 221)])
    wanted = np.sort(52 + starving[:, drawn].mean(-1).argmin(0))  # the distance climbs steeply at the last widths
    rng = np.random.default_rng(3)
    *_, interval = kernels.optimal_width(x, y, lambda n: 2000 - 9 * n, "series", (52, 220), 40, rng)
    assert interval == pytest.approx((wanted[1], wanted[38]), rel=0.03)
    sampled = kernels.optimal_width(x, y, 2000, "sample", (67, 70), masks=100, rng=np.random.default_rng(4))
    assert 67 <= sampled[0] <= 70
    with pytest.raises(ValueError, match="an interval by resampling needs rng"):
        kernels.optimal_width(x, y, 2000, "series", resamples=3)


# ---------------------------------------------------------------------------------------------- regression


def test_kernels_are_positive_semi_definite():
    X = np.random.default_rng(14).standard_normal((14, 20))
    for matrix in (kernels.infinite_kernel(X), kernels.measured_kernel(X, None, 30, 0.2, np.random.default_rng(0)),
                   sparse_moments(X[:, None], X, 0.2, rtol=1e-5)[0] / 20):
        assert np.linalg.eigvalsh(matrix).min() > -1e-6 * np.trace(matrix)


def test_gp_predict():
    rng = np.random.default_rng(15)
    centres = 2 * rng.standard_normal((3, 6))
    labels = rng.integers(0, 3, 240)
    X = centres[labels] + rng.standard_normal((240, 6))
    train, test = X[:160], X[160:]
    kernel, cross = kernels.infinite_kernel(train), kernels.infinite_kernel(test, train)
    out = kernels.gp_predict(kernel, labels[:160], cross, rng=rng)
    assert (out.labels == labels[160:]).mean() > 0.9 and out.held_out_accuracy > 0.9
    noisy = kernel + out.noise * np.trace(kernel) / 160 * np.eye(160)
    np.testing.assert_allclose(out.scores, cross @ np.linalg.solve(noisy, np.eye(3)[labels[:160]]), atol=1e-8)
    assert out.noise in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    wrong = rng.permutation(labels[:160])  # labels without meaning: little noise cannot be better by much
    assert kernels.gp_predict(kernel, wrong, cross).held_out_accuracy < 0.6


def test_gp_predict_chooses_the_noise_on_held_out_data():
    """Noisy labels on a line: almost no noise fits them all and does worse than the right amount."""
    rng = np.random.default_rng(16)
    X = np.stack([rng.uniform(-1, 1, 400), np.ones(400)], 1)
    labels = np.where(rng.random(400) < 0.25, rng.integers(0, 2, 400), X[:, 0] > 0).astype(int)
    kernel = kernels.infinite_kernel(X)
    out = kernels.gp_predict(kernel, labels, kernel, noises=(1e-9, 1e-2), rng=rng)
    assert out.noise == 1e-2


# ---------------------------------------------------------------------------------------------- mistakes


def test_mistakes():
    x, X = np.ones(30), np.ones((3, 4))
    rng = np.random.default_rng(0)
    mistakes = [
        (lambda: kernels.relu_moment(1.0, 1.0, 0.0, 3), "order is 1 or 2, not 3"),
        (lambda: kernels.infinite_kernel(X, np.ones((3, 5))), r"same number of columns, not \(3, 4\) and \(3, 5\)"),
        (lambda: sparse_moments(x, x, 0), "density is a number above 0 and at most 1, not 0"),
        (lambda: sparse_moments(x, x, 1.5), "density is"),
        (lambda: kernels.series_moments(X, X, float("nan")), "density is"),
        (lambda: kernels.measured_kernel(X, X, 5, -1, rng), "density is"),
        (lambda: sparse_moments(x, x, 0.5, "guess"), "'exact', 'series', 'enumerate' or 'sample', not 'guess'"),
        (lambda: sparse_moments(x, x, 0.5, "enumerate"), "all masks of 30 non-zero coordinates is too long: 20"),
        (lambda: sparse_moments(x, x, 0.5, "sample"), "needs rng, a NumPy generator"),
        (lambda: kernels.kernel_distance(x, x, 0, 0.5), "width is a number above 0, not 0"),
        (lambda: kernels.optimal_density(-1, 784), "weights_per_input is a number above 0, not -1"),
        (lambda: kernels.optimal_width(x, x, lambda n: 9), r"needs widths=\(least, greatest\)"),
        (lambda: kernels.optimal_width(x, x, 50, widths=(9, 5)), r"in this order, not \(9, 5\)"),
        (lambda: kernels.gp_predict(np.eye(3), np.arange(4), np.eye(4)), r"4 labels need a kernel of shape \(4, 4\)"),
        (lambda: kernels.gp_predict(np.eye(4), np.arange(4), np.eye(4), held_out=1.0), "held_out is a fraction that"),
        (lambda: kernels.gp_predict(-np.eye(4), np.arange(4), np.eye(4), held_out=0.5),
         "kernel of 2 inputs with noise 0.0001 is not positive definite: take a greater noise"),
    ]
    for mistake, sentence in mistakes:
        with pytest.raises(ValueError, match=sentence):
            mistake()


def labelled(labels, n=4, **options):
    return kernels.gp_predict(np.eye(n), labels, np.eye(n), held_out=0.5, **options)


@pytest.mark.parametrize("mistake, sentence", [
    (lambda x, X, rng: sparse_moments(x, np.ones(1), 0.5), r"arrays \(..., d\) of the same d, not \(30,\) and \(1,\)"),
    (lambda x, X, rng: sparse_moments(1.0, 1.0, 0.5), r"not \(\) and \(\)"),
    (lambda x, X, rng: sparse_moments(x * np.nan, x, 0.5), "finite numbers, without NaN"),
    (lambda x, X, rng: sparse_moments(x, x, "0.5"), "density is a number above 0 and at most 1, not '0.5'"),
    (lambda x, X, rng: sparse_moments(x, x, np.ones(2)), "density is a number"),
    (lambda x, X, rng: sparse_moments(x, x, 0.5, rtol=np.nan), "rtol is a number above 0, not nan"),
    (lambda x, X, rng: sparse_moments(x, x, 0.5, "sample", masks=0, rng=rng), "masks is a whole number of at least 2"),
    (lambda x, X, rng: sparse_moments(x, x, 0.5, "sample", masks=1, rng=rng), "masks is .* of at least 2, not 1"),
    (lambda x, X, rng: sparse_moments(x, x, 0.5, "sample", masks=9.5, rng=rng), "masks is a whole number"),
    (lambda x, X, rng: sparse_moments(x, x, 0.5, "sample", rng=0), "needs rng, a NumPy generator"),
    (lambda x, X, rng: kernels.infinite_kernel(X[:, :0]), "matrices with the same number of columns"),
    (lambda x, X, rng: kernels.kernel_distance(x, np.ones(1), 5, 0.5), "of the same d"),
    (lambda x, X, rng: kernels.kernel_distance(x[:0], x[:0], 5, 0.5), "of the same d"),
    (lambda x, X, rng: kernels.kernel_distance(x, x, "5", 0.5), "width is a number above 0, not '5'"),
    (lambda x, X, rng: kernels.measured_kernel(X, X, 0, 0.5, rng), "width is a whole number of at least 1, not 0"),
    (lambda x, X, rng: kernels.measured_kernel(X, X, 1.5, 0.5, rng), "width is a whole number of at least 1, not 1.5"),
    (lambda x, X, rng: kernels.measured_kernel(X, X, 5, 0.5, None), "measured_kernel needs rng"),
    (lambda x, X, rng: kernels.kernel_distance_formula(10, 1.5, 30), "density is above 0 and at most 1"),
    (lambda x, X, rng: kernels.kernel_distance_formula(np.array([10, -1]), 0.5, 30), "width and d are positive"),
    (lambda x, X, rng: kernels.optimal_width(x, x, 0), "weights is a number above 0, not 0"),
    (lambda x, X, rng: kernels.optimal_width(x, x, 50, widths=(4.5, 9)), "each of widths is a whole number"),
    (lambda x, X, rng: kernels.optimal_width(x, x, 50, widths=(4, 9, 12)), "two positive integers"),
    *((lambda x, X, rng, n=n: kernels.optimal_width(x, x, n), f"weights is a number above 0, not {n}")
      for n in (np.inf, np.nan, -3)),
    (lambda x, X, rng: kernels.optimal_width(x[None][:0], x, 50), "one pair x, y or more"),
    (lambda x, X, rng: kernels.optimal_width(x, x, 60, widths=(1, 9)),
     "width 1 and 30 inputs cannot keep 60.0 weights: its widths begin at 2"),
    (lambda x, X, rng: kernels.optimal_width(x, x, lambda n: 9 - n, widths=(9, 9)),
     "weights of a first layer of width 9 is a number above 0, not 0"),
    *((lambda x, X, rng, f=f: f(X * [1, 1, np.nan, 1]), "X and Y are matrices of finite numbers") for f in (
        kernels.infinite_kernel, lambda X: kernels.series_moments(X, X, 0.5),
        lambda X: kernels.measured_kernel(X, None, 3, 0.5, np.random.default_rng(0)))),
    *((lambda x, X, rng, squares=squares: kernels.relu_moment(*squares, 1), "xx and yy are squared lengths")
      for squares in ((-1, 1, 0), (1, np.array([1, np.nan]), 0), (1, 1, np.nan))),
    (lambda x, X, rng: labelled([0, 1, -1, 0]), "labels are integers from 0, .* from -1"),
    (lambda x, X, rng: labelled([0.0, 1, 1, 0]), "labels are integers from 0"),
    (lambda x, X, rng: labelled([True, False, True, False]), "labels are integers from 0"),
    (lambda x, X, rng: labelled([[0], [1], [1], [0]]), "labels are integers from 0"),
    (lambda x, X, rng: labelled([0, 1, 1, 0], noises=()), "noises is a list of one number or more"),
    (lambda x, X, rng: labelled([0, 1, 1, 0], noises=(-0.5,)), "each of noises is a number of at least 0"),
    (lambda x, X, rng: labelled([0, 1, 1, 0], noises=(np.nan,)), "each of noises is a number of at least 0"),
    (lambda x, X, rng: kernels.gp_predict(np.eye(4) * np.nan, [0, 1, 1, 0], np.eye(4)), "finite numbers, without NaN"),
    (lambda x, X, rng: kernels.gp_predict(np.eye(4), [0, 1, 1, 0], np.eye(4) / 0.0), "finite numbers, without NaN"),
    (lambda x, X, rng: kernels.gp_predict(np.tri(4), [0, 1, 1, 0], np.eye(4)), "is a symmetric matrix"),
])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_wrong_values_are_told_in_one_sentence(mistake, sentence):
    with pytest.raises(ValueError, match=sentence):
        mistake(np.ones(30), np.ones((3, 4)), np.random.default_rng(0))


@pytest.mark.parametrize("function", [
    lambda a: kernels.infinite_kernel(a.astype(complex)), lambda a: sparse_moments(a, a.astype(complex), 0.5),
    lambda a: sparse_moments(a.astype(str), a, 0.5)])
def test_inputs_are_real_numbers(function):
    with pytest.raises(TypeError, match="real numbers, not"):
        function(np.ones((2, 3)))


def test_a_program_that_makes_numpy_raise():
    """What underflows on the way is of no weight in the result."""
    x, y = np.random.default_rng(20).standard_normal((2, 3, 30))
    small = np.array([[1, 1e-100], [1e-200, 1]])
    for f in (lambda: sparse_moments(x, y, 0.3), lambda: sparse_moments(x, y, 1e-3), lambda: sparse_moments(x, y, 1.0),
              lambda: sparse_moments(x[:, :9], y[:, :9], 0.3), lambda: sparse_moments(0 * x, y, 0.3),
              lambda: kernels.series_moments(small, small, 0.3), lambda: kernels.infinite_kernel(small, small),
              lambda: kernels.measured_kernel(small, None, 4, 0.3, np.random.default_rng(0)),
              lambda: kernels.kernel_distance(small, small[::-1], 9, 0.3),
              lambda: kernels.kernel_distance(x, y, 9, 0.3), lambda: kernels.optimal_width(x, y, 300, "series"),
              lambda: sparse_moments(x, y, 0.3, "sample", masks=10, rng=np.random.default_rng(0))):
        want = f()
        with np.errstate(all="raise"):
            np.testing.assert_array_equal(f(), want)


@pytest.mark.parametrize("mistake, error, sentence", [
    (lambda G, L: kernels.gp_predict(G, L, G, rng=0), ValueError, "gp_predict needs rng, a NumPy generator"),
    *((lambda G, L, h=h: kernels.gp_predict(G, L, G, held_out=h), ValueError, "held_out is a number of at least 0")
      for h in (None, "0.2", [0.2], np.nan)),
    (lambda G, L: kernels.gp_predict(G, ["a", "b"] * 3, G), ValueError, "labels are integers from 0"),
    (lambda G, L: kernels.gp_predict(G * 1j, L, G), TypeError, "matrices of real numbers"),
    (lambda G, L: kernels.relu_moment(1.0, 1.0, 0.5j, 1), TypeError, "real numbers, not complex ones"),
    (lambda G, L: kernels.kernel_distance(G[:3], G[:2], 9, 0.3), ValueError, r"\(3, 6\) and \(2, 6\); for all pairs"),
    *((lambda G, L, n=n: kernels.kernel_distance_formula(n, 0.5, 30), ValueError, "width and d are positive numbers")
      for n in (10 + 1j, None, [10, -1], "10"))])
def test_what_kernels_are_not_made_of(mistake, error, sentence):
    with pytest.raises(error, match=sentence):
        mistake(np.eye(6) + 0.5, [0, 1, 0, 1, 1, 0])


def test_a_warning_names_the_line_of_the_user():
    x = np.random.default_rng(0).standard_normal(40)
    with pytest.warns(RuntimeWarning, match="did not reach") as warned:
        sparse_moments(x, -x + 1e-4, 0.1)
    assert [Path(w.filename).name for w in warned] == ["test_kernels.py"]


def test_numbers_instead_of_lists_are_told_in_one_sentence():
    x = np.ones(3)
    for mistake, name in ((lambda: labelled([0, 1, 1, 0], noises=0.1), "noises is a list, not 0.1"),
                          (lambda: kernels.optimal_width(x, x, 5, widths=9), "widths is a list, not 9")):
        with pytest.raises(TypeError, match=name):
            mistake()


@pytest.mark.parametrize("large", [2.0**60, 2.0**500, 2.0**-500])
def test_very_long_beside_very_short_vectors(large):
    """Kp_l grows with the lengths, and only their product need be a floating-point number."""
    x, y = np.random.default_rng(19).standard_normal((2, 3, 30))
    for method in ("exact", "series", "sample"):
        moments = [sparse_moments(x * a, y * b, 0.3, method, **({"rng": np.random.default_rng(0)} if method == "sample"
                                                              else {})) for a, b in ((1, 1), (large, 1 / large))]
        np.testing.assert_array_equal(*moments)
    for f in (lambda x, y: kernels.series_moments(x, y, 0.3), kernels.infinite_kernel,
              lambda x, y: kernels.kernel_distance(x, y, 9, 0.3)):
        np.testing.assert_array_equal(f(x, y), f(x * large, y / large))
    if large == 2.0**60:
        x, y = x.astype(np.float32), y.astype(np.float32)
        np.testing.assert_array_equal(kernels.infinite_kernel(x, y),
                                      kernels.infinite_kernel(x * np.float32(2.0**100), y * np.float32(2.0**-100)))


def test_numbers_of_all_kinds_are_as_good_as_python_floats():
    """NumPy's small types would overflow or round: a density or a width of them, bytes, a kernel of integers."""
    rng = np.random.default_rng(18)
    X = rng.integers(0, 256, (3, 40), np.uint8)
    x, y = X[:2]
    density, width = np.float32(0.2), np.uint8(20)
    for method in ("exact", "series"):
        plain = x.astype(float), y.astype(float)
        np.testing.assert_array_equal(sparse_moments(x, y, density, method),
                                      sparse_moments(*plain, float(density), method))
        np.testing.assert_array_equal(kernels.kernel_distance(x, y, width, density, method),
                                      kernels.kernel_distance(*plain, 20, float(density), method))
    measured = [kernels.measured_kernel(X, None, n, p, np.random.default_rng(0))
                for n, p in ((width, density), (20.0, float(density)))]
    np.testing.assert_array_equal(*measured)
    assert labelled([0, 1, 1, 0]).scores.dtype == np.float64
    formula = kernels.kernel_distance_formula
    assert formula(np.uint8(100), 0.5, np.int16(10000)) == formula([100], [0.5], 10000)[0] == formula(100, 0.5, 1e4)
    np.testing.assert_array_equal(kernels.kernel_distance(x, y, np.array(9), np.array(0.2)),
                                  kernels.kernel_distance(x, y, 9, 0.2))
    G = np.eye(3) + 0.5
    assert kernels.gp_predict(G, np.uint8([0, 255, 0]), G, held_out=0.4).scores.shape == (3, 256)
    whole = kernels.gp_predict(np.eye(4, dtype=int), [0, 1, 1, 0], np.eye(4, dtype=int), held_out=0.5)
    np.testing.assert_allclose(whole.scores, labelled([0, 1, 1, 0]).scores)


def test_small_sets_of_inputs():
    assert kernels.infinite_kernel(np.zeros((0, 4)), np.ones((2, 4))).shape == (0, 2)
    for method in METHODS:
        options = {"masks": 100, "rng": np.random.default_rng(0)} if method == "sample" else {}
        assert sparse_moments(np.zeros((0, 4)), np.ones(4), 0.5, method, **options)[0].shape == (0,)
        assert np.shape(sparse_moments(np.ones(4), np.ones(4), 0.5, method, **options)[0]) == ()
