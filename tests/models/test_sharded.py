"""Two processes: FSDP2 by block, and tensor and sequence parallelism, beside one process and beside a checkpoint."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from helpers import relative_error
from recurrence import ByHand, NetByHand
from sharded import (
    batch,
    body_of_layers,
    collectives,
    compiled_gradients,
    fresh,
    in_two_processes,
    losses,
    most_alive,
    parallel,
    sharded_losses,
    tokens,
)

pytestmark = pytest.mark.slow
ORDERS = ("before", "after")


def test_sharded_by_block_two_processes_train_as_one(tmp_path):
    cases = [(order, gamma) for order in ORDERS for gamma in (0.0, 0.9)]
    for (_, gamma), found in zip(cases, in_two_processes(sharded_losses, tmp_path, cases), strict=True):
        expected = losses(NetByHand(fresh(depth=5), gamma))
        assert expected[-1] < 0.5 * expected[0]
        assert relative_error([(a + b) / 2 for a, b in zip(*found, strict=True)], expected) < 1e-6


def test_parameters_are_gathered_and_gradients_reduced_as_often_as_with_a_checkpoint(tmp_path):
    ways = ("checkpoint", "before 0.9", "after 0.9", "before 0.0")
    cases = [(way, reshard) for reshard in (True, False) for way in ways]
    units = 6  # five blocks and the root, which is gathered once more in backward where it was asked to be freed
    for (way, reshard), found in zip(cases, in_two_processes(collectives, tmp_path, cases), strict=True):
        expected = 2 * [(units, units if reshard else 0, units)]
        assert list(found) == [expected, expected], way


def test_one_block_is_gathered_at_a_time(tmp_path):
    ways = ("checkpoint", *ORDERS, "root")
    found = in_two_processes(most_alive, tmp_path, [(way,) for way in ways])
    peaks = {way: max(both) for way, both in zip(ways, found, strict=True)}
    # Weights are most of what is alive here: of eight blocks, two and their gradients.
    assert max(peaks["before"], peaks["after"]) < 1.1 * peaks["checkpoint"]
    assert max(peaks["before"], peaks["after"]) < 0.5 * peaks["root"]


def test_blocks_compiled_in_place_and_whole_models_sharded_as_one_have_their_gradients(tmp_path):
    net, (x, y) = NetByHand(fresh(), 0.9), batch()
    (net(x) - y).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in net.named_parameters()}
    by_block = list(permutations(("momentumize", "shard", "compile blocks")))
    as_one = [(*ways, "compile") for ways in permutations(("momentumize", "shard the root"))]
    cases = [(", ".join(ways),) for ways in (*by_block, *as_one)]
    for (ways,), found in zip(cases, in_two_processes(compiled_gradients, tmp_path, cases), strict=True):
        assert max(relative_error(grads, expected) for grads in found) < 1e-10, ways


def test_tensor_and_sequence_parallel_layers_have_their_gradients(tmp_path):
    body, x = body_of_layers(), tokens().requires_grad_()
    ByHand(body, 0.9)(x).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in body.named_parameters()}
    hows = ((False, None), (True, None), (True, "?"))
    cases = [(order, sequence, modules) for order in ORDERS for sequence, modules in hows]
    for (_, sequence, _), found in zip(cases, in_two_processes(parallel, tmp_path, cases), strict=True):
        given = [grads.pop("x") for grads in found]
        assert relative_error(torch.cat(given, 1) if sequence else given[0], x.grad) < 1e-10
        assert all(relative_error(grads, expected) < 1e-10 for grads in found)
