"""What can be chosen for an experiment, and what an experiment is.

    @dataclass(frozen=True)
    class Settings(lab.Settings):
        width: int = setting(80, "hidden units", least=1)      # becomes --width, and width=80 in the run's name
"""

import math
import typing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import nn


class UsageError(Exception):
    """Something the user asked for that cannot be done; the message is one sentence."""


def setting(default, help, choices=None, least=None, place=False):
    """A field of Settings. least: the smallest value allowed. place: it says where or how, not what, is trained,
    so it takes no part in a run's name.
    """
    return field(default=default, metadata=dict(help=help, choices=choices, least=least, place=place))


def flag(name):
    """The command line word of a setting: base_width -> --base-width"""
    return f"--{name.replace('_', '-')}"


def numbers(name, text):
    """"8,12" -> (8, 12); name: of the setting that holds the text."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise UsageError(f"{flag(name)} is a list of widths such as 8,12,18, not {text!r}")
    return tuple(sorted({int(word) for word in words}))


@dataclass(frozen=True)
class Settings:
    """What every experiment lets one choose; each adds its own. All that changes a result is in the run's name."""

    data: str = setting("mnist", "data set")
    epochs: int = setting(300, "passes over the training set", least=1)
    seed: int = setting(0, "seed of masks, initial weights and order of the examples", least=0)
    limit: int = setting(0, "train on the first examples alone, so many (0: all)", least=0)
    held_out: int = setting(0, "test on the last training examples, so many, in place of the test set", least=0)
    batch: int = setting(100, "examples a step", least=1)
    lr: float = setting(0.1, "learning rate", least=0)
    data_dir: str = setting("data", "where data sets are found or downloaded to", place=True)
    out: str = setting("runs", "where runs are written", place=True)
    device: str = setting("auto", "where to compute: auto takes a GPU if one is usable", choices=("auto", "cpu", "gpu"),
                          place=True)
    graph: bool = setting(True, "on a GPU, capture training steps as CUDA graphs; without, slower, the same bits",
                          place=True)
    jobs: int = setting(1, "train a sweep in this many processes", least=1, place=True)
    save_every: float = setting(30.0, "seconds between checkpoints", least=0, place=True)
    seeds: int = setting(0, "train a sweep with this many seeds (0: as many as its figure shows)", least=0, place=True)

    ENGINE = ()  # settings that nn.use_device takes for a GPU
    ALWAYS_NAMED = ("seed",)  # other settings are in a run's name when they differ from their default

    def check(self):
        """Raise UsageError for a value out of range; experiments extend it."""
        for f in fields(self):
            value, least, choices = getattr(self, f.name), f.metadata["least"], f.metadata["choices"]
            if least is not None and value is not None and not (value >= least and math.isfinite(value)):
                raise UsageError(f"{flag(f.name)} must be a number of at least {least}, not {value}")
            if f.name in ("data_dir", "out") and not value:
                raise UsageError(f"{flag(f.name)} is the path of a folder, and this one is empty")
            if choices and value not in choices:
                raise UsageError(f"{flag(f.name)} is one of {', '.join(choices)}, not {value}")

    def on_device(self, number=0, processes=1, training=True):
        """Compute where these settings say, on the GPU of this number if on one; returns the settings as runs there are
        named: `auto` precision of a GPU is tf32. processes: that train a network together. UsageError if it cannot be.
        """
        s = replace(self, precision="tf32") if getattr(self, "precision", None) == "auto" else self
        options = {name: getattr(s, name) for name in self.ENGINE}
        try:
            if nn.use_device(self.device, number, **options, capture=self.graph and processes == 1) == "gpu":
                return s
        except RuntimeError as error:
            raise UsageError(str(error)) from None
        for f in fields(self):
            if training and f.name in self.ENGINE and getattr(self, f.name) != f.default:
                raise UsageError(f"{flag(f.name)} is for GPUs, and this would be trained on the CPU")
        return self

    @property
    def cost(self):
        """What orders runs by how long they take: a sweep begins with costly ones; then its processes end together."""
        return self.epochs

    def identity(self):
        """The settings that decide what is trained, as a dict."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata["place"]}

    def differences(self, saved):
        """["lr 0.1 instead of 0.2", ...]: where the identity in a file is another one."""
        saved = {name: saved.get(name, f.default) for name, f in self.__dataclass_fields__.items()}
        return [f"{name} {saved[name]} instead of {value}" for name, value in self.identity().items()
                if saved[name] != value and (name, saved[name], value) != ("precision", "tf32", "auto")]  # once a CPU's

    def run_name(self):
        """A name for the run that no other settings share: "width=80,seed=0,epochs=100"."""
        shown = {n: getattr(self, n) for n in self.ALWAYS_NAMED}
        shown |= {f.name: getattr(self, f.name) for f in fields(self)
                  if not f.metadata["place"] and getattr(self, f.name) != f.default and f.name != "data"}
        return ",".join(f"{name}={value}" for name, value in shown.items())

    def flags(self, always=(), places=()):
        """The command line words of what differs from its default, of `always`, and of these places if they differ."""
        words = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in always or value != f.default and (not f.metadata["place"] or f.name in places):
                words += ([flag(f.name) if value else flag(f"no_{f.name}")] if isinstance(value, bool)
                          else [flag(f.name), f"{value}"])
        return words

    def command(self, script):
        """The command that trains exactly this."""
        return " ".join(["python", script, *self.flags(always=self.ALWAYS_NAMED)])


@dataclass(frozen=True)
class Experiment:
    """What main() needs to know of a script.

    script: its path. load(settings) gives its Dataset, train(run) trains one network, see exp_mlp_mnist.py. figures:
    {name: Figure}. quick: the settings that --quick changes; quick_figure: what it sweeps and draws if no width is
    given. figures_choose: {setting: the flags that figures take in its place}. actions: {flag: (help, what the number
    that follows it is called or None, what it does with the settings and this number)} of what can be done besides
    training.
    """

    name: str
    script: str
    description: str
    settings: type
    load: typing.Callable
    train: typing.Callable
    figures: dict
    quick: dict
    quick_help: str
    quick_figure: str
    figures_choose: dict = field(default_factory=dict)
    actions: dict = field(default_factory=dict)

    @property
    def command(self):
        """How the script is called: exp_mlp_mnist.py"""
        return Path(self.script).name
