"""M1, M4: every form of call, and every mode and setting changed after the capture, acts as in the original."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, run
from nets import Block, ConvNet, Net, images, rows
from small_models import randomized
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.segmentation.fcn import FCN
from torchvision.ops import StochasticDepth

import mfx


class Options(Net):
    """Takes a bit of everything."""

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, *, flip: bool = False) -> Tensor:
        if mask is not None:
            x = x * mask
        if flip:
            x = x.flip(0)
        return super().forward(x) * scale


def test_keyword_and_default_arguments_take_their_values() -> None:
    model = Options(p=0.0)
    mm = mfx.momentumize(model, 0.0)
    x, mask = rows(), torch.rand(5, 4, dtype=torch.float64, requires_grad=True)
    assert_same(run(mm, x), run(model, x))
    assert_same(run(mm, x, mask), run(model, x, mask))
    assert_same(run(mm, x, mask=mask, flip=True), run(model, x, mask=mask, flip=True))
    assert_same(run(mm, x=x, scale=3.0), run(model, x=x, scale=3.0))
    assert_same(run(mm, x, None, 0.5), run(model, x, None, 0.5))


def test_a_model_called_in_ever_new_ways_stays_right() -> None:
    model = Options(p=0.0)
    mm, x = mfx.momentumize(model, 0.0), rows()
    for scale in range(40):
        assert torch.allclose(mm(x, scale=scale), model(x, scale=scale))


def test_a_call_with_wrong_arguments_fails_as_in_the_original() -> None:
    mm = mfx.momentumize(Options())
    with pytest.raises(Exception, match="unexpected keyword argument 'flap'"):
        mm(rows(), flap=True)
    with pytest.raises(Exception, match=r"missing .*argument: 'x'"):
        mm()


class Pair(NamedTuple):
    sum: Tensor
    parts: dict[str, Any]


class Nested(Net):
    """Nested in, nested out."""

    def forward(self, batch: dict[str, Any]) -> Pair:
        first, (second, missing) = batch["first"], batch["rest"]
        assert missing is None
        y, z = super().forward(first), super().forward(second)
        return Pair(y + z, OrderedDict(one=y, others=[z, None, 3, "text"]))


def test_nested_inputs_and_outputs_keep_their_form() -> None:
    model = Nested()
    batch = {"first": rows(), "rest": (rows(), None)}
    mm = mfx.momentumize(model, 0.0, example_inputs=(batch,))
    assert_same(run(mm, batch), run(model, batch))
    out = mm(batch)
    assert isinstance(out, Pair)
    assert type(out.parts) is OrderedDict
    assert out.parts["others"][1:] == [None, 3, "text"]


def test_a_segmentation_model_gives_its_ordered_dict_with_the_auxiliary_head_on_a_tap() -> None:
    resnet = ResNet(Bottleneck, [1, 2, 3, 2], width_per_group=8, replace_stride_with_dilation=[False, True, True])
    backbone = IntermediateLayerGetter(resnet, {"layer4": "out", "layer3": "aux"})
    model = randomized(FCN(backbone, nn.Conv2d(2048, 3, 1), nn.Conv2d(1024, 3, 1)))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    mm = mfx.momentumize(model, 0.0)
    assert type(mm(x)) is OrderedDict
    assert_same(run(mm, x), run(model, x))
    stored = mfx.momentumize(model, 0.9, reversible=False)
    assert_same(run(mfx.momentumize(model, 0.9), x), run(stored, x))


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: {"x": x}])
def test_example_inputs_are_a_tensor_a_tuple_or_a_dict(form: Any) -> None:
    model, x = Net(), rows()
    assert_same(run(mfx.momentumize(model, 0.0, example_inputs=form(x)), x), run(model, x))


class VariableArguments(Net):
    def forward(self, *xs: Tensor) -> Tensor:
        return sum(super(VariableArguments, self).forward(x) for x in xs)


def test_a_forward_with_variable_arguments_needs_example_inputs() -> None:
    model = VariableArguments()
    with pytest.raises(mfx.CaptureError, match="pass example_inputs="):
        mfx.momentumize(model)
    mm = mfx.momentumize(model, 0.0, example_inputs=(rows(), rows()))
    x, y, z = rows(), rows(), rows()
    assert_same(run(mm, x, y), run(model, x, y))
    assert_same(run(mm, x, y, z), run(model, x, y, z))


def test_a_part_in_eval_mode_stays_so_while_the_rest_trains() -> None:
    model = ConvNet()
    mm = mfx.momentumize(model, 0.0)
    x = images()
    before = run(mm, x)
    mm.blocks[1].eval()
    assert_same(run(mm, x), run(model, x))
    mm.blocks[1].train()
    mm.blocks[0].bn.eval()
    assert_same(run(mm, x), run(model, x))
    mm.train()
    assert_same(run(mm, x), before)


def test_a_part_replaced_inside_a_module_taken_whole_is_used() -> None:
    model = Net(p=0.0)
    mm = mfx.momentumize(model, 0.0, modules="blocks.?")
    x = rows()
    mm(x)
    model.blocks[1].down = nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.3), nn.Linear(12, 6)).double()
    assert_same(run(mm, x), run(model, x))


def test_a_changed_attribute_of_a_block_is_seen() -> None:
    model = ConvNet(p=0.0)
    mm = mfx.momentumize(model, 0.0)
    x = images()
    for p in (0.5, 0.1, 0.0):
        mm.blocks[1].drop_prob = p
        assert_same(run(mm, x), run(model, x))


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.5), (0.5, 0.0), (0.2, 0.7)])
def test_a_changed_probability_of_a_dropout_module_is_seen(before: float, after: float) -> None:
    model = Net(p=before)
    mm = mfx.momentumize(model, 0.0)
    x = rows()
    mm(x)
    for block in model.blocks:
        block.dropout.p = after
    assert_same(run(mm, x), run(model, x))


class SkipDropout(Block):
    """A block with a dropout on the skip, which does nothing as long as p is 0."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 0.0)
        self.after = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x) + self.after(self.down(self.up(x)))


