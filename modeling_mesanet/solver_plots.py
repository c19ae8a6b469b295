# SPDX-License-Identifier: Apache-2.0
"""Where the solver's steps went, and what they buy: figures of the statistics that the models return.

Needs matplotlib. Dimensions: B batch, T tokens, H heads.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import PreTrainedModel

from .files import replacing
from .mesa import SolverStats, check_solver

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)

# Columns of the picture over time: more would be thinner than a pixel.
_MOST_COLUMNS = 512


class CurvePoint(NamedTuple):
    """A model at one tolerance: mean `loss` in nats a token, mean `steps` a token and head, `tokens_per_second`."""

    tolerance: float
    loss: float
    steps: float
    tokens_per_second: float


def plot_solver_steps(stats: Sequence, path: str | os.PathLike | None = None) -> "Figure":
    """Draw the mean number of steps of each layer and head, and of each layer over time.

    Args:
        stats: `solver_stats` of a forward pass (one entry a layer), or of `generate()` (such a tuple for each forward
            pass; their tokens are put one after the other).
        path: file to write the figure to as well, in a folder that is made if need be; its ending chooses the format
            (PNG without one).

    Raises:
        ValueError: `stats` holds nothing, or something else.
        ImportError: matplotlib is not installed.
    """
    steps = _steps_by_layer(stats)
    figure = _figure(width=11, height=1.6 + 0.3 * len(steps))
    by_head, over_time = figure.subplots(1, 2, width_ratios=(1, 2))
    # One scale for both, so that a colour means the same.
    heads = torch.stack([layer.mean(dim=(0, 1)) for layer in steps])
    # `adaptive_avg_pool1d` averages neighbouring tokens where there are more than columns.
    times = torch.stack([layer.mean(dim=(0, 2)) for layer in steps])
    length = times.shape[1]
    if length > _MOST_COLUMNS:
        times = torch.nn.functional.adaptive_avg_pool1d(times.unsqueeze(0), _MOST_COLUMNS).squeeze(0)
    highest = max(heads.max().item(), times.max().item(), 1.0)
    scale = {"vmin": 0.0, "vmax": highest, "aspect": "auto", "interpolation": "nearest"}
    by_head.imshow(heads.numpy(), **scale)
    by_head.set(xlabel="head", ylabel="layer", title="steps a token")
    by_head.set_xticks(range(heads.shape[1]))
    picture = over_time.imshow(times.numpy(), extent=(0, length, len(steps) - 0.5, -0.5), **scale)
    over_time.set(xlabel="token", title="over time, mean of the heads")
    for axes in (by_head, over_time):
        axes.set_yticks(range(len(steps)))
    figure.colorbar(picture, ax=over_time, label="steps")
    return _saved(figure, path)


@torch.no_grad()
def solver_curve(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    tolerances: Sequence[float] = TOLERANCES,
) -> list[CurvePoint]:
    """Loss and speed of `model` at each tolerance, from one forward pass each (after one that is not timed).

    Args:
        model: a causal language model, which stays as it is.
        input_ids: tokens `[B, T]`, T at least 2.
        attention_mask: `[B, T]`, 0 for pads, which do not count.
        tolerances: as `cg_tolerance`, in (0, 1).

    Raises:
        ValueError: an argument is out of range.
    """
    if len(tolerances) == 0:
        raise ValueError("tolerances is empty; give at least one number between 0 and 1.")
    for tolerance in tolerances:
        check_solver(0, tolerance)
    if not torch.is_tensor(input_ids) or input_ids.ndim != 2 or input_ids.shape[1] < 2:
        found = f"of shape {tuple(input_ids.shape)}" if torch.is_tensor(input_ids) else type(input_ids).__name__
        raise ValueError(f"input_ids is {found}; give a tensor [batch, time], time at least 2.")
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    # The first token that counts of a row has nothing to be predicted from.
    labels = input_ids.masked_fill((real == 0) | (real.cumsum(dim=1) == 1), -100)
    if (labels == -100).all():
        raise ValueError(
            "attention_mask leaves no token to predict; give rows of at least two tokens that are no pads."
        )
    arguments = {"attention_mask": attention_mask, "labels": labels, "use_cache": False}

    def run(tolerance: float):
        output = model(input_ids, cg_tolerance=tolerance, output_solver_stats=True, **arguments)
        return output, output.loss.item()  # reading the loss waits for the device

    run(tolerances[0])
    points, counted = [], real.bool()
    for tolerance in tolerances:
        start = time.perf_counter()
        output, loss = run(tolerance)
        seconds = time.perf_counter() - start
        steps = torch.stack([layer.steps[counted].double().mean() for layer in output.solver_stats]).mean()
        points.append(CurvePoint(tolerance, loss, steps.item(), int(counted.sum()) / seconds))
    return points


def plot_solver_curve(points: Sequence[CurvePoint], path: str | os.PathLike | None = None) -> "Figure":
    """Draw the loss over the mean number of steps, and the tokens a second over the tolerance.

    Args:
        points: from `solver_curve`.
        path: as in `plot_solver_steps`.

    Raises:
        ValueError: there are no points.
        ImportError: matplotlib is not installed.
    """
    if not points:
        raise ValueError("points is empty; pass what solver_curve returns.")
    figure = _figure(width=9, height=3.6)
    quality, speed = figure.subplots(1, 2)
    quality.plot([point.steps for point in points], [point.loss for point in points], marker="o")
    for point in points:
        place = (point.steps, point.loss)
        quality.annotate(f"{point.tolerance:g}", place, textcoords="offset points", xytext=(5, 5))
    quality.set(xlabel="steps a token (labels: tolerance)", ylabel="loss, nats a token", title="quality")
    speed.semilogx([point.tolerance for point in points], [point.tokens_per_second for point in points], marker="o")
    speed.set(xlabel="tolerance", ylabel="tokens a second", title="speed", ylim=(0, None))
    return _saved(figure, path)


def _steps_by_layer(stats: Any) -> list[torch.Tensor]:
    """Steps `[B, T, H]` of each layer, on the CPU; forward passes one after the other."""
    if not stats:
        raise ValueError("stats holds nothing; pass the solver_stats of a call with output_solver_stats=True.")
    passes = [stats] if isinstance(stats[0], SolverStats) else list(stats)
    if not all(
        isinstance(layers, tuple | list) and layers and all(isinstance(layer, SolverStats) for layer in layers)
        for layers in passes
    ):
        raise ValueError(
            f"stats is a {type(stats).__name__} of {type(stats[0]).__name__}; pass solver_stats of a model's output."
        )
    # Beams multiply the rows after the prompt, so rows are averaged first.
    return [
        torch.cat([layer.steps.float().mean(dim=0, keepdim=True).cpu() for layer in layers], dim=1)
        for layers in zip(*passes, strict=True)
    ]


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib draws the figures and is not installed; pip install matplotlib.") from error
    return Figure(figsize=(width, height), layout="constrained")


def _saved(figure: "Figure", path: str | os.PathLike | None) -> "Figure":
    if path is not None:
        path = Path(path)
        if path.is_dir():
            raise ValueError(f"path is '{path}', a folder; give the name of a file.")
        with replacing(path) as unfinished:
            figure.savefig(unfinished, format=path.suffix.removeprefix(".") or "png")
    return figure


__all__ = ["CurvePoint", "plot_solver_curve", "plot_solver_steps", "solver_curve"]
