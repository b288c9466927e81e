"""The canary: which names of torch's that it does not promise mfx uses, in which files; and that they are there."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
import torch

import mfx
from mfx import torch_versions

PACKAGE = Path(mfx.__file__).parent
NAMES = {
    "torch._C._TorchDispatchModeKey",
    "torch._C._are_functorch_transforms_active",
    "torch._C._autograd._get_current_graph_task_keep_graph",
    "torch._C._current_autograd_node",
    "torch._C._current_graph_task_id",
    "torch._C._get_dispatch_mode",
    "torch._C._select_conv_backend",
    "torch._C._will_engine_execute_node",
    "torch._compile._disable_dynamo",
    "torch._dynamo.comptime.comptime",
    "torch._ops.HigherOrderOperator",
    "torch._ops.OpOverload",
    "torch._subclasses.fake_tensor.DataDependentOutputException",
    "torch._subclasses.fake_tensor.DynamicOutputShapeException",
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch._subclasses.functional_tensor.FunctionalTensor",
    "torch.autograd.Variable._execution_engine.queue_callback",
    "torch.autograd._profiler_enabled",
    "torch.autograd._unsafe_preserve_version_counter",
    "torch.autograd.forward_ad._current_level",
    "torch.backends.mha._is_fastpath_enabled",
    "torch.distributed._composable_state._insert_module_state",
    "torch.distributed._composable_state._module_state_mapping",
    "torch.nn.modules.batchnorm._NormBase",
    "torch.nn.modules.dropout._DropoutNd",
    "torch.nn.modules.transformer._detect_is_causal_mask",
    "torch.overrides._get_current_function_mode",
    "torch.overrides._pop_mode_temporarily",
    "torch.utils._pytree",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._python_dispatch._disable_current_modes",
}
"""All private names of torch in the package; for those of Dynamo that are looked up late see ``DYNAMO``."""
ELSEWHERE = {
    # Dynamo itself follows these lines, and has to see the name.
    "compile/inside.py": {"torch._dynamo.comptime.comptime", "torch.backends.mha._is_fastpath_enabled"},
    # A function that Dynamo is taught to replace.
    "capture/dynamo.py": {"torch.nn.modules.transformer._detect_is_causal_mask"},
}


def private_names(file: Path) -> set[str]:
    """The dotted names that begin with torch and have a private part, as imported or written out in ``file``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    found = {name.replace("transformer._detect", "torch.nn.modules.transformer._detect", 1)
             if name.startswith("transformer.") else name for name in found}  # fmt: skip
    private = {name for name in found if name.startswith("torch.") and any(p.startswith("_") for p in name.split("."))}
    ends = {name for name in private if not any(other != name and other.startswith(f"{name}.") for other in private)}
    return {name for name in ends if not name.split(".")[-1].startswith("__")}


def used(file: Path) -> set[str]:
    """Private names, without what is asked of them."""
    return {next((known for known in NAMES if name == known or name.startswith(f"{known}.")), name)
            for name in private_names(file)}  # fmt: skip


def test_private_names_are_those_listed_and_stand_in_one_folder():
    found = {path.relative_to(PACKAGE).as_posix(): used(path) for path in PACKAGE.rglob("*.py") if used(path)}
    assert set().union(*found.values()) == NAMES
    assert {path: names for path, names in found.items() if not path.startswith("torch_versions/")} == ELSEWHERE


@pytest.mark.parametrize("name", sorted(NAMES))
def test_this_torch_has_it(name):
    value = torch
    path = "torch"
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        if not hasattr(value, part):
            importlib.import_module(path)
        value = getattr(value, part)


@pytest.mark.parametrize("name", sorted(torch_versions.DYNAMO))
def test_this_dynamo_has_it(name):
    assert getattr(torch_versions.dynamo(), name) is not None


class Asks(torch.autograd.Function):
    """x as it is; notes in backward whether a leaf that is an operand beside it will be run, and that it ends."""

    @staticmethod
    def forward(ctx, leaf, x, notes):
        ctx.leaf, ctx.notes = leaf, notes
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.notes.append((torch_versions.will_run(ctx.leaf), torch_versions.backward_number()))
        torch_versions.when_backward_ends(lambda: ctx.notes.append("end"))
        return None, grad, None


def test_a_backward_that_is_asked_for_gradients_comes_to_nothing_else():
    leaf, weight, notes = torch.empty(0, requires_grad=True), torch.ones(3, requires_grad=True), []
    inner = weight * 2
    loss = Asks.apply(leaf, inner, notes).sum()
    loss.backward(retain_graph=True)
    loss.backward(inputs=[weight], retain_graph=True)
    torch.autograd.grad(loss, weight, retain_graph=True)
    torch.autograd.grad(loss, inner)
    assert notes[1::2] == ["end"] * 4
    assert [asked for asked, _ in notes[::2]] == [True, False, False, False]
    assert len({number for _, number in notes[::2]}) == 4
    assert leaf.grad is None


def test_a_name_that_is_gone_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setitem(torch_versions.DYNAMO, "not_there", "torch._dynamo.utils")
    torch_versions.dynamo.cache_clear()
    with pytest.raises(ImportError, match=rf"torch\._dynamo\.utils\.not_there.*{torch.__version__.split('+')[0]}"):
        torch_versions.dynamo()
    torch_versions.dynamo.cache_clear()
