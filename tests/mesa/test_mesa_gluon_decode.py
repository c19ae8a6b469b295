# SPDX-License-Identifier: Apache-2.0
"""The Gluon kernel of a token compiles ahead, and is taken for the heads it is written for.

What it computes is tested by test_mesa_triton_decode.py on a GPU, where it runs in place of the plain kernel.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed; nothing can be compiled")

from modeling_mesanet.mesa.mesa_triton_decode import GLUON_SIZES, gluon_kernel

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"

# A process of its own: compiling must not meet an interpreter that another test switched on.
COMPILE = """
import json
import torch
from shared_memory import compiled_bytes, record

found = {}
for capability in (80, 90):
    (launch,) = (each for each in record(capability, 64, torch.bfloat16) if each.name == "decode_gluon")
    found[capability] = compiled_bytes(launch, capability)
print(json.dumps(found))
"""


def test_compiles_ahead(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=os.environ
        | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    # G, and room for vectors to pass.
    assert all(4 * 64 * 64 < size <= 4 * 64 * 64 + 1024 for size in json.loads(run.stdout).values())


def test_nothing_for_a_cpu_and_other_sizes():
    assert gluon_kernel(torch.device("cpu"), *GLUON_SIZES) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_takes_its_sizes_alone():
    device = torch.device("cuda", 0)
    assert gluon_kernel(device, 128, 128) is not None
    assert gluon_kernel(device, 64, 128) is not None
    assert gluon_kernel(device, 128, 96) is None
    assert gluon_kernel(device, 32, 32) is None
