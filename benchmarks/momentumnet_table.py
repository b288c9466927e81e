"""What each name and option of momentumnet 0.10 does on the torch that is installed, and what it does in mfx.

Each row is a check that both libraries go through: outputs, gradients and buffers against the recurrence written out,
in train mode and float64 unless the row says otherwise.  A row is ``works`` (relative error below 1e-8; else it says to
what), ``wrong`` (above 1e-3), or ``fails`` (with the exception).

    pip install '.[bench]' && python benchmarks/momentumnet_table.py
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import momentumnet
import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn

import mfx

WIDTH = 6
Check = Callable[[Any], "float | None"]
CHECKS: list[tuple[str, str, Check]] = []


def check(name: str, what: str) -> Callable[[Check], Check]:
    """Register a row: ``check(library)`` gives a relative error, or None where running is all."""

    def register(function: Check) -> Check:
        CHECKS.append((name, what, function))
        return function

    return register


def branch(*inner: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 9), nn.Tanh(), *inner, nn.Linear(9, WIDTH)).double()


class Adds(nn.Module):
    """A branch with a further argument."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = branch()

    def forward(self, x: Tensor, side: Any = None, factor: float = 1.0) -> Tensor:
        value = self.inner(x) * factor
        return value if side is None else value + side


def by_hand(functions: Any, x: Tensor, gamma: float, whole: bool = False, v: Any = 0.0, **given: Any) -> Tensor:
    for function in functions:
        value = function(x, **given)
        v = gamma * v + (1 - gamma) * (value - x if whole else value)
        x = x + v
    return x


