"""torch.compile of a momentumized model: its part of the outer graph is rewritten before the backend sees it.

1. While Dynamo traces an outer function, the generated forward lets it trace the model's *own* forward, between two
   hooks (:func:`traced`).  The first puts itself in front of the backend, the second marks the nodes that were
   added in between: the model's *region* of the outer graph.
   ``torch.export`` with ``strict=True`` comes this way, too, and gets one graph with the chains in it.
2. When Dynamo hands the graph over, each region becomes a graph of its own, is rewritten with the model's options
   (:mod:`mfx.pipeline`) and takes its old place.  Its chains must be those that the model has outside of a compiler.
   What lies between chains is compiled by the backend (:mod:`mfx.compile.pieces`).
3. The parameters of what gives velocities and gammas are touched in between the hooks, which makes them inputs of the
   graph.
4. Where a region is inside of a higher-order operation (:mod:`mfx.compile.bodies`), all chains of the graph store.

Nothing here looks at how the model was captured for eager use.

Source: torch/_dynamo/comptime.py, alike in torch 2.11 and 2.15.
Known limits: no momentumized model inside another; inside of a higher-order operation none whose gammas modules give,
nor, where Dynamo allows no side effects there, with attention of torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from mfx.capture import named_modules
from mfx.capture.dynamo import pass_by_masks
from mfx.capture.lifted import kind_of, mark, note_modes, note_shape
from mfx.capture.named import MODULES, teach
from mfx.compile.added import added_of
from mfx.compile.bodies import bodies
from mfx.compile.live import Live, Traceable, only_for_these_options
from mfx.compile.pieces import has_transforms, in_pieces, is_dynamic
from mfx.compile.stand_ins import stand_ins
from mfx.errors import CompileError, EntryError, PlanChangedError
from mfx.graph.notes import GAMMA, MODES, REGION
from mfx.graph.splice import join, part
from mfx.pipeline import momentumize_graph
from mfx.rewrite import AS_THEY_ARE, Branches, Lifted
from mfx.sharding import refuse_compiled
from mfx.torch_versions import only_explains

_REGIONS = "_mfx_regions"
_ATTENTION = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


@dataclass(eq=False)
class _Region:
    """One call of a momentumized model in an outer graph."""

    root: nn.Module
    momentum: Traceable
    source: Any
    before: set[fx.Node]
    needed: list[str] = field(default_factory=list)


@dataclass(eq=False)
class _Regions:
    """The regions of one outer graph, and the one that Dynamo is in."""

    closed: list[_Region] = field(default_factory=list)
    open: _Region | None = None


_outer: list[bool] = []
"""Whether attention's fast path was on before the region that Dynamo is in, or broke."""


