"""lab.figures: points and their statistics, tables, records that grow and that are edited badly, what pictures say."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import exp_bottleneck
import exp_mlp_mnist as mlp
import exp_resnet_cifar as resnet
import exp_resnet_imagenet
import lab
from lab import draw_mlp, figures
from lab.files import FileFault, read_json
from lab.run import NUMBERS, Run

RECORDS = sorted((Path(__file__).resolve().parent.parent / "results").glob("*.json"))
SCRIPTS = {module.EXPERIMENT.command: module.EXPERIMENT
           for module in (mlp, resnet, exp_bottleneck, exp_resnet_imagenet)}


def made_up(accuracy=0.5, weights=3970, **changes):
    """The result of a run that nobody trained."""
    accuracies = {f"{metric}_{part}_acc": accuracy - 0.01 * (metric == "final")
                  for metric in ("best", "final") for part in ("test", "train")}
    return {"weights": weights, "connectivity": 0.5, "diverged": False, **accuracies, "epochs": 3, "seconds": 1.0,
            "config": {"versions": {"numpy": np.__version__}}, **changes}


def finish(experiment, settings, result):
    """Put a result where the run of these settings would leave it."""
    folder = Run(experiment, settings).folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def records(tmp_path, monkeypatch):
    """The folder of records, empty."""
    monkeypatch.setattr(figures, "RECORDS", tmp_path / "results")
    return tmp_path / "results"


# ---------------------------------------------------------------------------------------------- points and words


def test_points_and_their_statistics():
    s = mlp.Settings()
    runs = [replace(s, width=w, seed=i) for w in (10, 20) for i in range(3)]
    results = [{"diverged": i == 5, "best_test_acc": 0.9 + 0.01 * (i % 3)} for i in range(6)]
    results[1] = None
    ten, twenty = figures.points(runs, results)
    assert ten.values("best_test_acc") == [0.9, 0.92] and ten.missing == 1
    assert ten.mean("best_test_acc") == pytest.approx(0.91) and ten.std("best_test_acc") == pytest.approx(0.01 * 2**0.5)
    assert len(twenty.results) == 3 and len(twenty.finished) == 2 and twenty.missing == 0
    assert twenty.mean("best_test_acc") == pytest.approx(0.905)
    none, = figures.points(runs[:3], 3 * [None])
    assert np.isnan(none.mean("best_test_acc")) and none.std("best_test_acc") == 0 and none.missing == 3


def test_seeds_of_a_figure():
    s = mlp.Settings(seed=4)
    assert [r.seed for r in lab.over_seeds(s, [s], 3)] == [4, 5, 6]
    assert [r.seed for r in lab.over_seeds(replace(s, seeds=2), [s], 3)] == [4, 5]


def test_departures_are_all_that_is_not_the_protocol():
    s = resnet.Settings(data="svhn", width=12, base_width=8, seed=3, jobs=4, device="cpu", precision="tf32")
    assert lab.departures(s) == []
    for name, value in dict(epochs=9, limit=5, held_out=5, batch=7, lr=0.2, how="proportional", io_only=True,
                            schedule="cosine", momentum=0.5, weight_decay=0.1, precision="bf16", padding=1,
                            flip="no").items():
        assert lab.departures(replace(s, **{name: value})) == [f"{name.replace('_', ' ')} {value}"]
        assert lab.departures(replace(s, **{name: value}), (name,)) == []


def test_a_title_says_what_is_shown_and_how_far_it_is_from_the_paper():
    s = resnet.Settings(width=12, base_width=8, lr=0.01, how="proportional", io_only=True, held_out=500)
    one = figures.points([s], [made_up()])
    assert figures.title(one, "best", about=("io_only",)) == (
        "best test accuracy over 300 epochs, lr 0.01, how proportional, 1 seed")
    assert "io only True" in figures.title(one, "best")
    assert figures.subject(one) == "CIFAR-10, tested on 500 held-out training images"
    short = resnet.Settings(epochs=1, limit=5000, schedule="cosine")
    runs = [replace(short, seed=seed) for seed in range(4)]
    some = figures.points(runs, [made_up(), None, made_up(), None])
    assert figures.subject(some) == "CIFAR-10, first 5,000 training images"
    assert figures.title(some, "final", "training") == (
        "training accuracy after 1 epoch (the paper: 300), schedule cosine, mean of 2 seeds\n"
        "bars: standard deviation over seeds, 2 of 4 runs missing")
    other = figures.points([s], [made_up() | {"unpublished": "test.bin is not the published one"}])
    assert figures.title(other, "best").endswith("1 seed\nthe data are not the published files")


def test_starved_networks_do_not_flatten_the_picture():
    """A network that is wider than the best and far below it becomes an arrow with its value."""
    assert figures.starved(np.array([60.0, 90, 80, 74, 12])).tolist() == [False, False, False, True, True]
    s = mlp.Settings()
    runs = [replace(s, width=w) for w in (5, 80, 640)]
    grouped = figures.points(runs, [made_up(0.90), made_up(0.96), made_up(0.14)])
    picture, (sentence, _) = draw_mlp.width(grouped, "best")
    ax, = picture.axes
    assert [text.get_text() for text in ax.texts] == ["14 %"] and ax.get_ylim()[0] > 85
    assert sentence == "sparse: 3,970 weights at every width: 90.00 % at 5, 96.00 % at 80, 14.00 % at 640"


# ---------------------------------------------------------------------------------------------- plots and records


def draw_nothing(points, metric):
    return figures.panels(size=(1, 1))[0], []


def four_seeds(out):
    """(an experiment whose one figure shows four seeds, settings whose runs lie in `out`, the runs)"""
    figure = figures.Figure("four seeds", lambda s: [replace(s, seed=i) for i in range(4)], draw_nothing)
    settings = mlp.Settings(data="synthetic", width=5, epochs=3, out=str(out))
    return replace(mlp.EXPERIMENT, figures={"fig": figure}), settings, figure.runs(settings)


def test_a_figure_from_runs_and_from_its_record(records, tmp_path, capsys):
    words = ["--data", "synthetic", "--epochs", "3", "--seeds", "1", "--plot", "width"]
    here, nowhere = ["--out", str(tmp_path / "runs")], ["--out", str(tmp_path / "none")]
    assert lab.main(mlp.EXPERIMENT, words + here) == 2
    assert "none of the 13 runs of width is done; train them with --sweep width\n" in capsys.readouterr().err
    runs = mlp.width_runs(mlp.Settings(data="synthetic", epochs=3, seeds=1, out=here[1]))
    for i, run in enumerate(runs):
        finish(mlp.EXPERIMENT, run, made_up(0.9 + 0.001 * i))
    assert lab.main(mlp.EXPERIMENT, words + here + ["--record"]) == 0
    drawn = capsys.readouterr().out
    picture = records / "mlp_mnist_synthetic_width.png"
    record = json.loads(picture.with_suffix(".json").read_text())
    assert picture.stat().st_size > 10_000 and "13 of 13 runs are done\n" in drawn
    assert "share of the dense improvement, base 5: 14 % at 10, 25 % at 20" in drawn
    assert len(record["runs"]) == 13 and record["versions"] == [{"numpy": np.__version__}] and "missing" not in record
    assert lab.main(mlp.EXPERIMENT, words + nowhere) == 0  # the same table comes from the record
    again = capsys.readouterr().out
    assert "13 of them recorded in results/" in again
    assert drawn.split("\n\n")[0] == again.split("\n\n")[0]
    picture.with_suffix(".json").rename(records / "mlp_mnist_other.json")
    assert lab.main(mlp.EXPERIMENT, words + nowhere) == 0  # whichever figure's record holds its runs
    assert "13 of them recorded in results/" in capsys.readouterr().out
    (records / "mlp_mnist_other.json").rename(picture.with_suffix(".json"))
    assert (tmp_path / "none/mlp_mnist/synthetic/mlp_mnist_synthetic_width.png").stat().st_size > 10_000
    assert record["command"] == "python exp_mlp_mnist.py --plot width --data synthetic --epochs 3 --seeds 1"
    assert lab.main(mlp.EXPERIMENT, ["--data", "synthetic", "--plot", "width", *nowhere]) == 2
    assert record["command"] in capsys.readouterr().err  # with other settings the recorded ones are pointed to


def test_gains_over_the_narrowest_and_what_is_as_good_as_the_best(tmp_path):
    accuracy = {8: 0.80, 12: 0.85, 18: 0.86}
    runs = resnet.fig6_runs(resnet.Settings(bases="8", widths="8,12,18", seeds=3))
    results = [made_up(accuracy[run.width] + 0.02 * (run.seed - 1) * (run.width == 12), connectivity=0.1)
               for run in runs]
    made = figures.points(runs, results)
    assert figures.gains(made, "best_test_acc", made[0], "8") == [
        "  points above 8, with 95 % intervals: +5.00 ± 4.97 at 12, +6.00 ± 0.00 at 18"]
    best = "  not distinguishable from the best: width 12 (connectivity 10 %), width 18 (connectivity 10 %)"
    assert figures.as_good_as_the_best(made, "best_test_acc") == [best]
    fourth = replace(made[0], settings=replace(made[0].settings, width=24), results=made[0].results[:2])
    assert figures.as_good_as_the_best([*made, fourth], "best_test_acc") == [f"{best}; too few seeds to say at 24"]
    dense = [replace(p, results=tuple(r | {"connectivity": 1.0} for r in p.results)) for p in made]
    assert figures.as_good_as_the_best(dense, "best_test_acc") == [
        "  not distinguishable from the best: width 12, width 18"]
    one_seed = figures.points(runs[::3], [made_up(accuracy[run.width]) for run in runs[::3]])
    assert figures.gains(one_seed, "best_test_acc", one_seed[0], "8") == []
    assert figures.as_good_as_the_best(made[:2], "best_test_acc") == []


def test_a_dense_gain_of_nothing_has_no_share_and_an_uncertain_one_says_so():
    runs = mlp.width_runs(mlp.Settings(seeds=3))
    dense = {5: 0.90, 10: 0.905, 20: 0.90, 40: 0.95}  # 10: two seeds of three at 0.89, below the base

    def accuracy(run):
        spread = 0.015 * (run.seed - 1) * (run.dense and run.width == 10)
        return dense.get(run.width, 0.95) + spread - 0.02 * (run.width > 5 and not run.dense)

    found, lines = figures.shares(figures.points(runs, [made_up(accuracy(run)) for run in runs]), "best_test_acc")
    assert list(found[5]) == [10, 40, 80, 160, 320] and found[5][40] == (pytest.approx(0.6), pytest.approx(0, abs=1e-9))
    assert lines == ["base 5: at width 10 the dense network gains 0.50 ± 3.73 points, not told from 0: a share of it "
                     "says little", "base 5: at width 20 the dense network gains 0.00 points, too little to have parts"]
    assert figures.told_shares({10: (0.6, 0.12), 20: (0.5, float("nan"))}) == "60 ± 12 % at 10, 50 % at 20"


@pytest.mark.parametrize("content", ["{nonsense", '{"runs": []}', '{"runs": [], "figure": "fig6", "command": ["x"]}'])
def test_faulty_records_end_no_list(records, tmp_path, capsys, content):
    records.mkdir()
    (records / "resnet_cifar_fig6.json").write_text(content)
    words = ["--bases", "8", "--widths", "8,12", "--seeds", "1", "--out", str(tmp_path)]
    assert lab.main(resnet.EXPERIMENT, ["--list", "fig12", *words]) == 0
    assert "0 of 2 runs are done\n" in capsys.readouterr().out
    assert lab.main(resnet.EXPERIMENT, ["--plot", "fig12", *words]) == 2
    assert capsys.readouterr().err.endswith("none of the 2 runs of fig12 is done; train them with --sweep fig12\n")


def test_recorded_runs_serve_a_list_and_a_figure_of_the_same_runs(records, tmp_path, capsys):
    one, nowhere = ["--bases", "8", "--widths", "8,12", "--seeds", "1"], ["--out", str(tmp_path / "none")]
    first, second = resnet.fig6_runs(resnet.Settings(bases="8", widths="8,12", seeds=1, out=str(tmp_path / "runs")))
    finish(resnet.EXPERIMENT, first, made_up(0.75))
    assert lab.main(resnet.EXPERIMENT, ["--plot", "fig6", *one, "--out", first.out, "--record"]) == 0
    assert lab.main(resnet.EXPERIMENT, ["--list", "fig12", *one, *nowhere]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"{second.run_name()}: not begun", f"{first.run_name()}: recorded: test 75.00 % best, 74.00 % final",
        "0 of 2 runs are done, 1 recorded in results/"]
    assert lab.main(resnet.EXPERIMENT, ["--plot", "fig12", "--epochs", "3", *nowhere]) == 2  # of which none is recorded
    assert capsys.readouterr().err.endswith(
        "; train them with --sweep fig12, or draw the recorded ones: "
        "python exp_resnet_cifar.py --plot fig12 --seeds 1 --bases 8 --widths 8,12\n")
    assert lab.main(resnet.EXPERIMENT, ["--plot", "fig9", "--epochs", "3", *nowhere]) == 2  # has other runs
    assert capsys.readouterr().err.endswith("; train them with --sweep fig9\n")


def test_tables_list_what_is_done_or_stated(records, tmp_path, capsys):
    s = mlp.Settings(out=str(tmp_path))
    for run in mlp.fig5_runs(s)[1:13]:
        finish(mlp.EXPERIMENT, run, made_up(0.95, diverged=run.last == 0.5))
    figures.plot(mlp.EXPERIMENT, "fig5", s, "best", record=False)
    out = capsys.readouterr().out
    assert "12 of 134 runs are done; --list fig5 names the others, --sweep fig5 trains them" in out
    assert "  about 90 %  missing  " in out and out.count("python exp_mlp_mnist.py") == 13
    assert "95.00 % (1)" in out and "- (0), 1 diverged" in out and "ReLU: best 95.00 %" in out


def test_a_record_grows(records, tmp_path, capsys):
    """Two runs, then two more from another disk and by another version; each time the record says what is missing."""
    experiment, s, runs = four_seeds(tmp_path / "one")
    path = records / "mlp_mnist_synthetic_fig.json"
    for run in runs[:2]:
        finish(experiment, run, made_up(0.5))
    figures.plot(experiment, "fig", s, "best", record=True)
    record = read_json(path)
    assert record["missing"] == 2 and [row["run"] for row in record["runs"]] == [r.run_name() for r in runs[:2]]
    assert "2 of 4 runs are done; --list fig" in capsys.readouterr().out
    figures.plot(experiment, "fig", replace(s, out=str(tmp_path / "none")), "best", record=False)
    assert "2 of 4 runs are done, 2 of them recorded" in capsys.readouterr().out
    other, newer = replace(s, out=str(tmp_path / "two")), {"versions": {"numpy": "9"}, "ranks": [2, 3]}
    for run in runs[1:]:
        finish(experiment, replace(run, out=other.out), made_up(0.6, config=newer))
    figures.plot(experiment, "fig", other, "best", record=True)
    record = read_json(path)
    assert "missing" not in record and record["versions"] == [{"numpy": np.__version__}, {"numpy": "9"}]
    assert [row["best_test_acc"] for row in record["runs"]] == [0.5, 0.6, 0.6, 0.6]  # a run on disk replaces its row
    assert [row.get("ranks") for row in record["runs"]] == [None, [2, 3], [2, 3], [2, 3]]
    assert "4 of 4 runs are done, 1 of them recorded" in capsys.readouterr().out
    finish(experiment, replace(runs[0], out=other.out), made_up(0.6, config=newer))
    figures.plot(experiment, "fig", other, "best", record=True)
    assert read_json(path)["versions"] == [{"numpy": "9"}]  # of nothing else any more
    longer = replace(other, epochs=4)
    finish(experiment, longer, made_up(0.7))
    capsys.readouterr()
    figures.plot(experiment, "fig", longer, "best", record=True)
    assert "4 runs that the record had of other settings are not of this figure" in capsys.readouterr().out
    assert len(read_json(path)["runs"]) == 1 and read_json(path)["missing"] == 3


def test_a_record_that_cannot_be_read_is_not_overwritten(records, tmp_path, capsys):
    experiment, s, runs = four_seeds(tmp_path)
    finish(experiment, s, made_up())
    figures.plot(experiment, "fig", s, "best", record=True)
    path = records / "mlp_mnist_synthetic_fig.json"
    whole = path.read_bytes()
    for content in (b"", whole[:-3], b"\xff\xfe{", whole + b"}", b"[" * 100_000, b"7", b"[3]", b'{"runs": 7}'):
        path.write_bytes(content)
        figures.plot(experiment, "fig", s, "best", record=False)  # the run is there
        assert capsys.readouterr().err.startswith(f"left out: {path}"), content
        with pytest.raises(FileFault, match=re.escape(str(path))):
            figures.plot(experiment, "fig", s, "best", record=True)
        assert path.read_bytes() == content


ROWS = {  # what a person may do to a row: (how, what is said)
    "word": (lambda row: row | {"weights": "no"}, "weights is 'no' instead of a number"),
    "nan": (lambda row: row | {"seconds": float("nan")}, "seconds is nan instead of a number"),
    "true": (lambda row: row | {"epochs": True}, "epochs is True instead of a number"),
    "absent": (lambda row: row | {"best_test_acc": None}, "best_test_acc is None instead of a number"),
    "diverged": (lambda row: row | {"diverged": "no"}, "diverged is 'no' instead of true or false"),
    "name": (lambda row: row | {"run": 3}, "a row names its data and its run"),
    "data": (lambda row: row | {"data": None}, "a row names its data and its run"),
    "list": (lambda row: [1, 2], "a result is an object, not list"),
    "null": (lambda row: None, "a row names its data and its run"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_bad_row_is_named_and_the_figure_is_drawn(records, tmp_path, capsys, kind):
    experiment, s, runs = four_seeds(tmp_path)
    for run in runs:
        finish(experiment, run, made_up())
    figures.plot(experiment, "fig", s, "best", record=True)
    path, (change, says) = records / "mlp_mnist_synthetic_fig.json", ROWS[kind]
    record = read_json(path)
    record["runs"][1] = change(record["runs"][1])
    path.write_text(json.dumps(record))
    capsys.readouterr()
    figures.plot(experiment, "fig", replace(s, out=str(tmp_path / "none")), "best", record=False)
    told = capsys.readouterr()
    named = 2 if kind in ("name", "list", "null") else runs[1].run_name()
    assert told.err == f"left out: {path}, run {named}: {says}\n"
    assert "3 of 4 runs are done, 3 of them recorded" in told.out


def test_bad_results_on_disk_are_named_and_the_figure_is_drawn(records, tmp_path, capsys):
    experiment, s, runs = four_seeds(tmp_path)
    finish(experiment, runs[0], made_up())
    finish(experiment, runs[1], made_up(weights=None))
    path = Run(experiment, runs[2]).folder / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"weights":')
    figures.plot(experiment, "fig", s, "best", record=False)
    told = capsys.readouterr()
    assert [line.split(": ")[0] for line in told.err.splitlines()] == ["left out", "left out"]
    assert "weights is None instead of a number" in told.err and f"{path}, line 1" in told.err
    assert "1 of 4 runs are done" in told.out


def test_what_a_figure_computes_is_kept_and_recorded(records, tmp_path, capsys):
    """Computed once for these runs; again if the figure shows others."""
    computed = []

    def compute(s):
        computed.append(s.epochs)
        return {"answer": 42}

    def draw(points, metric, numbers):
        return draw_nothing(points, metric)[0], [f"the answer is {numbers['answer']}"]

    experiment, s, _ = four_seeds(tmp_path)
    experiment.figures["fig"] = figures.Figure("test", lambda s: [s], draw, compute=compute)
    finish(experiment, s, made_up())
    for record, out in ((False, s.out), (True, s.out), (False, str(tmp_path / "none"))):  # computed, kept, recorded
        figures.plot(experiment, "fig", replace(s, out=out), "best", record)
        assert "the answer is 42" in capsys.readouterr().out
    assert computed == [3]
    assert read_json(records / "mlp_mnist_synthetic_fig.json")["computed"] == {"answer": 42}
    other = replace(s, epochs=4)
    finish(experiment, other, made_up())
    figures.plot(experiment, "fig", other, "best", record=False)
    assert computed == [3, 4]


def test_a_figure_of_diverged_runs_says_so(records, tmp_path):
    experiment, s, runs = four_seeds(tmp_path)
    for run in runs[:3]:
        finish(experiment, run, made_up(diverged=True))
    with pytest.raises(lab.UsageError, match="all 3 runs of fig that are done have diverged"):
        figures.plot(experiment, "fig", s, "best", record=False)


# ---------------------------------------------------------------------------------------------- the records of results/


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_record_is_drawn_by_its_command(path, tmp_path, capsys):
    record = read_json(path)
    _, script, *words = shlex.split(record["command"])
    assert lab.main(SCRIPTS[script], [*words, "--device", "cpu", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr()
    count = len(record["runs"])
    assert f"{count} of {count + record.get('missing', 0)} runs are done, {count} of them recorded in" in told.out
    assert not told.err
    picture, = tmp_path.rglob("*.png")
    assert f"{path.stem}_".startswith(f"{picture.stem}_")  # a record of other settings has an addition to its name
    assert picture.stat().st_size > 20_000
    means = {f"{100 * row['best_test_acc']:.2f} % (1)" for row in record["runs"] if record["figure"] == "fig5"}
    assert all(mean in told.out for mean in means)
    assert all(isinstance(row[name], (int, float)) for row in record["runs"] for name in NUMBERS)


@pytest.mark.parametrize("value", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_pictures_need_no_backend(tmp_path, value):
    """A notebook's shell names one that a program outside of it may not have."""
    script = ("import os; from lab import figures; figure, _ = figures.panels(); figure.savefig('x.png'); "
              f"assert os.environ['MPLBACKEND'] == {value!r}")
    env = os.environ | {"MPLBACKEND": value, "PYTHONPATH": str(RECORDS[0].parent.parent)}
    subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, check=True)
    assert (tmp_path / "x.png").stat().st_size


def test_a_figure_names_its_data(records, tmp_path, capsys):
    """On the screen, and each run's in the record."""
    s = mlp.Settings(data="synthetic", out=str(tmp_path), seeds=2)
    experiment = replace(mlp.EXPERIMENT, figures={"fig": lab.Figure("", lambda s: lab.over_seeds(s, [s], 2),
                                                                    draw_mlp.width)})
    about = [{"sha256": "a" * 64, "unpublished": "train.bin is not the original"}, {"sha256": "b" * 64}]
    for seed, data in enumerate(about):
        result = made_up()
        finish(experiment, replace(s, seed=seed), result | {"config": result["config"] | {"data": data}})
    for record, out in ((True, s.out), (False, str(tmp_path / "none"))):
        figures.plot(experiment, "fig", replace(s, out=out), "best", record=record)
        told = capsys.readouterr().out
        assert "the data: train.bin is not the original\n" in told
        assert f"not all results are of the same data: 1 of SHA-256 {'a' * 16}, 1 of SHA-256 {'b' * 16}\n" in told
    rows = read_json(records / "mlp_mnist_synthetic_fig.json")["runs"]
    assert [row["digest"] for row in rows] == ["a" * 16, "b" * 16] and "unpublished" not in rows[1]
