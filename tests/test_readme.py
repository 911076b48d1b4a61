"""What README.md and docs/ say can be done, can be done: their examples, commands, links and figures."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import exp_bottleneck
import exp_mlp_mnist
import exp_resnet_cifar
import exp_resnet_imagenet
import kernels
import nn
from lab import command

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {f"{script.__name__}.py": script.EXPERIMENT
           for script in (exp_mlp_mnist, exp_resnet_cifar, exp_resnet_imagenet, exp_bottleneck)}
EXAMPLES = re.findall("```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
COMMANDS = sorted({found for page in PAGES for found in
                   re.findall(r"python (exp_\w+\.py(?: [^`<#\n\"&]*)?)", page.read_text())})
CLAIMS = [line for line in (ROOT / "docs/results.md").read_text().splitlines() if line.startswith("| (")]
DRAWN = [line for line in COMMANDS if "--plot" in line and "imagenet-256" not in line]


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples(example, tmp_path):
    """Each as a program of its own"""
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and len(done.stdout.split()) > 1


def test_there_are_examples_and_commands():
    assert len(EXAMPLES) == 2 and len(COMMANDS) > 20 and len(DRAWN) > 5


@pytest.mark.parametrize("module", [nn, kernels], ids=lambda module: module.__name__)
def test_the_scripts_use_public_names(module):
    used = {name for script in ROOT.glob("exp_*.py")
            for name in re.findall(rf"\b{module.__name__}\.(\w+)", script.read_text())} - {"py"}
    assert used and used <= set(module.__all__) <= set(vars(module))


@pytest.mark.parametrize("line", COMMANDS)
def test_commands(line):
    """The scripts understand them."""
    script, *words = shlex.split(line)
    settings, _ = command.parse(SCRIPTS[script], words)
    assert settings.data


@pytest.mark.proof
@pytest.mark.parametrize("line", DRAWN)
def test_figures_are_drawn_from_the_records(line, tmp_path):
    script, *words = shlex.split(line)
    assert command.main(SCRIPTS[script], [*words, "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert list(tmp_path.rglob("*.png"))


@pytest.mark.proof
@pytest.mark.parametrize("row", CLAIMS, ids=lambda row: row[:30])
def test_numbers_of_a_claim_are_printed_by_its_command(row, tmp_path, capsys):
    claim, *found, scale = row.strip("| ").split(" | ")
    script, *words = shlex.split(re.search("`python (.*)`", scale)[1])
    assert command.main(SCRIPTS[script], [*words, "--out", str(tmp_path), "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    numbers = re.findall(r"[-+]?[\d.,]+ ± [\d.]+|[\d.]+ %", " ".join(found))
    assert numbers and not [number for number in numbers if number not in told]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [link for link in links if not link.startswith("https://") and not (page.parent / link).exists()]
    assert not missing
