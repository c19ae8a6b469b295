# SPDX-License-Identifier: Apache-2.0
"""What the README promises: its examples run, its figures come from results files, its tree is the real one."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)

# One process runs all examples, each in a namespace of its own: most of the time goes into importing torch.
RUNNER = """
import json, sys
for source in json.load(open(sys.argv[1])):
    print("<example>", flush=True)
    exec(compile(source, "<README example>", "exec"), {"__name__": "__main__"})
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples.json").write_text(json.dumps(EXAMPLES))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", RUNNER, "examples.json"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.split("<example>\n")[1:]


def test_every_example_ran(outputs):
    assert len(outputs) == len(EXAMPLES) == 4


def test_generation_examples_write_english(outputs):
    for output, opening in zip(outputs[:2], ("The old captain", "Mr. Holmes looked up"), strict=True):
        assert opening in output
        words = re.findall(r"[A-Za-z]+", output)
        assert len(words) > 15
        assert {word.lower() for word in words} & {"the", "a", "and", "of", "to", "he", "she", "his", "her", "in"}


def test_continuations_of_one_state_differ(outputs):
    sea, inn = outputs[2].rstrip("\n").split("\n", 1)
    assert sea != inn


def test_training_example_learns(outputs):
    # A uniform guess over 256 bytes costs 5.5 nats.
    assert float(outputs[3].strip().splitlines()[-1]) < 4


def test_figures_are_those_of_the_results_files():
    script = ROOT / "kernels" / "benchmarks" / "readme_tables.py"
    spec = importlib.util.spec_from_file_location("readme_tables", script)
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for name in tables.TABLES:
        # What only a GPU can measure may not have been measured yet.
        if name != "gpu_operators" or tables.results_of(name):
            assert f"<!-- results: {name} -->\n| " in README
    for document, (folder, quoted) in tables.DOCUMENTS.items():
        text = document.read_text(encoding="utf-8")
        assert tables.render(text, folder, quoted) == text, document


def test_tree_names_every_module():
    block = re.search(r"## Where things are\n\n```\n(.*?)```", README, re.DOTALL)[1]
    for folder in ("modeling_mesanet", "kernels/mesa", "conversion", "eval"):
        for module in (ROOT / folder).glob("*.py"):
            assert module.name == "__init__.py" or module.name in block, f"{folder}/{module.name} is not in the tree"
    named = re.findall(r"[\w./]+\.(?:py|md)", block)
    assert named
    for name in named:
        assert list(ROOT.rglob(name)), f"the tree names {name}, which does not exist"
