"""Mutations: break the package on purpose, one small place at a time, and see which test notices.

    python tests/mutations.py [-j JOBS] [WORD ...]

Each mutation (those whose name has one of the words, or all) is put into a temporary copy of the package, and the
chosen tests run against it until the first one fails.  Prints a table; the exit status is the number of mutations that
no test noticed.  A text that is to be replaced and is not there exactly once is an error: the list has to follow the
code.  Nothing of this is collected by pytest.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/models/test_properties.py tests/rule tests/run tests/plan tests/find tests/capture/test_calls.py "
    "tests/capture/test_tracer.py tests/model/test_conversion.py"
).split()


@dataclass(frozen=True)
class Mutation:
    """In ``file`` of the package, ``new`` for ``old``; ``first`` are the tests that run before the others."""

    name: str
    file: str
    old: str
    new: str
    first: str = ""


MUTATIONS = (
    # Rules
    Mutation("the gradient of gamma leaves out the velocity", "rule/varying.py",
             "apart = -branch if v is None else v - branch", "apart = -branch",
             first="tests/models/test_gammas.py"),
    Mutation("no velocity is kept for the gradient of gamma", "rule/arithmetic/snapshots.py",
             "(self.velocities or step - 1 not in self._kept)", "step - 1 not in self._kept",
             first="tests/models/test_gammas.py"),
    Mutation("what is read out as z gives the velocity no gradient", "run/chain.py",
             "return grad, (wide * ctx.coast).to(ctx.dtype), of_coast", "return grad, None, of_coast",
             first="tests/models/test_rules.py"),
    Mutation("blocks read z where they read a state on the way", "run/chain.py",
             "        self.handed[index] = x\n",
             "        self.handed[index] = x\n        self.states[index] = x if index in self.wanted else x\n",
             first="tests/models/test_rules.py"),
    Mutation("leapfrog takes h for its square", "rule/leapfrog.py",
             "return float(self.h) ** 2", "return float(self.h)", first="tests/models/test_rules.py"),
    Mutation("random signs are drawn in eval mode", "rule/gammas.py",
             "if not self.training:", "if False:", first="tests/models/test_gammas.py"),
    Mutation("all calls of a layer are one", "find/whole/layers.py",
             "(path, scope.call) if path", "(path, 0) if path", first="tests/find/whole"),
    Mutation("a layer that writes to x is taken whole", "find/whole/layers.py",
             "checked = check(flow, whole, named=True)", "checked = whole", first="tests/find/whole"),
    Mutation("what gives gamma is run as a layer of Sequential", "model/parts.py",
             "added = {name: root._modules.pop(name) for name in ADDED if name in root._modules}", "added = {}",
             first="tests/test_examples.py"),
    # Sharding
    Mutation("sharded parameters are operands", "run/operands.py",
             "if units is not None and units.hold(module, name):", "if False:",
             first="tests/test_sharding.py"),
    Mutation("sharded parameters are changed unseen", "sharding.py",
             "if _versions(self.parameters) != self.versions:", "if False:",
             first="tests/test_sharding.py"),
    Mutation("a module that runs twice in a backward is gathered once", "torch_versions/sharded.py",
             "state._training_state = type(state._training_state).IDLE", "pass",
             first="tests/test_sharding.py"),
    Mutation("a backward for some gradients accumulates those of units", "run/reversible.py",
             "ctx.needs_input_grad[8] and will_run(ANCHOR)", "ctx.needs_input_grad[8]",
             first="tests/test_sharding.py"),
    Mutation("sharded afterwards, several adds are one step in silence", "model/foreign/around.py",
             "            for path in parted:\n                _refuse",
             "            for path in []:\n                _refuse",
             first="tests/model/foreign"),
    # Compiled branches
    Mutation("what runs again moves running statistics", "rewrite/specs.py",
             '"again": branches(graph, copied)', '"again": branches(graph)',
             first="tests/compile"),
    Mutation("a compiled branch runs forward without gradient", "run/recompute.py",
             "    if step.compiled:\n        with torch.enable_grad():\n            yield\n    elif", "    if",
             first="tests/compile/test_as_backend.py"),
    Mutation("branches of one text share other functions", "rewrite/compiled.py",
             "key = code.src, names, kinds, id(self.key), self.dynamic", "key = code.src",
             first="tests/compile"),
    Mutation("branches are told apart by the names of their nodes", "rewrite/compiled.py",
             "named.create_node(node.op, node.target, args, kwargs, f\"v{number}\")",
             "named.create_node(node.op, node.target, args, kwargs, node.name)",
             first="tests/compile/test_as_backend.py"),
    Mutation("what was compiled for one dtype serves all", "rewrite/direct.py",
             "return value.dtype, value.shape, value.stride(), value.device, value.requires_grad", "return None",
             first="tests/compile/test_pieces.py"),
    Mutation("compiled chains keep the gamma that they began with", "compile/live.py",
             "if self.options is not self.owner.options:", "if False:",
             first="tests/compile/test_inside.py"),
    Mutation("a changed gamma does not compile a block alone anew", "model/state.py",
             "        self.options = options\n        self.note_moving()", "        self.options = options",
             first="tests/model/inner/test_guard.py"),
    Mutation("switches between pieces are compiled with them", "compile/pieces.py",
             "or node.target in (enter, leave)", "",
             first="tests/compile"),
    Mutation("a block compiled in place is passed by", "rewrite/regional.py",
             "if not any(asked):", "if True:",
             first="tests/rewrite/test_regional.py"),
    Mutation("a branch that calls hooks is compiled", "rewrite/regional.py",
             " or any(map(_has_hooks, modules_of([step], root)))", "", first="tests/rewrite/test_regional.py"),
    Mutation("a compiled segment is differentiated twice", "run/uninverted/anew.py",
             "        if torch.is_grad_enabled():", "        if False:", first="tests/compile/test_budget.py"),
    Mutation("compiled kernels read gaps", "rewrite/kernels.py",
             " and _is_dense(like)", "", first="tests/rewrite/test_kernels.py"),
    Mutation("all sizes of a branch share a function", "rewrite/compiled.py",
             "kinds = tuple(map(_kind, given))", "kinds = ()", first="tests/compile/test_pieces.py"),
    Mutation("numbers are read where they are compiled", "compile/pieces.py",
             "return is_lifted_number(source) or _is_ours(source)", "return _is_ours(source)",
             first="tests/compile/test_pieces.py"),
    # Sums, levels, streams
    Mutation("a gate is taken for a constant factor", "find/match.py",
             "if not term.kept or any(flow.origins[factor] for factor in term.by):", "if not term.kept:",
             first="tests/find/test_check.py"),
    Mutation("a negative multiple is a skip", "find/match.py",
             "if not term.kept or any(", "if any(", first="tests/find/test_check.py"),
    Mutation("sums are taken apart that others read", "graph/sums.py",
             "own = own and _readers(node) == 1", "own = own", first="tests/find/test_match.py"),
    Mutation("levels are mixed", "plan/level.py",
             "if outermost.get(row.skip) is row else 0", "if True else 0", first="tests/plan/test_level.py"),
    Mutation("slices in any order are the value", "graph/rearranging.py",
             "start in (None, 0) and stop is None and None not in inner and meet and ordered", "None not in inner",
             first="tests/graph/test_rearranging.py"),
    Mutation("any rearrangement comes to nothing", "graph/rearranging.py",
             "return list(value.shape) == shape and value.is_contiguous()", "return list(value.shape) == shape",
             first="tests/graph/test_rearranging.py"),
    Mutation("a round ends before all streams are updated", "find/streams/rounds.py",
             "if all(map(operator.lt, begin, end)) and _is_clean(flow, tracks, end, states):",
             "if _is_clean(flow, tracks, end, states):", first="tests/models/test_streams.py"),
    Mutation("streams lose the order of dimensions in memory", "rule/streams.py",
             "key=lambda dim: -stream.stride(dim))", "key=lambda dim: dim)", first="tests/models/test_streams.py"),
    Mutation("streams of other dtypes are joined", "find/streams/rounds.py",
             "if len({node.meta.get(DTYPE) for nodes in run.states for node in nodes}) > 1:", "if False:",
             first="tests/models/test_streams.py"),
    Mutation("draws may come in another order", "find/streams/joining.py",
             "if held.get(resource, -1) > position[node]:", "if False:", first="tests/models/test_streams.py"),
    Mutation("what is drawn for two blocks is drawn beside the chain", "plan/order.py",
             "        block = block if run is None else run.with_draws(block)\n", "",
             first="tests/models/test_draws.py"),
    Mutation("later captures make chains of their own", "model/state.py",
             ", before=self.places)", ")", first="tests/models/test_draws.py"),
    Mutation("what is written to memory is forgotten", "graph/dataflow.py",
             "held[memory[target]] = held.get(memory[target], frozenset()) | above", "pass",
             first="tests/models/test_fresh_tensors.py"),
    # What a step needs, and what fits
    Mutation("gradients that are there count as activations", "budget/live.py",
             "self.now -= storage.nbytes()", "self.now -= 0", first="tests/budget/test_live.py"),
    Mutation("the parameters of an optimizer that is made are not exchanged", "budget/owned.py",
             "twins.get(id(parameter), parameter)", "parameter", first="tests/budget/test_owned.py"),
    Mutation("the optimizer's step takes nothing for itself", "view/footprint.py",
             "owned.gradients + one.left + owned.updating)", "owned.gradients + one.left)",
             first="tests/view/test_footprint.py"),
    Mutation("a chain is free to keep whatever the peak is then", "budget/advice.py",
             ".bytes <= peak.bytes:", ".bytes <= 2 * peak.bytes:", first="tests/budget/test_advice.py"),
    Mutation("a size that needs just the memory does not fit", "budget/largest.py",
             "else found > memory", "else found >= memory", first="tests/budget/test_largest.py"),
    Mutation("inputs are not part of what must fit", "view/fits/sizes.py",
             "bytes_of(whole.call.tensors)", "0", first="tests/view/fits/test_fitting.py"),
    Mutation("what was there before counts in a confirming step", "view/fits/confirming.py",
             " - before + held", " + held", first="tests/view/fits/test_confirming.py"),
    # What is lost in silence if nobody looks
    Mutation("statistics of torch's own normalizations taken for weights", "graph/resources.py", "else 3", "else 1",
             first="tests/models/test_functional_norms.py"),
    Mutation("what hooks compute left alone", "run/watching/derived.py", "self.known.setdefault(leaf, True)",
             "self.known.setdefault(leaf, False)", first="tests/run/test_watched.py"),
    Mutation("views that hooks make left alone", "run/watching/derived.py", "if made and id(value) not in safe",
             "if made and not value._is_view() and id(value) not in safe", first="tests/run/test_watched.py"),
    Mutation("values kept elsewhere let through", "capture/symbolic.py", "    if tracer.left(held()) is None:\n",
             "    if True:\n", first="tests/capture/test_kept_elsewhere.py"),
    Mutation("blocks run by themselves", "model/inner/guard.py", "if who is not None or not inside:", "if True:",
             first="tests/model/inner"),
    Mutation("a run asks for values of the run before", "run/uninverted/offload.py", "_latest.waiting = None\n",
             "pass\n", first="tests/run/uninverted/test_offload.py"),
    # What needs no inverse
    Mutation("the second run does not end early", "run/uninverted/dropped.py",
             "                raise _Enough\n", "                pass\n", first="tests/run/uninverted/test_dropped.py"),
    Mutation("runs that differ are not told", "run/uninverted/dropped.py",
             "(now - size.double()).abs()", "(now - now).abs()", first="tests/run/uninverted/test_dropped.py"),
    Mutation("parameters of the second run are those of the modules by then", "run/uninverted/segment.py",
             "self.autocast(), own, self.conditions", "self.autocast(), self.conditions",
             first="tests/run/uninverted/test_segment.py"),
    Mutation("what hooks save is expected of the second run", "run/watching/derived.py",
             "        with saving():\n            return hook(module, *given)", "        return hook(module, *given)",
             first="tests/run/uninverted/test_segment.py"),
    Mutation("at gamma 0 x goes on without the branch's scale", "run/uninverted/plain.py",
             "advance(step, x, None, value)[0]", "(x + value)", first="tests/run/uninverted/test_together.py"),
    Mutation("what a block wrote to is handed out by another block as it is", "run/reversible.py",
             "return copies(chain, plain(chain, start.plan, root, x, operands))",
             "return tuple(plain(chain, start.plan, root, x, operands))", first="tests/run/test_reversible.py"),
    Mutation("a block that is put in place later is run", "model/parts.py",
             "(guard is None or guard.paths != paths)", "False", first="tests/capture/test_guards.py"),
    Mutation("a region without gradient is left twice in what is foreseen", "budget/step.py",
             "        if rewritten:\n            run.base = None", "        if False:\n            run.base = None",
             first="tests/budget/test_choose.py"),
    # The recurrence
    Mutation("pull is 1, not 1 - gamma", "rule/momentum.py", "return 1 - self.gamma", "return 1.0"),
    Mutation("pull and decay swapped", "rule/base.py", "torch.add(v * self.decay, branch, alpha=self.pull)",
             "torch.add(v * self.pull, branch, alpha=self.decay)"),
    Mutation("x moves by the old velocity", "rule/base.py",
             "        v = branch * self.pull if v is None else torch.add(v * self.decay, branch, alpha=self.pull)\n"
             "        return x + v, v",
             "        old = torch.zeros_like(x) if v is None else v\n"
             "        v = branch * self.pull if v is None else torch.add(v * self.decay, branch, alpha=self.pull)\n"
             "        return x + old, v"),
    Mutation("x moves backwards", "rule/base.py", "return x + v, v", "return x - v, v"),
    Mutation("retreat adds the branch", "rule/base.py", "torch.sub(v, branch, alpha=self.pull)",
             "torch.add(v, branch, alpha=self.pull)"),
    Mutation("x_before is x'", "rule/base.py", "return x - v\n", "return x\n"),
    Mutation(
        "the state that a chain begins with is written over",
        "run/tape.py",
        "over = index > self.first and setting.apart(x, self.dtype)",
        "over = setting.apart(x, self.dtype)",
        first="tests/run/test_written_over.py",
    ),
    Mutation(
        "kept states are written over in backward",
        "run/closing.py",
        "index not in self.left.setting.plan.snapshots and self.left.setting.apart(x, read)",
        "self.left.setting.apart(x, read)",
        first="tests/run/test_written_over.py",
    ),
    Mutation(
        "a tail in half precision stays in it",
        "run/uninverted/stored.py",
        "own = x.dtype if plain else torch.promote_types(dtype, torch.float32)",
        "own = x.dtype if plain else dtype",
        first="tests/run/test_tail.py",
    ),
    Mutation(
        "gamma is a constant of what was compiled inside of a transform",
        "compile/inside.py",
        "if whole and not export:",
        "if export:",
        first="tests/compile/test_inside.py",
    ),
    Mutation(
        "only the second run of a followed block is eager",
        "run/reversible.py",
        "with followed or contextlib.nullcontext(), rerun.watch.stance():",
        "with followed or contextlib.nullcontext():",
        first="tests/rewrite/test_regional.py",
    ),
    Mutation("scale of the branch lost in backward", "rule/step.py",
             "_like(step.rule.pull * step.scale, grad_x, grad_v)",
             "_like(step.rule.pull, grad_x, grad_v)"),
    Mutation("gradient of a wrapped block's own x lost", "rule/step.py",
             "else grad_x - value), velocity", "else grad_x), velocity"),
    Mutation("a wrapped block taken for a residual one", "rule/step.py",
             "    if step.wrapped:\n        return value - x\n", ""),
    Mutation("what a join gave is not taken away again", "run/beside/scout.py",
             "return grad if given is None else added(grad, -given)", "return grad",
             "tests/run/beside/test_joining.py"),
    Mutation("a value read by a later step misses that", "run/beside/scout.py",
             "self._read |= {} if total is None else {key: total}", "pass", "tests/run/beside/test_joining.py"),
    Mutation("what retains its gradient is not watched", "run/beside/joining.py",
             "(value.retains_grad or not will_run(_PROBE))", "not will_run(_PROBE)",
             "tests/run/beside/test_joining.py"),
    Mutation("a backward with inputs is taken for any", "run/beside/joining.py",
             "(value.retains_grad or not will_run(_PROBE))", "value.retains_grad", "tests/run/beside/test_joining.py"),
    Mutation("a branch's input is seen without its add", "run/beside/scout.py",
             "if value is visited.opened.entry:", "if False:", "tests/run/test_watched.py"),
    Mutation("a value seen too late is let pass", "run/beside/scout.py",
             "if key in self._unseen and", "if False and", "tests/run/test_watched.py"),
    Mutation("velocity carried into the next chain", "run/reversible.py",
             "    how, v = carry(chain.steps, plan), start.velocity\n",
             "    how, v = carry(chain.steps, plan), start.velocity\n"
             "    left, run.left = getattr(run, 'left', None), x.detach() * 0.01\n"
             "    if v is None and chain.index and left is not None and left.shape == x.shape:\n"
             "        v = left\n"),
    Mutation("gradient of v_0 lost", "run/reversible.py", "own_v if ctx.needs_input_grad[6] else None", "None"),
    # Linked chains
    Mutation("a linked chain begins anew", "run/linked/joint.py",
             "return ended if same else None", "return None", "tests/models/test_linked.py"),
    Mutation("a changed value goes on from what it was", "run/linked/joint.py",
             "else stamp == x._version", "else True", "tests/models/test_linked.py"),
    Mutation("a linked chain counts its steps from 0", "run/linked/joint.py",
             "reached = before.reached if before is not None and goes_on else Reached()", "reached = Reached()",
             "tests/models/test_linked.py"),
    Mutation("the state between chains is not given back", "run/closing.py",
             "            self.left.back((x, v), self.zeros)", "            pass", "tests/models/test_linked.py"),
    Mutation("a state that was handed on is kept as well", "run/linked/handover.py",
             "        self.takers.append(taker)\n        self.give(None)", "        self.takers.append(taker)",
             "tests/models/test_linked.py"),
    Mutation("what was drawn stays drawn where values are not finite", "model/linked/deciding.py",
             "                    place.set_rng_state(state)", "                    pass",
             "tests/models/test_linked.py"),
    # Which blocks, in which chains
    Mutation("the inner blocks on a tie", "plan/level.py", "(-len(block.nodes), place", "(len(block.nodes), place",
             "tests/plan"),
    Mutation("the last matching gamma wins", "options/gammas.py", "for pattern, value in gamma if",
             "for pattern, value in reversed(gamma) if", "tests/plan"),
    Mutation("every block a chain of its own", "plan/order.py", "open_runs.pop(block.skip, None)", "None",
             "tests/plan"),
    Mutation("what follows an add left outside", "find/tail.py", "            if tail:\n", "            if False:\n",
             "tests/find"),
    # The recording
    Mutation("the tracer takes += for +", "capture/tracer.py", '"iadd isub', '"isub', "tests/capture/test_tracer.py"),
    Mutation("writes that nobody reads dropped", "graph/splice.py", " or writes(node, root)) and", ") and",
             "tests/capture/test_calls.py"),
    Mutation("guards not checked", "capture/symbolic.py", "self.form.fits(call) and self.guards.hold(root)",
             "self.form.fits(call)", "tests/capture/test_calls.py"),
    Mutation("the grad mode of a capture not checked", "capture/symbolic.py",
             "self.modes == Modes.current() and self.form", "self.form", "tests/capture/test_calls.py"),
    # The proof
    Mutation("a capture taken for proven", "model/state.py",
             "proven = prove(root, self.function, entry.captured, call)", "proven = True",
             "tests/capture/test_proof.py"),
    Mutation("the proof passes by modes", "capture/proof.py",
             "mine.modes) == (theirs.name, theirs.results, theirs.modes)", "0) == (theirs.name, theirs.results, 0)",
             "tests/capture/test_proof.py"),
    Mutation("the proof passes by operands", "capture/proof.py",
             " and all(map(_same, mine.operands, theirs.operands))", "", "tests/capture/test_proof.py"),
    Mutation("the proof passes by outputs", "capture/proof.py", "        if not _same(mine, theirs):\n",
             "        if False:\n", "tests/capture/test_proof.py"),
    Mutation("a size that depends on values taken for another", "find/check.py",
             "a == b or isinstance(a, str) or isinstance(b, str)", "a == b", "tests/models/test_ragged.py"),
    # The recomputation
    Mutation("generator not rewound", "run/recompute.py",
             "with setting.autocast(), self.conditions.rewound():", "with setting.autocast():",
             "tests/run/test_recompute.py"),
    Mutation("generator left where the recomputation ends", "run/conditions.py",
             "            yield\n        finally:\n            _set_generator_states(self.device, now)",
             "            yield\n        finally:\n            pass", "tests/run/test_recompute.py"),
    Mutation("buffers not put back", "run/conditions.py", "module._buffers[name] = value.clone()", "pass",
             "tests/run/test_recompute.py"),
    Mutation("batch norm twice", "run/conditions.py", "if flag and _runs_without_buffers(module):", "if False:",
             "tests/run/test_recompute.py"),
    Mutation("autocast lost", "run/recompute.py", "with setting.autocast(), self.conditions", "with self.conditions",
             "tests/run/test_mixed_precision.py"),
    Mutation("training flags as they are now", "run/conditions.py",
             "                    module.training = flag\n                if flag",
             "                    pass\n                if flag", "tests/run/test_recompute.py"),
    Mutation("changed buffers unnoticed", "run/conditions.py", "or buffer._version != version:\n                raise",
             "and False:\n                raise", "tests/run/test_refused_backward.py"),
    Mutation("moved parameters unnoticed", "run/operands.py", "and one != other:", "and False:",
             "tests/run/test_refused_backward.py"),
    Mutation("the branch's value held while it is differentiated", "run/recompute.py",
             "            del values, grad, grad_extra\n", "", "tests/models/test_peaks.py"),
    Mutation("a frozen prefix inverted", "run/closing.py", "index != left.first or left.back", "index > 0 or left.back",
             "tests/models/test_peaks.py"),
    Mutation("joined steps read the state of another", "run/uninverted/together.py",
             "State(side.step - group.start)", "State(side.step - group.start + 1)",
             "tests/run/uninverted/test_together.py"),
    Mutation("joined steps draw again", "run/uninverted/together.py", "any(step.draws for step in steps)", "False",
             "tests/run/uninverted/test_together.py"),
    Mutation("gradient of escapes dropped", "run/recompute.py",
             "_gradients(ends, leaves", "_gradients(ends[:1], leaves"),
    Mutation("gradient of escapes dropped where the chain ends", "run/closing.py",
             "return None, None, None, None, grad_x, grad_v, None, *ctx.slot.corrected(others)",
             "return None, None, None, None, grad_x, grad_v, None, *[None for _ in others]"),
    Mutation("snapshot of the state after its step", "run/tape.py",
             "        self.state = x, v = setting.carry.advance(index, x, v, value)\n",
             "        self.state = x, v = setting.carry.advance(index, x, v, value)\n"
             "        if index in self.snapshots:\n"
             "            self.snapshots[index] = (x, v if setting.plan.keeps_velocity(index) else None)\n",
             "tests/run/test_reversible.py"),
    Mutation("exact arithmetic does not round", "rule/arithmetic/carry.py",
             "return (x.mul_(factor) if own else x * factor).add_(rounder).sub_(rounder)",
             "return x.mul_(factor) if own else x * factor", "tests/rule"),
    Mutation("double backward not refused", "run/closing.py", "if torch.is_grad_enabled():", "if False:",
             "tests/run/test_refused_backward.py"),
)  # fmt: skip


def mutated(source: str, mutation: Mutation) -> str:
    """The text of a file with the mutation in it."""
    found = source.count(mutation.old)
    if found != 1:
        raise SystemExit(f"{mutation.name}: its text is {found} times in {mutation.file}, not once:\n{mutation.old}")
    return source.replace(mutation.old, mutation.new)


def noticed(mutation: Mutation | None) -> tuple[str, float]:
    """The first test that fails (empty where none does), and the seconds until then."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("mfx", "tests", "pyproject.toml"):
            source = ROOT / name
            ignored = shutil.ignore_patterns("__pycache__")
            _ = shutil.copytree(source, copy / name, ignore=ignored) if source.is_dir() else shutil.copy(source, copy)
        if mutation is not None:
            file = copy / "mfx" / mutation.file
            file.write_text(mutated(file.read_text(encoding="utf-8"), mutation), encoding="utf-8")
        test = ""
        # One after the other: pytest would merge a file into its folder.
        for tests in ([mutation.first] if mutation is not None and mutation.first else [], TESTS):
            test = test or (_first_failure(copy, tests) if tests else "")
    return test, time.monotonic() - start


