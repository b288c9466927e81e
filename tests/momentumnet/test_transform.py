"""transform_to_momentumnet, and modules= behind it, against recurrences written by hand from the model's own parts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torchvision
from helpers import assert_same, chain_names, relative_error, run
from nets import Net
from torch import Tensor, nn

import mfx
from mfx.find.whole.named import calls_of
from mfx.model.conversion import momentum_of

GAMMA = 0.8


def rows() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 4, dtype=torch.float64, requires_grad=True)


def steps(x: Tensor, blocks: Any, gamma: float = GAMMA, branch: bool = False, **kwargs: Any) -> Tensor:
    """One chain over ``blocks``, from v_0 = 0."""
    v = torch.zeros_like(x)
    for block in blocks:
        f = block(x, **kwargs)
        v = gamma * v + (1 - gamma) * (f if branch else f - x)
        x = x + v
    return x


class ByHand(nn.Module):
    """``forward`` as a function over the parts of a copy of ``model``."""

    def __init__(self, model: nn.Module, forward: Any) -> None:
        super().__init__()
        self.__dict__.update(copy.deepcopy(model).__dict__)
        self.function = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def resnet_by_hand(m: Any, x: Tensor) -> Tensor:
    x = m.maxpool(m.relu(m.bn1(m.conv1(x))))
    for layer in (m.layer1, m.layer2, m.layer3, m.layer4):
        x = steps(layer[0](x), layer[1:])
    return m.fc(m.avgpool(x).flatten(1))


@pytest.mark.parametrize("use_backprop", [False, True])
def test_a_resnet_with_the_default_layers(use_backprop):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).double()
    new = mfx.transform_to_momentumnet(model, gamma=GAMMA, use_backprop=use_backprop)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    assert_same(run(new, x), run(ByHand(model, resnet_by_hand), x), 1e-9)
    assert_same(run(new.eval(), x), run(ByHand(model.eval(), resnet_by_hand), x), 1e-9)


def test_the_model_is_copied_and_its_checkpoints_load():
    model = torchvision.models.resnet18(num_classes=5)
    new = mfx.transform_to_momentumnet(model)
    assert type(model.layer1) is nn.Sequential
    assert list(new.state_dict()) == list(model.state_dict())
    assert not {id(p) for p in new.parameters()} & {id(p) for p in model.parameters()}
    other = torchvision.models.resnet18(num_classes=5).eval()
    new.load_state_dict(other.state_dict())
    mfx.set_gamma(new, 0.0)
    x = torch.randn(2, 3, 32, 32)
    assert relative_error(new.eval()(x), other(x)) < 1e-5
    for twin in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(twin(x), new(x))


def test_a_container_that_is_called_keeps_its_own_call():
    """``layer1`` can be used alone, for features, and is the momentum version there as well."""
    model = torchvision.models.resnet18().double().eval()
    new = mfx.transform_to_momentumnet(model, ["layer1"], gamma=GAMMA)
    x = torch.randn(2, 64, 8, 8, dtype=torch.float64)
    assert isinstance(new.layer1, nn.Sequential)
    assert relative_error(new.layer1(x), steps(model.layer1[0](x), model.layer1[1:])) < 1e-12


def transformer_by_hand(m: Any, source: Tensor, target: Tensor, **masks: Any) -> Tensor:
    memory = steps(source, m.encoder.layers, src_key_padding_mask=masks.get("src_key_padding_mask"))
    memory = m.encoder.norm(memory)
    tgt_mask, padding = masks.get("tgt_mask"), masks.get("memory_key_padding_mask")
    value = steps(target, m.decoder.layers, memory=memory, tgt_mask=tgt_mask, memory_key_padding_mask=padding)
    return m.decoder.norm(value)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_transformer_with_masks_and_memory(norm_first):
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 3, 3, 16, dropout=0.2, batch_first=True, norm_first=norm_first).double()
    new = mfx.transform_to_momentumnet(model, ["encoder.layers", "decoder.layers"], GAMMA, keep_first_layer=False)
    source = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding, "tgt_mask": causal}
    by_hand = ByHand(model, transformer_by_hand)
    assert list(new.state_dict()) == list(model.state_dict())
    for given in ({}, masks):
        found, expected = run(new, source, target, **given), run(by_hand, source, target, **given)
        assert relative_error(found.grads, expected.grads) < 1e-9
        assert relative_error(found.outputs, expected.outputs) < 1e-12
        assert relative_error(found.input_grads, expected.input_grads) < 1e-9
    assert [len(chain.blocks) for chain in mfx.chains(new)] == [3, 3]
    alone = steps(source, model.eval().encoder.layers)
    assert relative_error(new.eval().encoder(source), model.encoder.norm(alone)) < 1e-12


class ResBlock(nn.Module):
    """Adds x itself, and only loops over its ``nn.Sequential``."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.functions = nn.Sequential(*(nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.2)) for _ in range(depth)))
        for function in self.functions:
            function.append(nn.Linear(9, 4))  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        for function in self.functions:
            x = x + function(x)
        return x


