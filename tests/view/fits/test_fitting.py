"""fit: the size that is found, against reports of that size and the next, and against the allocator."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from nets import Block, Net
from peaks import allocated_peak
from torch import nn

import mfx


class Words(nn.Module):
    """Token and position embeddings, blocks, a loss against labels; at most 64 tokens."""

    def __init__(self, width=32, depth=4):
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, width), nn.Parameter(torch.randn(1, 64, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, 50)

    def forward(self, ids, labels, scale=None):
        x = self.blocks(self.tokens(ids) + self.places[:, : ids.shape[1]])
        x = x if scale is None else x * scale
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def words(batch=3, length=16):
    ids = torch.randint(0, 50, (batch, length))
    return {"ids": ids, "labels": ids.clone(), "scale": torch.ones(32)}


class Stack(nn.Module):
    def __init__(self, width=128, depth=6):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, width)

    def forward(self, x):
        return self.head(self.blocks(x))


@pytest.mark.parametrize("budget", [None, 0.0, 0.5, 1.0, "1 MB"])
def test_the_size_fits_and_the_next_does_not_as_reports_of_them_say(budget):
    memory = 8_000_000
    found = mfx.fit(Stack(), torch.empty(2, 128, device="meta"), memory, optimizer="adam", activation_budget=budget)
    options = {"optimizer": "adam", "activation_budget": budget}
    here = mfx.report(Stack(), torch.empty(found.size, 128, device="meta"), **options).step
    assert found.bytes == here.total <= memory
    assert (found.step.parameters, found.step.optimizer_state) == (here.parameters, here.optimizer_state)
    beyond = torch.empty(found.size + 1, 128, device="meta")
    if budget == "1 MB":
        assert found.next_bytes is None
        assert "activation_budget=976.6 KiB is less than is possible" in found.limit
        with pytest.raises(mfx.OptionError, match="less than is possible"):
            mfx.report(Stack(), beyond, **options)
    else:
        assert found.next_bytes == mfx.report(Stack(), beyond, **options).step.total > memory
    assert json.loads(json.dumps(found.to_dict()))["size"] == found.size


def test_smaller_budgets_fit_more():
    found = [
        mfx.fit(Stack(depth=12), torch.empty(2, 128, device="meta"), "30MB", activation_budget=budget).size
        for budget in (1.0, 0.5, 0.0)
    ]
    assert found[0] < found[1] <= found[2]
    assert found[2] > 1.5 * found[0]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_real_training_at_that_size_needs_what_was_foreseen(kind):
    memory = 30_000_000
    found = mfx.fit(Stack(), torch.empty(2, 128, device="meta"), memory, optimizer=kind)

    def training():
        mm, x = mfx.momentumize(Stack()), torch.randn(found.size, 128)
        optimizer = kind(mm.parameters(), lr=1e-6)
        for _ in range(3):
            optimizer.zero_grad()
            output = mm(x)
            (output * 1).sum().backward()
            optimizer.step()

    assert allocated_peak(training) == pytest.approx(memory, rel=0.05)
    assert found.bytes == pytest.approx(memory, rel=0.01)


def test_a_sequence_is_as_long_as_the_model_allows():
    found = mfx.fit(Words(), words(), "1GB", dim=1)
    assert found.size == 64
    assert found.next_bytes is None
    assert "the model takes no size of 65" in found.limit
    assert "the model takes no size of 65" in str(found)
    shorter = mfx.fit(Words(), words(), found.bytes - 1, dim=1)
    assert (shorter.size, shorter.next_bytes) == (63, found.bytes)


def test_inputs_vary_together_and_what_is_as_long_by_another_name_does_not():
    found = mfx.fit(Words(), words(), "20MB", dim=0)
    again = mfx.report(Words(), words(found.size)).step
    assert (found.bytes, found.step.inputs) == (again.total, again.inputs)
    same = mfx.fit(Words(), {key: value.to("meta") for key, value in words().items()}, "20MB", dim=-2)
    assert same.size == found.size


def test_what_dynamo_captures_can_be_fitted():
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    found = mfx.fit(model, torch.randn(2, 8, 32), "20MB", optimizer="sgd")
    assert found.bytes <= 20_000_000 < found.next_bytes
    assert found.bytes == mfx.report(model, torch.empty(found.size, 8, 32), optimizer="sgd").step.total


def test_nothing_is_allocated_for_inputs_and_nothing_changes():
    model, x = Stack(), torch.randn(2, 128)
    model(x).sum().backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    gradients, generator = [parameter.grad for parameter in model.parameters()], torch.get_rng_state()
    found = []
    spent = allocated_peak(lambda: found.append(mfx.fit(model, x, "4TB")))
    assert found[0].step.inputs > 10**10
    assert spent < 10**6
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(grad is parameter.grad for grad, parameter in zip(gradients, model.parameters(), strict=True))
    assert found[0].measured is None


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(8), Block(8))

    def forward(self, x):
        return self.blocks(x.reshape(4, 3, 8))


class Small(nn.Module):
    """Takes eight rows at most, and not one alone."""

    def __init__(self):
        super().__init__()
        self.norm, self.blocks = nn.BatchNorm1d(128), Stack()
        self.table = nn.Parameter(torch.zeros(8, 128))

    def forward(self, x):
        return self.blocks(self.norm(x) + self.table[: x.shape[0]])


def test_a_model_of_one_size_is_refused():
    with pytest.raises(mfx.OptionError, match=r"dim=0 of the inputs of Fixed cannot vary: it is 4 .*Name another"):
        mfx.fit(Fixed(), torch.randn(4, 3, 8), "1GB")
    assert mfx.fit(Small(), torch.randn(4, 128), "1GB").size == 8


def test_too_little_memory_says_the_least():
    for start in (1, 16):
        x = torch.empty(start, 128, device="meta")
        least = mfx.report(Stack(), torch.empty(1, 128, device="meta"), optimizer="adam").step.total
        with pytest.raises(mfx.OptionError, match=rf"memory=1000\.0 KiB is too little: a step of size 1 .*{least} byt"):
            mfx.fit(Stack(), x, 1024_000, optimizer="adam")
        assert mfx.fit(Stack(), x, least, optimizer="adam").size == 1
    # One row alone is no batch for batch norm.
    with pytest.raises(mfx.OptionError, match=r"a step of size 2 in dimension 0 needs"):
        mfx.fit(Small(), torch.empty(4, 128, device="meta"), 1024_000)
    with pytest.raises(mfx.OptionError, match=r"activation_budget=10 B is less than is possible"):
        mfx.fit(Stack(), x, "1GB", activation_budget=10)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"memory": "8 apples"}, mfx.OptionError, r"memory='8 apples' cannot be read: give bytes \(an int\)"),
        ({"memory": -1}, mfx.OptionError, "memory=-1 is negative"),
        ({"memory": 0.5}, mfx.InputTypeError, "memory=0.5 is a float: give bytes"),
        ({"memory": True}, mfx.InputTypeError, "memory=True is a bool"),
        ({"dim": 2}, mfx.OptionError, r"dim=2: no input has that dimension.*\(5, 4\)"),
        ({"dim": -3}, mfx.OptionError, "dim=-3: no input has that dimension"),
        ({"dim": "batch"}, mfx.InputTypeError, "dim='batch' is a str"),
        ({"example_inputs": torch.empty(0, 4)}, mfx.OptionError, "empty there"),
        ({"example_inputs": ()}, mfx.OptionError, "received no tensor"),
        ({"example_inputs": torch.empty(5, 3)}, mfx.InputTypeError, "do not fit the model"),
        ({"optimizer": "adamm"}, mfx.OptionError, "optimizer='adamm'"),
        ({"activation_budget": 2.0}, mfx.OptionError, "activation_budget=2.0"),
        ({"gamma": 1.5}, mfx.OptionError, "gamma=1.5"),
        ({"model": 3}, mfx.InputTypeError, "model must be"),
    ],
)
def test_what_cannot_be_asked_is_refused(change, error, message):
    given = {"model": Net(), "example_inputs": torch.randn(5, 4).double(), "memory": "1GB", **change}
    with pytest.raises(error, match=message):
        mfx.fit(**given)


SCRIPT = """
import torch, torchvision
from peaks import allocated_peak
import mfx

memory = 1_500_000_000
def make():
    return torchvision.models.vit_b_16(image_size=64)
given = {{"activation_budget": {budget}, "gamma": {gamma}}}
with torch.random.fork_rng():
    found = mfx.fit(make(), torch.empty(4, 3, 64, 64, device="meta"), memory, optimizer="adamw", **given)

def training():
    x = torch.randn(found.size, 3, 64, 64)
    mm = mfx.momentumize(make(), example_inputs=x, **given)
    optimizer = torch.optim.AdamW(mm.parameters(), lr=1e-6)
    for _ in range(2):
        optimizer.zero_grad()
        output = mm(x)
        (output * 1).sum().backward()
        optimizer.step()

print(found.size, found.bytes, allocated_peak(training))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "gamma"), [(None, 0.9), (0.0, 0.0)])
def test_a_vision_transformer_in_a_process_of_its_own_needs_what_was_foreseen(budget, gamma):
    script = SCRIPT.format(budget=budget, gamma=gamma)
    path = ":".join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env={"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    size, foreseen, needed = map(int, done.stdout.split())
    assert size > 1
    assert needed == pytest.approx(foreseen, rel=0.1)