def traced(root: nn.Module, momentum: Traceable, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Dynamo's way through a momentumized model; runs under Dynamo only.

    Raises:
        CompileError: the model is used in a way that cannot be compiled.
        PlanChangedError: the compiled graph has other chains than the model.
    """
    # Imported here, by name, since Dynamo follows this function and knows comptime when it sees it.
    from torch._dynamo.comptime import comptime

    if momentum.token == "":
        # Never so: the comparison makes Dynamo guard the token, and with it the options.
        return None
    comptime(_enter)
    before = torch.backends.mha._is_fastpath_enabled
    if any(isinstance(module, _ATTENTION) for module in root.modules()):
        # In inference its fast path would swallow whole layers, adds and all; Dynamo follows no call of the setter.
        torch.backends.mha._is_fastpath_enabled = False
    # Dynamo makes inputs of what it sees used; _start forgets the uses.
    for modules in momentum.added(root).values():
        for module in modules:
            for parameter in module.parameters():
                parameter.detach()
            for buffer in module.buffers():
                buffer.detach()
    comptime(_start)
    value = forward(root, *args, **kwargs)
    comptime(_leave)
    torch.backends.mha._is_fastpath_enabled = before
    return value


def traced_within(module: nn.Module, guard: Any) -> None:
    """Dynamo's way into what runs a part of a chain, and asks ``guard``; runs under Dynamo only."""
    from torch._dynamo.comptime import comptime

    for owner in guard.owners:
        side = owner()
        if side is not None and side.stamp == "":  # never so, as in traced()
            return
    comptime(_within)


def _within(context: Any) -> None:
    """Pass inside of a region; elsewhere the guard decides."""
    regions = _output(context).__dict__.get(_REGIONS)
    if regions is None or regions.open is None:
        try:
            _local(context, "guard").check(_local(context, "module"))
        except EntryError as error:
            for before in _outer:
                torch.backends.mha.set_fastpath_enabled(before)  # what traced() would have put back
            raise EntryError(
                f"{error}. Compiled, this is also what is seen where Dynamo breaks the graph inside of a momentumized "
                "model: fullgraph=True shows where and why"
            ) from None


def _output(context: Any) -> Any:
    return context._i_will_not_complain_if_bc_breaks_InstructionTranslator().output


def _local(context: Any, name: str) -> Any:
    return _variable(context, name).value


def _variable(context: Any, name: str) -> Any:
    return context.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker().realize()


def _enter(context: Any) -> None:
    """Put the pass in front of the backend, once for each graph, and begin a region."""
    output = _output(context)
    root, momentum = _local(context, "root"), _local(context, "momentum")
    name = type(root).__name__
    if momentum.linked:
        raise EntryError(
            f"{name} is one of the blocks that its model's own Python runs as a chain of momentum steps; compiled by "
            "itself it would run without the chain's velocity. Compile the model: what links the blocks runs eagerly"
        )
    if output.current_tracer is not output.root_tracer and momentum.added(root).get(GAMMA):
        raise CompileError(
            f"{name} has gammas that modules give, and runs inside a higher-order operation (torch.utils.checkpoint, "
            "torch.cond ...) of the compiled function, where they would get no gradient: call it outside of that"
        )
    regions = output.__dict__.get(_REGIONS)
    if regions is None:
        regions = output.__dict__[_REGIONS] = _Regions()
        output.compiler_fn = _in_front_of(output.compiler_fn, regions, output.export)
    if regions.open is not None:
        raise CompileError(
            f"{name} is momentumized and part of {type(regions.open.root).__name__}, which is too: "
            "momentumize only one of them to compile it"
        )
    _refuse_all_children(root, momentum)
    refuse_compiled(root, name)
    regions.open = _Region(root, momentum, _variable(context, "momentum").source, set(output.graph.nodes))
    _outer[:] = [torch.backends.mha.get_fastpath_enabled()]
    teach()
    pass_by_masks(root)
    output.__dict__[MODULES] = named_modules(root, momentum.options, momentum.place.prefix)


def _refuse_all_children(root: nn.Module, momentum: Traceable) -> None:
    """Refuse a model whose forward would run what gives velocities and gammas as its last layers."""
    if isinstance(root, nn.Sequential) and momentum.added(root):
        raise CompileError(
            f"{type(root).__name__} runs all its children in turn, and what gives velocities or gammas is one of them "
            "now, which Dynamo would follow. Put it into a module with a forward of its own, and momentumize that"
        )


def _start(context: Any) -> None:
    """Note the inputs that what gives velocities and gammas needs, and forget that they were touched."""
    output = _output(context)
    region = output.__dict__[_REGIONS].open
    touched = [node for node in output.graph.nodes if node not in region.before and node.op != "placeholder"]
    region.needed = [str(node.all_input_nodes[0].target) for node in touched if node.target == "detach"]
    region.before = {node for node in output.graph.nodes if node.op != "placeholder"}


def _leave(context: Any) -> None:
    """End the region."""
    output = _output(context)
    regions = output.__dict__.get(_REGIONS)
    if regions is None or regions.open is None:
        torch.backends.mha.set_fastpath_enabled(_local(context, "before"))  # what traced() would have put back
        raise _broken("a model")
    region, regions.open = regions.open, None
    _outer.clear()
    output.__dict__[MODULES] = None
    number = len(regions.closed)
    regions.closed.append(region)
    for node in output.graph.nodes:
        if node not in region.before and node.op not in ("placeholder", "output"):
            node.meta[REGION] = number


def _broken(name: str) -> CompileError:
    return CompileError(
        f"Dynamo breaks the graph inside {name}, which is momentumized: each part would start with a new velocity, and "
        "the model would compute another function. fullgraph=True shows where and why; rewrite that line, or compile "
        "the parts around the model"
    )


def _in_front_of(compiler: Callable[..., Any], regions: _Regions, export: bool) -> Callable[..., Any]:
    """The backend with the pass in front."""

    def compile_rewritten(gm: fx.GraphModule, example_inputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        if regions.open is not None:
            raise _broken(type(regions.open.root).__name__)
        handed = gm
        # Asked once: the inputs of a graph that was joined do not know what Dynamo has them from.
        placeholders = gm.graph.find_nodes(op="placeholder")
        kinds = [kind_of(node, value) for node, value in zip(placeholders, example_inputs, strict=True)]
        held = list(bodies(gm, dict(zip(placeholders, kinds, strict=True))))
        # What only looks on is shown one graph; inside of operations, or transforms, chains store, and all is compiled.
        whole = export or only_explains(compiler) or has_transforms(gm.graph) or bool(held)
        branches = AS_THEY_ARE if whole else Branches.by(compiler, is_dynamic(example_inputs))
        for number, region in enumerate(regions.closed):
            if whole and not export:
                only_for_these_options(region.source)
            for body, inner in held:
                body.take(_rewritten(body.gm, inner, number, region, branches))
            gm = _rewritten(gm, kinds, number, region, branches)
        # What Dynamo notes on the module that it hands over (why the graph ends, say) goes with what takes its place.
        for name, value in handed.__dict__.items():
            if not name.startswith("_") and name not in gm.__dict__:
                setattr(gm, name, value)
        gm.meta.update(handed.meta)
        return compiler(gm, example_inputs, *args, **kwargs) if whole else in_pieces(gm, branches)

    compile_rewritten.__name__ = getattr(compiler, "__name__", "backend")
    for name in ("compiler_name", "get_compiler_config"):
        if hasattr(compiler, name):
            setattr(compile_rewritten, name, getattr(compiler, name))
    return compile_rewritten


def _rewritten(
    gm: fx.GraphModule, kinds: Sequence[str], number: int, region: _Region, branches: Branches
) -> fx.GraphModule:
    """``gm``, whose inputs are of these ``kinds``, with the chains of one region as momentum nodes."""
    note_modes(gm.graph)
    placeholders = gm.graph.find_nodes(op="placeholder")
    nodes = [node for node in gm.graph.nodes if node.meta.get(REGION) == number]
    if not nodes:
        return gm
    by_name = {str(node.target): node for node in gm.graph.nodes if node.op in ("placeholder", "get_attr")}
    needed = [by_name[name] for name in region.needed]
    inner, inputs = part(gm, nodes, needed)
    if MODES in nodes[0].meta and nodes[0].meta[MODES] == nodes[-1].next.meta[MODES]:
        inner.graph.output_node().meta[MODES] = nodes[0].meta[MODES]
    lifted = {inputs[node]: kind for node, kind in zip(placeholders, kinds, strict=True) if kind and node in inputs}
    mark(inner.graph, lifted, {id(module): path for path, module in region.root.named_modules() if path})
    if region.momentum.options.shapes:
        for node in inner.graph.nodes:
            note_shape(node)
    momentum = region.momentum
    live = Live(momentum, momentum.options)
    binding = Lifted(inner, branches, added_of(region.momentum, region.root, [inputs[node] for node in needed]), live)
    place, before = momentum.place, momentum.places
    passed = momentumize_graph(inner.graph, inner, momentum.options, binding, region.root, place, before)
    expected = region.momentum.expected()
    if expected is not None and passed.plan.names != expected:
        raise PlanChangedError(
            f"compiled, {type(region.root).__name__} has the chains {_listed(passed.plan.names)}, and else "
            f"{_listed(expected)}. It would compute another function: exclude the blocks that differ, or momentumize "
            "it with capture='dynamo' and example_inputs="
        )
    if momentum.options.activation_budget is not None:
        values = [node.meta.get("example_value") for node in inner.graph.find_nodes(op="placeholder")]
        passed = passed.within(inner, stand_ins(inner.graph, values), binding)
    live.take(passed)
    momentum.compiled.add(live)
    return join(gm, nodes, passed.rewritten.graph, inputs)


def _listed(chains: Sequence[Sequence[str]]) -> str:
    return str([list(chain) for chain in chains])