def _first_failure(copy: Path, tests: Sequence[str]) -> str:
    options = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow", "--tb=no", "-rfE"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "HYPOTHESIS_PROFILE": "mutations"},
        capture_output=True,
        text=True,
        check=False,
    )
    test = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - |$)", ended.stdout, re.MULTILINE)
    if (ended.returncode, test is None) not in ((0, True), (1, False)):
        raise SystemExit(f"pytest ended with {ended.returncode}\n{ended.stdout}\n{ended.stderr}")
    return "" if test is None else test[1]


def main() -> int:
    """Run the mutations that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-j", "--jobs", type=int, default=2)
    parser.add_argument("words", nargs="*")
    given = parser.parse_args()
    for each in MUTATIONS:
        mutated((ROOT / "mfx" / each.file).read_text(encoding="utf-8"), each)
    chosen = [each for each in MUTATIONS if not given.words or any(word in each.name for word in given.words)]
    broken, _ = noticed(None)
    if broken:
        raise SystemExit(f"without any mutation {broken} fails")
    print("| mutation | file | first test that noticed | s |\n| --- | --- | --- | --- |", flush=True)
    missed = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        for each, (test, seconds) in zip(chosen, pool.map(noticed, chosen), strict=True):
            missed += not test
            print(f"| {each.name} | {each.file} | {test or '**none**'} | {seconds:.0f} |", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main())