def test_a_dropout_on_the_skip_that_is_turned_on_later_is_an_error() -> None:
    mm = mfx.momentumize(Net(block=SkipDropout), 0.9)
    mm(rows())
    mm.blocks[1].after.p = 0.5
    with pytest.raises(mfx.PlanChangedError, match=r"block 'blocks\.1' is kept as it is; at first it was in"):
        mm(rows())


def test_a_dropout_on_the_skip_that_is_turned_off_later_leaves_the_function_as_it_was_planned() -> None:
    """The first and the last block are chains of their own, whatever comes between them now."""
    model = Net(block=SkipDropout)
    model.blocks[1].after.p = 0.5
    mm = mfx.momentumize(model, 0.9)
    mm.blocks[1].after.p = 0.0
    x = rows()
    y = model.stem(x)
    for index, block in enumerate(model.blocks):
        y = block(y) if index == 1 else y + 0.1 * (block(y) - y)
    torch.testing.assert_close(mm(x), model.head(y))


class FunctionalBatchNorm(nn.BatchNorm2d):
    """BatchNorm and activation in one, written functionally, as in timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        training = self.training or (self.running_mean is None and self.running_var is None)
        moved = not self.training or self.track_running_stats
        x = F.batch_norm(
            x,
            self.running_mean if moved else None,
            self.running_var if moved else None,
            self.weight,
            self.bias,
            training,
            factor,
            self.eps,
        )
        return F.silu(x, inplace=True)


class ModeBlock(nn.Module):
    """Everything whose mode symbolic tracing bakes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn = FunctionalBatchNorm(width)
        self.conv = nn.Conv2d(width, width, 1)
        self.depth = StochasticDepth(0.5, "row")

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.conv(self.bn(x)), 0.3, training=self.training)
        if self.training:
            y = y * 2
        return x + self.depth(y)


@pytest.mark.parametrize("captured_in_training", [True, False])
@pytest.mark.parametrize("whole", [None, "blocks.?"])
@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_modes_baked_at_capture_do_not_leak(captured_in_training: bool, gamma: float, whole: Any) -> None:
    model = ConvNet(block=ModeBlock).train(captured_in_training)
    mm, stored = (mfx.momentumize(model, gamma, modules=whole, reversible=flag) for flag in (True, False))
    x = images()
    for training in (not captured_in_training, captured_in_training):
        for each in (model, mm, stored):
            each.train(training)
        assert_same(run(mm, x), run(stored if gamma else model, x))


def test_the_mode_does_not_change_which_blocks_form_a_chain() -> None:
    """In training mode something stands between the blocks, so each has a velocity of its own; in evaluation too."""

    class Auxiliary(Net):
        def forward(self, x: Tensor) -> Any:
            x = self.blocks[0](self.stem(x))
            if self.training:
                x = x.flip(0)
            return self.head(self.blocks[1](x))

    model = Auxiliary(p=0.0)
    mm, x = mfx.momentumize(model, 0.9), rows()
    for training in (True, False):
        y = model.stem(x)
        y = y + 0.1 * (model.blocks[0](y) - y)
        y = y.flip(0) if training else y
        y = y + 0.1 * (model.blocks[1](y) - y)
        torch.testing.assert_close(mm.train(training)(x), model.head(y))


def test_a_mode_in_which_a_captured_part_has_other_chains_is_an_error() -> None:
    class Auxiliary(Net):
        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x) if self.training else block(x).flip(0)
            return self.head(x)

    mm = mfx.momentumize(Auxiliary(), 0.9)
    with pytest.raises(mfx.PlanChangedError, match=r"block 'blocks\.0'.*exclude"):
        mm.eval()(rows())


def test_a_graph_captured_without_gradients_does_not_serve_calls_with_them() -> None:
    class Cautious(Net):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y * 2 if torch.is_grad_enabled() else y

    model = Cautious(p=0.0)
    mm = mfx.momentumize(model, 0.0)
    x = rows()
    with torch.no_grad():
        assert torch.equal(mm(x), model(x))
    assert_same(run(mm, x), run(model, x))
    with torch.no_grad():
        assert torch.equal(mm(x), model(x))
