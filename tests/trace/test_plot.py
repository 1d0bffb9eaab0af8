"""The curves of a trace: what is drawn, the formats, and what is said where it cannot be drawn."""

import importlib.util
from pathlib import Path
from statistics import mean

import pytest
from PIL import Image

from entrgi.trace import plot
from support import traces

TRACE = traces.trace(["a", "b", "c", "d"], copies=2)


def drawn_curve(axes, label):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return dict(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_curves_are_means_over_all_trajectories():
    reward, entropy, weight = plot.figure(TRACE).axes
    guided = TRACE.runs[1]
    for axes, value in (
        (reward, lambda part: part.reward),
        (entropy, lambda part: mean(part.entropy)),
        (weight, lambda part: mean(part.weight)),
    ):
        expected = {step.step + 1: mean(map(value, step.trajectories)) for step in guided.steps}
        assert drawn_curve(axes, "entrgi") == pytest.approx(expected)
    assert drawn_curve(entropy, "unguided") == pytest.approx(drawn_curve(entropy, "entrgi"))
    assert [line.get_label() for line in weight.lines if not line.get_label().startswith("_")] == ["entrgi"]


def test_final_rewards_are_dots_beside_the_curves():
    reward = plot.figure(TRACE).axes[0]
    assert len(reward.collections) == 2
    for dots in reward.collections:
        x, y = dots.get_offsets().T
        assert min(x) > 4
        assert sorted(y) == [-0.5, -0.5, 0.5, 0.5]


def test_interrupted_runs_have_curves_and_no_dots():
    reward, *_ = plot.figure(traces.trace(["a", "b", "c"], steps=2, complete=False)).axes
    assert list(drawn_curve(reward, "entrgi")) == [1, 2]
    assert not reward.collections


def test_unguided_alone_has_entropies_only():
    trace = traces.trace(["a", "b"])
    del trace.runs[1]
    assert [axes.get_title(loc="left") for axes in plot.figure(trace).axes] == ["Entropy"]


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="expected at least one finished step"):
        plot.figure(traces.trace(["a"], steps=0, complete=False))


@pytest.mark.parametrize("ending", [".PNG", ".pdf", ".svg"])
def test_same_trace_same_file(tmp_path, ending):
    for name in ("a", "b"):
        plot.write(tmp_path / f"{name}{ending}", TRACE)
    assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "b"]


def test_image_shows_both_runs(tmp_path):
    plot.write(tmp_path / "out.png", TRACE)
    with Image.open(tmp_path / "out.png") as image:
        counts = {colour: count for count, colour in image.convert("RGB").getcolors(maxcolors=2**24)}
        assert image.size[0] > 1500
    for colour in plot.COLOURS[:2]:
        assert counts[tuple(bytes.fromhex(colour[1:]))] > 50


def test_other_endings_and_missing_matplotlib(monkeypatch):
    with pytest.raises(ValueError, match=r"plot: expected a file name ending in \.png, \.pdf, \.svg, got 'out\.jpg'"):
        plot.check(Path("out.jpg"))
    monkeypatch.setattr(
        plot, "find_spec", lambda name: None if name == "matplotlib" else importlib.util.find_spec(name)
    )
    with pytest.raises(ImportError, match=r"pip install 'entrgi\[plot\]'"):
        plot.check(Path("out.png"))
