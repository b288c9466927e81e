"""A report as pictures and as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from nets import Net, rows
from torch import nn

import mfx

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def resnet() -> mfx.Report:
    return mfx.report(torchvision.models.resnet18(weights=None), torch.randn(2, 3, 64, 64))


def texts(figure: Any) -> list[str]:
    return [found.get_text() for found in figure.findobj(matplotlib.text.Text) if found.get_text()]


def test_the_blocks_have_a_line_each_with_bytes_or_the_reason(resnet: mfx.Report) -> None:
    figure = resnet.draw()
    found = texts(figure)
    for row in resnet.blocks:
        assert row.name in found
    assert sum("the skip path transforms x" in text for text in found) == 3
    bars = [bar.get_width() * 2**20 for bar in figure.axes[1].patches]
    assert bars == pytest.approx([row.activation_bytes or 0 for row in resnet.blocks])
    assert any(text.startswith("chain 0: 2 blocks, gamma 0.9, ") for text in found)
    assert any(text.startswith("chain 1: 1 block, ") for text in found)
    (title,) = [text for text in found if text.startswith("ResNet: 5 of 8")]
    assert "before" in title


def test_without_inputs_lines_are_as_long_as_parameters_are_many() -> None:
    report = mfx.report(Net(4))
    bars = [bar.get_width() * 1e6 for bar in report.draw().axes[1].patches]
    assert bars == pytest.approx([row.parameters for row in report.blocks])


def test_the_middle_of_a_long_chain_is_one_line_for_all() -> None:
    report = mfx.report(Net(30), rows())
    found = texts(report.draw())
    assert "... 25 more" in found
    assert len(report.draw().axes[1].patches) == 6
    assert any(text.endswith("each") for text in found)


def test_skips_that_go_around_others_are_drawn() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.net.stem(x)
            return x + self.net.blocks(x)

    report = mfx.report(Nested(), rows())
    assert report.draw().axes[0].patches


def test_the_step_goes_up_to_the_peaks_of_the_table(resnet: mfx.Report) -> None:
    assert resnet.step is not None
    peaks = {name: max(course.bytes) for name, course in resnet.courses.items()}
    assert peaks == {"plain backprop": resnet.step.activations_plain, "momentum": resnet.step.activations}
    for course in resnet.courses.values():
        assert 0 < course.forward < len(course.bytes)
    found = texts(resnet.draw_step())
    assert any(text.startswith("plain backprop: ") for text in found)
    assert any(text.startswith("momentum: ") for text in found)


def test_a_step_without_inputs_is_refused() -> None:
    with pytest.raises(mfx.OptionError, match="needs example_inputs"):
        mfx.report(Net()).draw_step()


def test_a_notebook_gets_a_table_with_what_str_says(resnet: mfx.Report) -> None:
    found = resnet._repr_html_()
    assert found.count("<tr") == 1 + len(resnet.blocks)
    assert "5 of 8 residual adds become momentum steps" in found
    assert "layer1.0" in found


def test_names_are_text_in_the_page(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential()
            self.blocks.add_module("<b>", Net().blocks[0])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(x)

    report = mfx.report(Odd(), torch.randn(2, 6, dtype=torch.float64))
    report.save(tmp_path / "odd.html")
    page = (tmp_path / "odd.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert page.count("<svg") == 2


def test_a_file_is_what_its_name_says(resnet: mfx.Report, tmp_path: Path) -> None:
    for name, beginning in (("a.svg", b"<?xml"), ("a.png", b"\x89PNG"), ("a.html", b"<!doctype html>")):
        resnet.save(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(beginning)
    resnet.save(str(tmp_path / "a.json"))
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(json.dumps(resnet.to_dict()))
    with pytest.raises(mfx.OptionError, match=r"\.html, \.svg, \.png or \.json"):
        resnet.save(tmp_path / "a.txt")


def test_matplotlib_is_asked_for_where_it_is_not_there(resnet: mfx.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(mfx.OptionError, match="pip install"):
        resnet.draw()
