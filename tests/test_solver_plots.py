# SPDX-License-Identifier: Apache-2.0
"""The figures of the solver: what they draw, the curve's numbers, and their refusals."""

import builtins

import pytest
import torch

from modeling_mesanet.mesa import SolverStats
from modeling_mesanet.solver_plots import CurvePoint, plot_solver_curve, plot_solver_steps, solver_curve


def random_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def pictures(figure) -> list[torch.Tensor]:
    return [torch.as_tensor(axes.images[0].get_array().data) for axes in figure.axes if axes.images]


def test_steps_of_a_forward_pass_and_of_generate(tiny_model, tmp_path):
    model = tiny_model(cg_tolerance=1e-3)
    with torch.no_grad():
        stats = model(random_ids(3, 7), output_solver_stats=True).solver_stats
    heads, times = pictures(plot_solver_steps(stats, tmp_path / "steps.png"))
    steps = torch.stack([layer.steps.float() for layer in stats])  # [layers, B, T, H]
    torch.testing.assert_close(heads, steps.mean(dim=(1, 2)))
    torch.testing.assert_close(times, steps.mean(dim=(1, 3)))
    assert [path.name for path in tmp_path.iterdir()] == ["steps.png"]
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    output = model.generate(
        random_ids(2, 5), max_new_tokens=4, num_beams=2, output_solver_stats=True, return_dict_in_generate=True
    )
    heads, times = pictures(plot_solver_steps(output.solver_stats))
    assert heads.shape == (2, 2)
    assert times.shape == (2, 8)


def test_long_texts_are_averaged_to_columns():
    steps = torch.arange(1024).view(1, 1024, 1).int()
    _, times = pictures(plot_solver_steps([SolverStats(steps, torch.zeros(1, 1024, 1))]))
    torch.testing.assert_close(times, torch.arange(0.5, 1024, 2).unsqueeze(0))


def test_the_curve_is_what_the_model_gives(tiny_model, tmp_path):
    model, ids = tiny_model(), random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    points = solver_curve(model, ids, mask, tolerances=(0.5, 1e-5))
    assert [point.tolerance for point in points] == [0.5, 1e-5]
    assert points[0].steps < points[1].steps
    assert all(point.tokens_per_second > 0 for point in points)
    with torch.no_grad():
        # By hand: the rows by themselves, the first token of each predicted from nothing.
        losses = []
        for row, real in zip(ids, mask.bool(), strict=True):
            own = row[real].unsqueeze(0)
            logits = model(own, cg_tolerance=1e-5).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, own[0, 1:], reduction="none"))
    assert points[1].loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    quality, speed = plot_solver_curve(points, tmp_path / "curve.svg").axes
    assert quality.lines[0].get_xydata().tolist() == [[point.steps, point.loss] for point in points]
    assert speed.lines[0].get_xydata().tolist() == [[point.tolerance, point.tokens_per_second] for point in points]
    assert (tmp_path / "curve.svg").is_file()


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "curve.png"
    path.write_text("old")
    with pytest.raises(ValueError, match="foo"):
        plot_solver_curve([CurvePoint(0.1, 1.0, 2.0, 3.0)], tmp_path / "curve.foo")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["curve.png"]


def test_where_a_figure_goes(tmp_path):
    points = [CurvePoint(0.1, 1.0, 2.0, 3.0)]
    plot_solver_curve(points, tmp_path / "new" / "curve")
    assert (tmp_path / "new" / "curve").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"path is '.*', a folder; give the name of a file"):
        plot_solver_curve(points, tmp_path)


def test_refusals(tiny_model, monkeypatch):
    for stats in ((), None):
        with pytest.raises(ValueError, match="stats holds nothing; pass the solver_stats"):
            plot_solver_steps(stats)
    with pytest.raises(ValueError, match="stats is a list of Tensor; pass solver_stats"):
        plot_solver_steps([torch.ones(2, 3)])
    with pytest.raises(ValueError, match="points is empty"):
        plot_solver_curve([])
    with pytest.raises(ValueError, match="tolerance is 3; it must lie"):
        solver_curve(tiny_model(), random_ids(1, 5), tolerances=(3,))
    with pytest.raises(ValueError, match="tolerances is empty"):
        solver_curve(tiny_model(), random_ids(1, 5), tolerances=())
    with pytest.raises(ValueError, match=r"input_ids is of shape \(1, 1\); give a tensor"):
        solver_curve(tiny_model(), random_ids(1, 1))
    with pytest.raises(ValueError, match="input_ids is list; give a tensor"):
        solver_curve(tiny_model(), [[1, 2]])
    with pytest.raises(ValueError, match="attention_mask leaves no token to predict"):
        solver_curve(tiny_model(), random_ids(2, 3), torch.tensor([[0, 0, 1], [0, 0, 0]]))
    real_import = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match="matplotlib draws the figures and is not installed; pip install matplotlib"):
        plot_solver_curve([CurvePoint(0.1, 1.0, 2.0, 3.0)])
