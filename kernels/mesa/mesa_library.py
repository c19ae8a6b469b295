# SPDX-License-Identifier: Apache-2.0
"""Where torch keeps this code's operators.

Code that came with a checkpoint runs under a module name of its own, so that several copies of it, and the package,
may live in one process. An operator whose name is registered again is pulled from under those that hold it, which
crashes the process. So each copy has a namespace.
"""

import re

import torch

NAMESPACE = re.sub(r"\W", "_", re.sub(r"(\.mesa)?\.mesa_library$", "", __name__))

# `OPERATORS.name` is the operator registered as `f"{NAMESPACE}::name"`.
OPERATORS = getattr(torch.ops, NAMESPACE)