def rows() -> Tensor:
    return torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def outcome(call: Callable[[Tensor], Tensor], module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Outputs, gradients and buffers of one step."""
    module.zero_grad()
    for tensor in inputs:
        tensor.grad = None
    torch.manual_seed(0)
    value = call(*inputs)
    value.square().sum().backward()
    grads = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in (*inputs, *module.parameters())]
    return [value.detach(), *grads, *(buffer.detach().clone() for buffer in module.buffers())]


def error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest relative error over the tensors."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).double().norm() / b.double().norm().clamp_min(1e-6)) for a, b in pairs)


def compare(library: Any, functions: list[nn.Module], gamma: float = 0.9, inputs: Any = None, **given: Any) -> float:
    """A reversible net of ``library`` against the recurrence, on copies of the same functions."""
    twins = copy.deepcopy(functions)
    net = library.MomentumNet(functions, gamma, use_backprop=given.pop("use_backprop", False), **given)
    whole = not given.get("is_residual", True)
    x = rows() if inputs is None else inputs
    expected = outcome(lambda x: by_hand(twins, x, gamma, whole), nn.ModuleList(twins), x)
    return error(outcome(net, nn.ModuleList(functions), x), expected)


def several(*inner: nn.Module, depth: int = 4) -> list[nn.Module]:
    torch.manual_seed(0)
    return [branch(*copy.deepcopy(inner)) for _ in range(depth)]


NET = "MomentumNet"


@check(NET, "`functions`: list of modules, `use_backprop=False`")
def _(library: Any) -> float:
    return compare(library, several())


@check(NET, "`functions`: `nn.Sequential`")
def _(library: Any) -> float:
    functions = several()
    net = library.MomentumNet(nn.Sequential(*functions), 0.9, use_backprop=False)
    twin = copy.deepcopy(nn.ModuleList(functions))
    return error(outcome(net, nn.ModuleList(functions), rows()), outcome(lambda x: by_hand(twin, x, 0.9), twin, rows()))


@check(NET, "`functions`: the same module ten times")
def _(library: Any) -> float:
    function = several()[0]
    twin = copy.deepcopy(function)
    net = library.MomentumNet([function] * 10, 0.9, use_backprop=False)
    return error(outcome(net, function, rows()), outcome(lambda x: by_hand([twin] * 10, x, 0.9), twin, rows()))


@check(NET, "`gamma=0`")
def _(library: Any) -> float:
    return compare(library, several(), 0.0)


@check(NET, "`gamma=1`")
def _(library: Any) -> float:
    return compare(library, several(), 1.0)


@check(NET, "`gamma=0.5`, 100 functions, float32")
def _(library: Any) -> float | None:
    functions = [function.float() for function in several(depth=100)]
    found = compare(library, functions, 0.5, rows().detach().float().requires_grad_())
    return None if found < 1e-3 else found


@check(NET, "`gamma` set after construction")
def _(library: Any) -> float:
    functions = several()
    net = library.MomentumNet(functions, 0.9)
    net.gamma = 0.5
    return error([net(rows())], [by_hand(functions, rows(), 0.5)])


@check(NET, "`init_speed=True, init_function=`")
def _(library: Any) -> float:
    functions, init = several(), nn.Linear(WIDTH, WIDTH).double()
    net = library.MomentumNet(functions, 0.9, init_speed=True, init_function=init, use_backprop=False)
    parts = nn.ModuleList([*functions, init])
    twins = copy.deepcopy(parts)
    expected = outcome(lambda x: by_hand(twins[:-1], x, 0.9, v=twins[-1](x)), twins, rows())
    return error(outcome(net, parts, rows()), expected)


@check(NET, "`use_backprop=True`")
def _(library: Any) -> float:
    return compare(library, several(), use_backprop=True)


@check(NET, "`is_residual=False`")
def _(library: Any) -> float:
    return compare(library, several(), is_residual=False)


def _with_side(library: Any, keyword: bool) -> float:
    torch.manual_seed(0)
    functions = [Adds() for _ in range(4)]
    net = library.MomentumNet(functions, 0.9, use_backprop=False)
    twins = copy.deepcopy(nn.ModuleList(functions))
    call = (lambda x, s: net(x, side=s)) if keyword else (lambda x, s: net(x, s))
    expected = outcome(lambda x, s: by_hand(twins, x, 0.9, side=s), twins, rows(), rows())
    return error(outcome(call, nn.ModuleList(functions), rows(), rows()), expected)


@check(NET, "extra tensor argument, with its gradient")
def _(library: Any) -> float:
    return _with_side(library, keyword=False)


@check(NET, "extra keyword argument")
def _(library: Any) -> float:
    return _with_side(library, keyword=True)


@check(NET, "extra argument None or a number")
def _(library: Any) -> None:
    library.MomentumNet([Adds() for _ in range(3)], 0.9, use_backprop=False)(rows(), None, 2.0).sum().backward()


@check(NET, "`.functions`, `.init_function`, `.gamma`")
def _(library: Any) -> None:
    functions, init = several(), branch()
    net = library.MomentumNet(functions, 0.9, True, init)
    assert list(net.functions) == functions
    assert net.init_function is init
    assert net.gamma == 0.9


@check(NET, "batch norm: running statistics")
def _(library: Any) -> float:
    return compare(library, several(nn.BatchNorm1d(9)))


@check(NET, "dropout")
def _(library: Any) -> float:
    return compare(library, several(nn.Dropout(0.3)))


@check(NET, "a frozen function")
def _(library: Any) -> float:
    functions = several()
    functions[1].requires_grad_(False)
    return compare(library, functions)


@check(NET, "an unused parameter in a function")
def _(library: Any) -> float:
    functions = several()
    functions[1].register_parameter("spare", nn.Parameter(torch.ones(2)))
    return compare(library, functions)


@check(NET, "bfloat16 autocast, 24 functions, gamma 0.7 (against stored)")
def _(library: Any) -> float | None:
    functions = [function.float() for function in several(depth=24)]
    x = rows().detach().float()

    def gradients(use_backprop: bool, enabled: bool) -> list[Tensor]:
        net = library.MomentumNet(functions, 0.7, use_backprop=use_backprop)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = net(x.clone().requires_grad_()).float().square().sum()
        return list(torch.autograd.grad(loss, list(nn.ModuleList(functions).parameters())))

    exact, stored, found = gradients(True, False), gradients(True, True), gradients(False, True)
    return None if error(found, stored) <= 2 * error(stored, exact) else error(found, stored)


@check(NET, "two backwards with `retain_graph=True`")
def _(library: Any) -> float:
    functions = several()
    loss = library.MomentumNet(functions, 0.9, use_backprop=False)(rows()).sum()
    parameters = list(nn.ModuleList(functions).parameters())
    return error(*(list(torch.autograd.grad(loss, parameters, retain_graph=True)) for _ in range(2)))


@check(NET, "`copy.deepcopy` after a step")
def _(library: Any) -> None:
    net = library.MomentumNet(several(), 0.9, use_backprop=False)
    net(rows()).sum().backward()
    copy.deepcopy(net)(rows())


@check(NET, "`torch.compile(net, fullgraph=True)`")
def _(library: Any) -> float:
    torch._dynamo.reset()
    functions = several()
    net = library.MomentumNet(functions, 0.9, use_backprop=False)
    twins = copy.deepcopy(nn.ModuleList(functions))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    return error(
        outcome(compiled, nn.ModuleList(functions), rows()), outcome(lambda x: by_hand(twins, x, 0.9), twins, rows())
    )


TRANSFORM = "transform_to_momentumnet"


def resnet_by_hand(m: Any, x: Tensor, gamma: float) -> Tensor:
    x = m.maxpool(m.relu(m.bn1(m.conv1(x))))
    for layer in (m.layer1, m.layer2, m.layer3, m.layer4):
        x = by_hand(layer[1:], layer[0](x), gamma, whole=True)
    return m.fc(m.avgpool(x).flatten(1))


def _resnet(library: Any, name: str, gamma: float) -> float:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=5).double()
    new = library.transform_to_momentumnet(model, gamma=gamma, use_backprop=False)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found = outcome(new, new, x.clone().requires_grad_())
    return error(found, outcome(lambda x: resnet_by_hand(model, x, gamma), model, x.clone().requires_grad_()))


@check(TRANSFORM, "resnet18, all defaults")
def _(library: Any) -> float:
    return _resnet(library, "resnet18", 0.9)


@check(TRANSFORM, "resnet34, `gamma=0`")
def _(library: Any) -> float:
    return _resnet(library, "resnet34", 0.0)


@check(TRANSFORM, "a checkpoint of the original loads")
def _(library: Any) -> None:
    model = torchvision.models.resnet18()
    library.transform_to_momentumnet(model).load_state_dict(model.state_dict())


@check(TRANSFORM, "the given model is left alone")
def _(library: Any) -> None:
    model = torchvision.models.resnet18()
    new = library.transform_to_momentumnet(model)
    assert type(model.layer1) is nn.Sequential
    assert not {id(p) for p in new.parameters()} & {id(p) for p in model.parameters()}


class Loops(nn.Module):
    """x + f(x) over the entries of a Sequential, as in momentumnet's own tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.functions = nn.Sequential(*several())

    def forward(self, x: Tensor) -> Tensor:
        for function in self.functions:
            x = x + function(x)
        return x


@check(TRANSFORM, "`is_residual=True` where the model adds x itself (momentumnet's tutorial)")
def _(library: Any) -> float:
    model = Loops()
    new = library.transform_to_momentumnet(model, ["functions"], gamma=0.5, is_residual=True, keep_first_layer=False)
    expected = outcome(lambda x: by_hand(model.functions, x, 0.5), model, rows())
    return error(outcome(new, new, rows()), expected)


@check(TRANSFORM, "`is_residual=True` on a plain Sequential")
def _(library: Any) -> float:
    model = nn.Sequential()
    model.add_module("stack", nn.Sequential(*several()))
    new = library.transform_to_momentumnet(model, ["stack"], gamma=0.5, is_residual=True, keep_first_layer=False)
    expected = outcome(lambda x: by_hand(model.stack, x, 0.5), model, rows())
    return error(outcome(new, new, rows()), expected)


def _transformer(library: Any, masks: bool) -> float:
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 2, 2, 16, dropout=0.1, batch_first=True).double()
    layers = ["encoder.layers", "decoder.layers"]
    new = library.transform_to_momentumnet(model, layers, gamma=0.9, use_backprop=False, keep_first_layer=False)
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64) if masks else None
    padding = torch.tensor([[False, False, False, True, True], [False] * 5]) if masks else None

    def expected(source: Tensor, target: Tensor) -> Tensor:
        x = by_hand(model.encoder.layers, source, 0.9, whole=True, src_key_padding_mask=padding)
        memory = model.encoder.norm(x)
        given = {"memory": memory, "tgt_mask": mask, "memory_key_padding_mask": padding}
        return model.decoder.norm(by_hand(model.decoder.layers, target, 0.9, whole=True, **given))

    def found(source: Tensor, target: Tensor) -> Tensor:
        given = {"tgt_mask": mask, "src_key_padding_mask": padding, "memory_key_padding_mask": padding}
        return new(source, target, **(given if masks else {}))

    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(2, n, 8, dtype=torch.float64, generator=generator) for n in (5, 4)]
    ours = outcome(found, new, *(x.clone().requires_grad_() for x in inputs))
    return error(ours, outcome(expected, model, *(x.clone().requires_grad_() for x in inputs)))