class Toy(nn.Module):
    """A stack that adds x itself, and one of plain layers."""

    def __init__(self) -> None:
        super().__init__()
        self.res = ResBlock(3)
        self.plain = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.res(x))


def test_branches_whose_add_the_model_has_become_steps_of_the_model_itself():
    model = Toy()
    new = mfx.transform_to_momentumnet(model, "res.functions", GAMMA, is_residual=True, keep_first_layer=False)
    by_hand = ByHand(model, lambda m, x: m.plain(steps(x, m.res.functions, branch=True)))
    assert_same(run(new, rows()), run(by_hand, rows()), 1e-9)
    mfx.set_gamma(new, 0.0)
    assert_same(run(new, rows()), run(model, rows()))


@pytest.mark.parametrize("is_residual", [False, True])
def test_layers_that_are_called_in_sequence(is_residual):
    model = Toy()
    new = mfx.transform_to_momentumnet(model, ["plain"], GAMMA, is_residual=is_residual)
    by_hand = ByHand(model, lambda m, x: steps(m.plain[0](m.res(x)), m.plain[1:], branch=is_residual))
    assert_same(run(new, rows()), run(by_hand, rows()), 1e-9)


def test_two_transformations_one_after_the_other():
    model = Toy()
    new = mfx.transform_to_momentumnet(model, "res.functions", GAMMA, is_residual=True, keep_first_layer=False)
    new = mfx.transform_to_momentumnet(new, residual_layers=["plain"], gamma=GAMMA, keep_first_layer=False)
    by_hand = ByHand(model, lambda m, x: steps(steps(x, m.res.functions, branch=True), m.plain))
    assert_same(run(new, rows()), run(by_hand, rows()), 1e-9)


