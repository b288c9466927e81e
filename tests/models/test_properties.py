"""What must hold for any residual model, on models that Hypothesis makes up.

At gamma 0 the original model judges, elsewhere the :class:`oracle.Oracle`, which knows descriptions and nothing of mfx.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from described import Called, build, inputs, packed, set_mode, tie, untie
from helpers import Result, assert_same, chain_names, kept_bytes, run
from hypothesis import event, given, note, reject, settings
from hypothesis import strategies as st
from oracle import Oracle
from strategies import Block, Model, Stage, blocks, gammas, models, unusual_models
from torch import fx, nn

import mfx
from mfx.model.parts import parts_of


class Learned(nn.Module):
    """A velocity with one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x):
        return torch.tanh(x) * self.scale


fewer = settings(max_examples=settings.default.max_examples // 3)
few = settings(max_examples=settings.default.max_examples // 5)
"""For what plans several times a model."""
velocities = st.sampled_from(("zero", "first", lambda chain: Learned()))


TOLERANCE = 1e-13
"""What reversing may make of errors, planned for branches that amplify nothing; norms of narrow rows amplify a lot."""


def momentumized(network: nn.Module, model: Model, **options) -> nn.Module:
    """The momentum model, where nothing to rewrite is as good as something."""
    if model.example:
        options.setdefault("example_inputs", inputs(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mfx.NothingRewrittenWarning)
        mm = mfx.momentumize(network, **options)
    for graph in graphs(mm):
        note(graph.python_code("self").src)
    return mm


def graphs(mm: nn.Module) -> list[fx.Graph]:
    """The rewritten graph of each captured part."""
    return [part.entries[-1].passed.rewritten.graph for part in parts_of(mm).values() if part.entries]


def run_if_possible(network: nn.Module, model: Model) -> Result:
    """The result; what autograd itself refuses (an in-place write too many) is no example."""
    try:
        return run(network, *inputs(model))
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error) and "used in an in-place" not in str(error):
            raise
        reject()


@given(models())
def test_gamma_0_is_the_original_model_in_both_modes_whichever_was_captured(model):  # M1, M5
    network = build(model)
    run_if_possible(network, model)
    mm = momentumized(network, model, gamma=0.0)
    for training in (model.training, not model.training):
        set_mode(network, model, training)
        set_mode(mm, model, training)
        expected = run_if_possible(network, model)
        assert_same(run(mm, *inputs(model)), expected, 1e-10)


@given(models(), gammas(), velocities)
def test_both_runs_are_the_recurrence_of_the_described_model(model, gamma, velocity):  # M2, M5, M6
    network = build(model)
    run_if_possible(network, model)
    try:
        reversible = momentumized(network, model, gamma=gamma, velocity=velocity, tolerance=TOLERANCE)
    except mfx.OptionError:  # no block of that name
        reject()
    oracle = Oracle(model, network, gamma, velocity)
    assert (chain_names(reversible) or ()) == oracle.chains
    expected = run_if_possible(oracle, model)
    stored = momentumized(network, model, gamma=gamma, velocity=velocity, reversible=False)
    assert_same(run_if_possible(stored, model), expected, 1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mfx.DriftWarning)  # judged here by more than that
        # A learned velocity asks for gradients in branches that the original may never have differentiated.
        found = run_if_possible(reversible, model) if callable(velocity) else run(reversible, *inputs(model))
    assert_same(found, expected, 1e-9)


@fewer
@given(unusual_models())
def test_what_a_capture_may_lose_is_right_at_gamma_0_or_refused(model):  # M1, M8, M12
    network = build(model)
    original, first = Called(network, model), inputs(model, seed=2)
    run_if_possible(original, model)
    options = {"example_inputs": packed(model, *first)} if model.example else {}
    try:
        mm = Called(momentumized(network, model, gamma=0.0, **options), model)
        run(mm, *first)  # with values of its own: what was frozen in would show below
        if model.tied == "after":
            tie(network)
        elif model.tied == "untied after":
            untie(network)
        found = run(mm, *inputs(model))
    except (mfx.MfxError, mfx.MfxWarning) as said:
        event(type(said).__name__)
        return
    # Islands in bfloat16 round, and a weight that two of them share is cast once by the one and twice by the other.
    assert_same(found, run(original, *inputs(model)), 1e-10 if model.precision == "double" else 1e-2)


@fewer
@given(models())
def test_side_effects_happen_once_and_no_parameter_is_lost(model):  # M5
    network = build(model)
    plain = run_if_possible(network, model)
    momentum = run(momentumized(network, model, gamma=0.7), *inputs(model))
    assert torch.equal(torch.get_rng_state(), momentum.generator_state), "backward left the generator elsewhere"
    assert torch.equal(momentum.generator_state, plain.generator_state)
    counts = {name: count for name, count in plain.buffers.items() if name.endswith("num_batches_tracked")}
    assert all(torch.equal(momentum.buffers[name], count) for name, count in counts.items())
    assert {n for n, grad in momentum.grads.items() if grad is None} == {
        n for n, grad in plain.grads.items() if grad is None
    }


@fewer
@given(models(), gammas())
def test_what_the_report_lists_is_rewritten_each_chain_into_one_node(model, gamma):
    network = build(model)
    try:
        mm = momentumized(network, model, gamma=gamma)
    except mfx.OptionError:
        reject()
    chains, nodes = chain_names(mm), []
    for graph in graphs(mm):
        graph.lint()
        nodes += [node for node in graph.nodes if node.op == "call_function" and node.name.startswith("momentum_")]
    assert sorted(node.target.__name__ for node in nodes) == sorted(f"momentum_{k}" for k in range(len(chains)))
    report = mfx.report(network, inputs(model) if model.example else None, gamma=gamma)
    assert sorted(report.rewritable) == sorted(name for chain in chains for name in chain)
    assert {row.name for row in report.blocks if row.status == "kept"} == Oracle(model, network, gamma).kept


def constant(block: Block) -> Block:
    """The block, without what makes each one hand something out."""
    return replace(block, again=False, tap="", returned="", side="" if block.side == "earlier state" else block.side)


@fewer
@given(blocks(0).map(constant), st.booleans())
def test_the_bytes_kept_do_not_grow_with_depth(block, training):  # M3
    kept = []
    for depth in (6, 96):
        model = Model((Stage((block,) * depth),), training=training)
        network = build(model)
        run_if_possible(network, model)
        mm = momentumized(network, model, gamma=0.9)
        assert [len(chain) for chain in chain_names(mm)] == [depth]
        kept.append(kept_bytes(mm, *inputs(model)))
    assert kept[0] == kept[1]


def test_the_simplest_model_is_one_block():
    model = Model((Stage((Block(),)),))
    assert chain_names(mfx.momentumize(build(model))) == (("stages.0.blocks.0",),)


@few
@given(models(), st.floats(0, 1))
def test_any_budget_is_the_original_model_at_gamma_0_in_both_modes(model, share):  # M1, M5, M6
    model = replace(model, shapes=True)
    network = build(model)
    run_if_possible(network, model)
    for budget in (0.0, share):
        mm = momentumized(network, model, gamma=0.0, activation_budget=budget)
        for training in (not model.training, model.training):
            set_mode(network, model, training)
            set_mode(mm, model, training)
            expected = run_if_possible(network, model)
            assert_same(run(mm, *inputs(model)), expected, 1e-10)


@few
@given(models(), gammas(), st.floats(0, 1))
def test_any_budget_is_the_recurrence_of_the_described_model(model, gamma, share):  # M2, M5, M6
    model = replace(model, shapes=True)
    network = build(model)
    run_if_possible(network, model)
    for budget in (0.0, share):
        try:
            mm = momentumized(network, model, gamma=gamma, tolerance=TOLERANCE, activation_budget=budget)
        except mfx.OptionError:  # no block of that name
            reject()
        expected = run_if_possible(Oracle(model, network, gamma, "zero"), model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mfx.DriftWarning)
            assert_same(run(mm, *inputs(model)), expected, 1e-9)


@few
@given(models(), gammas())
def test_where_the_state_is_finer_than_the_model_both_runs_compute_the_same_bits(model, gamma):  # M2
    """Then it is carried exactly, and written over where nobody else has it."""
    model = replace(model, precision="single", shapes=True)
    network = build(model)
    expected, found = run_if_possible(network, model), []
    for reversible in (True, False):
        try:
            mm = momentumized(network, model, gamma=gamma, state_dtype=torch.float64, reversible=reversible)
        except mfx.OptionError:  # no block of that name
            reject()
        found.append(run(mm, *inputs(model)).outputs)
    assert found[0].keys() == found[1].keys() == expected.outputs.keys()
    for name, value in found[0].items():
        assert torch.equal(value.nan_to_num(), found[1][name].nan_to_num()), name