@check(TRANSFORM, '`nn.Transformer`, `["encoder.layers", "decoder.layers"]`')
def _(library: Any) -> float:
    return _transformer(library, masks=False)


@check(TRANSFORM, "the same with masks and key padding masks")
def _(library: Any) -> float:
    return _transformer(library, masks=True)


class Pairs(nn.Module):
    """Layers in pairs, as vit-pytorch's ViT keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(several(depth=2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for attention, feed_forward in self.layers:  # type: ignore[misc]
            x = attention(x) + x
            x = feed_forward(x) + x
        return x


@check(TRANSFORM, "a list of pairs (vit-pytorch's ViT) as it is")
def _(library: Any) -> float:
    model = Pairs()
    new = library.transform_to_momentumnet(model, ["layers"], gamma=0.5, is_residual=True, keep_first_layer=False)
    flat = [function for pair in model.layers for function in pair]  # type: ignore[attr-defined]
    return error(outcome(new, new, rows()), outcome(lambda x: by_hand(flat, x, 0.5), model, rows()))


@check(TRANSFORM, "a path that does not exist is named")
def _(library: Any) -> None:
    try:
        library.transform_to_momentumnet(Loops(), ["function"])
    except Exception as error:
        assert "functions" in str(error), f"{type(error).__name__}: {error}"


@check("models", "`ResNet18`, `mResNet18` and the like")
def _(library: Any) -> None:
    if library is mfx:
        mfx.momentumize(torchvision.models.resnet18())(torch.randn(2, 3, 32, 32)).sum().backward()
    else:
        models = importlib.import_module("momentumnet.models")
        models.mResNet18(num_classes=5)(torch.randn(2, 3, 32, 32)).sum().backward()


@check("scripts", "`trainer_CIFAR_10`, `trainer_imagenet`, `toy_datasets`")
def _(library: Any) -> None:
    if library is mfx:
        raise NotImplementedError("not part of mfx: examples/digits.py, examples/rings.py")
    for name in ("trainer_CIFAR_10", "trainer_imagenet", "toy_datasets"):
        importlib.import_module(f"momentumnet.{name}")


def verdict(library: Any, function: Check) -> str:
    """What a check comes to, in a few words."""
    try:
        found = function(library)
    except Exception as error:
        text = " ".join(str(error).split()) or "no text"
        return f"fails: {type(error).__name__}, {text[:70]}{'...' if len(text) > 70 else ''}"
    if found is None or found < 1e-8:
        return "works"
    return f"works, to {found:.0e}" if found < 1e-3 else f"**wrong** ({found:.0e})"


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"momentumnet {momentumnet.__version__}, mfx, torch {torch.__version__.partition('+')[0]}, CPU.\n")
    lines = [
        [name, what, verdict(momentumnet, function).replace("|", "/"), verdict(mfx, function).replace("|", "/")]
        for name, what, function in CHECKS
    ]
    print(tabulate(lines, ["name", "option or use", "momentumnet 0.10", "mfx"], tablefmt="github"))


if __name__ == "__main__":
    main()