class PairStack(nn.Module):
    """Pairs of layers in a list of lists, as vision transformers keep them."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        pair = lambda: [nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Dropout(0.2)) for _ in range(2)]  # noqa: E731
        self.layers = nn.ModuleList(nn.ModuleList(pair()) for _ in range(depth))
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        for attend, feed in self.layers:
            x = attend(x) + x
            x = feed(x) + x
        return self.norm(x)


class PairNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.transformer = PairStack()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer(self.stem(x))


def test_pairs_of_layers_are_one_chain():
    model = PairNet()
    new = mfx.transform_to_momentumnet(model, ["transformer.layers"], GAMMA, is_residual=True, keep_first_layer=False)
    flat = lambda m: [f for pair in m.transformer.layers for f in pair]  # noqa: E731
    by_hand = ByHand(model, lambda m, x: m.transformer.norm(steps(m.stem(x), flat(m), branch=True)))
    assert_same(run(new, rows()), run(by_hand, rows()), 1e-9)
    assert [len(chain.blocks) for chain in mfx.chains(new)] == [6]


def test_lists_made_sequential_as_momentumnet_asks_for():
    model = PairNet()
    model.transformer = nn.Sequential(*(f for pair in model.transformer.layers for f in pair))  # type: ignore
    new = mfx.transform_to_momentumnet(model, ["transformer"], GAMMA, is_residual=True, keep_first_layer=False)
    by_hand = ByHand(model, lambda m, x: steps(m.stem(x), m.transformer, branch=True))
    assert_same(run(new, rows()), run(by_hand, rows()), 1e-9)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"sub_layers": ["layer1"]}, mfx.OptionError, r"Toy has no such module; containers it has: .*'plain'"),
        ({"sub_layers": "res.function"}, mfx.OptionError, r"containers it has: 'res\.functions'"),
        ({"sub_layers": []}, mfx.OptionError, "sub_layers is empty"),
        ({"sub_layers": ["plain.0.0"]}, mfx.OptionError, "Linear has no entries"),
        ({"sub_layers": ["plain"], "gamma": 1.0}, mfx.OptionError, "gamma=1.0"),
        ({"sub_layers": ["plain"], "gamma": False}, mfx.InputTypeError, "gamma must be a float .* not bool"),
        ({"sub_layers": ["res.functions"]}, mfx.OptionError, "itself adds x to the value .* is_residual=True"),
        ({"sub_layers": [3]}, mfx.InputTypeError, "not int"),
    ],
)
def test_bad_arguments_are_named(given, error, text):
    with pytest.raises(error, match=text):
        mfx.transform_to_momentumnet(Toy(), **given)


def test_an_entry_that_changes_the_shape_is_named():
    new = mfx.transform_to_momentumnet(torchvision.models.resnet18(), ["layer2"], keep_first_layer=False)
    with pytest.raises(mfx.ShapeError, match=r"returned shape \(2, 128, 4, 4\), but x has shape \(2, 64, 8, 8\)"):
        new(torch.randn(2, 3, 32, 32))


def test_an_entry_that_forward_does_not_call_is_named():
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x))

    with pytest.raises(mfx.OptionError, match=r"layers\.2 of Skips cannot become a momentum step: .* does not call it"):
        mfx.transform_to_momentumnet(Skips(), ["layers"], keep_first_layer=False)


@pytest.mark.parametrize("kind", ["toy", "transformer"])
def test_compiled_it_is_one_graph_and_the_same(kind):
    torch._dynamo.reset()
    if kind == "toy":
        new: Any = mfx.transform_to_momentumnet(Toy(), "plain", GAMMA)
        for module in new.modules():
            module.p = 0.0 if isinstance(module, nn.Dropout) else getattr(module, "p", None)
        inputs, masks = (rows(),), {}
    else:
        model = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True).double()
        new = mfx.transform_to_momentumnet(model, ["encoder.layers", "decoder.layers"], GAMMA, keep_first_layer=False)
        inputs = tuple(torch.randn(2, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 4))
        padding = torch.tensor([[False, False, False, True, True], [False] * 5])
        causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
        masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding, "tgt_mask": causal}
    found = run(torch.compile(new, fullgraph=True, backend="aot_eager"), *inputs, **masks)
    expected = run(new, *inputs, **masks)
    assert relative_error(list(found.grads.values()), list(expected.grads.values())) < 1e-9
    assert relative_error(found.input_grads, expected.input_grads) < 1e-9


def test_modules_taken_whole_are_the_same_by_either_capture_and_compiled():
    torch._dynamo.reset()
    model = Net(3, p=0.0)
    with_fx = mfx.momentumize(model, GAMMA, modules="blocks.?")
    with_dynamo = mfx.momentumize(model, GAMMA, modules="blocks.?", capture="dynamo", example_inputs=rows())
    assert chain_names(with_fx) == chain_names(with_dynamo) == (("blocks.0", "blocks.1", "blocks.2"),)
    by_hand = ByHand(model, lambda m, x: m.head(steps(m.stem(x), m.blocks)))
    expected = run(by_hand, rows())
    assert_same(run(with_fx, rows()), expected, 1e-9)
    assert_same(run(with_dynamo, rows()), expected, 1e-9)
    found = run(torch.compile(with_fx, fullgraph=True, backend="aot_eager"), rows())
    assert relative_error(list(found.grads.values()), list(expected.grads.values())) < 1e-9


def test_a_module_that_returns_a_tuple_is_a_block_of_its_first_value():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            value = self.linear(x)
            return torch.tanh(value), value.sum()

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            total = x.sum() * 0
            for layer in self.layers:
                x, extra = layer(x)
                total = total + extra
            return x * total

    def by_hand(m: Any, x: Tensor) -> Tensor:
        v, total = torch.zeros_like(x), x.sum() * 0
        for layer in m.layers:
            value, extra = layer(x)
            total = total + extra
            v = GAMMA * v + (1 - GAMMA) * (value - x)
            x = x + v
        return x * total

    model = Stack()
    new = mfx.transform_to_momentumnet(model, ["layers"], GAMMA, keep_first_layer=False)
    assert_same(run(new, rows()), run(ByHand(model, by_hand), rows()), 1e-9)


def test_a_tensor_that_is_only_indexed_is_one_value():
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)[0]

    model = Stack()
    by_hand = ByHand(model, lambda m, x: steps(x, m.layers)[0])
    for capture in ("fx", "dynamo"):
        options: dict[str, Any] = {"modules": "layers.*", "example_inputs": rows(), "capture": capture}
        mm = mfx.momentumize(model, GAMMA, **options)
        assert chain_names(mm) == (("layers.0", "layers.1", "layers.2"),)
        assert_same(run(mm, rows()), run(by_hand, rows()), 1e-9)


def test_of_modules_inside_one_another_the_outer_ones_are_the_blocks():
    model = Net(3, p=0.0)
    given = {"modules": "blocks.*", "example_inputs": rows()}  # blocks.0, and blocks.0.norm in it
    found = [momentum_of(mfx.momentumize(model, GAMMA, capture=capture, **given)) for capture in ("fx", "dynamo")]
    assert found[0].chains == found[1].chains == (("blocks.0", "blocks.1", "blocks.2"),)
    marks = [len(calls_of(part.latest_entry().captured.graph)) for part in found]
    assert marks == [3, 3]
