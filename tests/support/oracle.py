"""Oracle: the momentum network of a described model, in plain autograd code, to judge mfx by.

From the description alone, by the rules of what a block is, and without anything of the package under test:

1. each add of two operations, one of which is computed from the other (looking through what does nothing), is a
   residual block, unless an in-place write in it would be seen by others;
2. what follows the add belongs to it (``F(x) = h(x + f(x)) - x``) where it is applied to the sum step by step, keeps
   the shape, is read by nobody else and uses nothing newer than x, if (a) another block starts after it, (b) the add's
   own module returns it or (c) it repeats what followed the block before;
3. of blocks that share operations the one in the longer chain counts, the outer one on a tie; a chain goes on with the
   outermost block that starts at its end, and not with those inside of that;
4. consecutive blocks are a chain, with one velocity.

The program then runs in order; where a block ends, in the place of its add or of its last operation,

    v <- gamma v + (1 - gamma) F(x)
    x <- x + v

Reference: Sander et al., ICML 2021, arXiv 2102.07870, equation (5).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from program import Op, Program
from strategies import Model
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Found:
    """A block from ``skip`` to ``end``; ``value`` is the end of the branch, ``tail`` the add and what belongs to it."""

    skip: Op
    value: Op
    add: Op
    tail: tuple[Op, ...]
    inside: frozenset[Op]

    @property
    def end(self) -> Op:
        return self.tail[-1] if self.tail else self.add


class Oracle:
    """The momentum network; runs and is asked for tensors as a module is.

    Args:
        model: the description.
        network: the network built of it, for its parameters and buffers; its modules are not run.
        gamma: one for all blocks, or by patterns of names.
        velocity: v_0 of each chain: ``"zero"``, ``"first"``, or a factory of modules.
    """

    def __init__(
        self,
        model: Model,
        network: nn.Module,
        gamma: float | Mapping[str, float],
        velocity: str | Callable[[Any], nn.Module] = "zero",
    ) -> None:
        self.network = network
        self.model = model
        self.training = model.training
        tensors = dict(network.named_parameters(remove_duplicate=False))
        tensors |= dict(network.named_buffers(remove_duplicate=False))
        self.program = Program(model, tensors, lambda: (self.training and not model.frozen_norms, self.training))
        rules = Rules(self.program, model.example)
        patterns = gamma.items() if isinstance(gamma, Mapping) else [("*", gamma)]
        self.gammas = {
            found: value
            for found, name in rules.names.items()
            if (value := next((g for pattern, g in patterns if fnmatchcase(name, pattern)), None)) is not None
        }
        blocks = rules.chains(list(self.gammas))
        self.chains = tuple(tuple(rules.names[found] for found in chain) for chain in blocks)
        self.kept = rules.kept | {name for found, name in rules.names.items()} - {n for c in self.chains for n in c}
        self.ends = {found.end: (found, index) for index, chain in enumerate(blocks) for found in chain}
        self.tails = {op for found in self.ends.values() for op in found[0].tail[:-1]}
        self.first = velocity == "first"
        learned = {f"momentum_velocity.{i}": velocity("") for i in range(len(blocks)) if callable(velocity)}
        self.velocities = list(learned.values())
        self._added = {f"{path}.{n}": p for path, each in learned.items() for n, p in each.named_parameters()}

    def parameters(self) -> Iterator[nn.Parameter]:
        yield from dict(self.named_parameters()).values()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.network.named_parameters()
        yield from self._added.items()

    def buffers(self) -> Iterator[Tensor]:
        yield from self.network.buffers()

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.network.named_buffers()

    def __call__(self, *inputs: Tensor) -> Any:
        values: dict[Op, Tensor] = dict(zip(self.program.inputs, inputs, strict=True))
        velocity: dict[int, Tensor] = {}
        for op in self.program.ops[len(inputs) :]:
            block = self.ends.get(op)
            if block is None or block[0].tail:
                given = [values[source] for source in op.inputs]
                if op.writes and (block is not None or op in self.tails):
                    given[0] = given[0].clone()  # x is needed as it was, and the old sum by nobody
                values[op] = op.run(*given)
            if block is not None:
                values[op], velocity[block[1]] = self._step(*block, values, velocity.get(block[1]))
        return values[self.program.result], [values[op] for op in self.program.handed_out]

    def _step(self, found: Found, chain: int, values: Mapping[Op, Tensor], v: Tensor | None) -> tuple[Tensor, Tensor]:
        x, gamma = values[found.skip], self.gammas[found]
        if found.tail:
            branch = values[found.end] - x
        else:
            branch = values[found.value] * (found.add.scale if found.value is found.add.inputs[1] else 1.0)
        if v is None and self.first:
            v = branch
        elif v is None and self.velocities:
            v = self.velocities[chain](x)
        # A velocity that nothing is left of has no gradient, rather than one of zeros.
        v = (1 - gamma) * branch if v is None or gamma == 0 else gamma * v + (1 - gamma) * branch
        return x + v, v


class Rules:
    """The blocks of a program, by name; ``shapes`` says whether those of all values are known."""

    def __init__(self, program: Program, shapes: bool) -> None:
        self.program = program
        self.shapes = shapes
        self.above: dict[Op, set[Op]] = {}
        self.memory: dict[Op, Op] = {}
        self.readers: dict[Op, list[Op]] = {op: [] for op in program.ops}
        for op in program.ops:
            self.above[op] = set(op.inputs).union(*(self.above[source] for source in op.inputs))
            self.memory[op] = self.memory[op.inputs[0]] if op.writes or op.passes or op.may_pass else op
            for source in set(op.inputs):
                self.readers[source].append(op)
        self.outside = {*program.handed_out, program.result}
        adds = [op for op in program.ops if op.adds]
        found = self._with_tails([each for op in adds if (each := self._residual(op)) is not None])
        total, seen, named = Counter(op.call.path for op in adds), Counter[str](), dict[Op, str]()
        for op in adds:
            path = op.call.path
            named[op] = f"{path}#{seen[path]}" if total[path] > 1 else path
            seen[path] += 1
        self.names = {each: named[each.add] for each in found}
        self.kept = set(named.values()) - set(self.names.values())

    def chains(self, blocks: list[Found]) -> list[list[Found]]:
        """Those of ``blocks`` that are rewritten, in chains."""
        chains: list[list[Found]] = []
        for found in self._level(blocks):
            chain = next((chain for chain in chains if chain[-1].end is found.skip), None)
            if chain is None or self._out_of_order([*chain, found]):
                chains.append([found])
            else:
                chain.append(found)
        return chains

    def _out_of_order(self, chain: list[Found]) -> bool:
        """Whether the chain, run where its last block ends, would use overwritten memory after what now does so later.

        The rule for the order of in-place writes; it counts a later read, too, which would do no harm.
        """
        inside = set[Op]().union(*(found.inside for found in chain))
        own = {(self.memory[f.add], op) for f in chain if f.add.writes for op in (f.add, *f.tail)}
        written = {self.memory[op] for op in self.program.ops if op.writes and (self.memory[op], op) not in own}
        late, used = set[Op](), set[Op]()
        for op in self.program.ops[chain[0].skip.position + 1 : chain[-1].end.position + 1]:
            memories = {self.memory[each] for each in op.inputs} & written
            if op not in inside and any(source in inside or source in late for source in op.inputs):
                late.add(op)
                used |= memories
            elif memories & used:
                return True
        return False

    def _residual(self, add: Op) -> Found | None:
        left, right = add.inputs
        if self._source(left) in self.above[right]:
            return self._checked(self._source(left), right, add)
        if self._source(right) in self.above[left]:
            return self._checked(self._source(right), left, add)
        return None

    def _source(self, op: Op) -> Op:
        return self._source(op.inputs[0]) if op.passes else op

    def _passed(self, skip: Op, add: Op) -> list[Op]:
        """What does nothing between the skip and the add."""
        operands = [op for op in add.inputs if op.passes]
        return [op for each in operands if self._source(each) is skip for op in (each, *each.inputs) if op is not skip]

    def _checked(self, skip: Op, value: Op, add: Op, tail: tuple[Op, ...] = ()) -> Found | None:
        """The block, if it can be one."""
        goals = {value, *(add.inputs if tail else ())}
        inside = {
            op
            for op in self.program.ops
            if skip in self.above[op] and any(op is g or op in self.above[g] for g in goals)
        }
        inside |= set(tail)
        nodes = frozenset({*inside, add, *self._passed(skip, add)})
        if self.shapes and value.width != skip.width:
            return None
        if not any(op.learns for op in inside) or self._seen_by_others(skip, add, tail, inside, nodes):
            return None
        return Found(skip, value, add, tail, nodes)

    def _seen_by_others(self, skip: Op, add: Op, tail: tuple[Op, ...], inside: set[Op], nodes: frozenset[Op]) -> bool:
        """Whether an in-place write of the block changes a value that somebody else reads."""
        end = tail[-1] if tail else None
        read = {
            op
            for op in inside
            if op is not end and (op in self.outside or any(r not in nodes for r in self.readers[op]))
        }
        own_sum = self.memory[add]
        for op in inside - {add}:
            owner = self.memory[op]
            if not op.writes or (add.writes and op in tail and owner is own_sum):
                continue
            if owner is self.memory[skip] or owner not in inside or any(self.memory[each] is owner for each in read):
                return True
        return add.writes and self._stale(add)

    def _stale(self, add: Op) -> bool:
        """Whether the operand that ``add`` overwrites is read later on, under a name from before."""
        old = [op for op in self.program.ops[: add.position] if self.memory[op] is self.memory[add]]
        return any(op in self.outside or any(r.position > add.position for r in self.readers[op]) for op in old)

    def _with_tails(self, blocks: list[Found]) -> list[Found]:
        skips = {found.skip for found in blocks}
        ends: dict[Op, Found] = {}
        grown = []
        for found in blocks:
            tail = self._tail(found, skips, ends.get(found.skip))
            if tail:
                found = self._checked(found.skip, found.value, found.add, (found.add, *tail)) or found
            ends[found.end] = found
            grown.append(found)
        return grown

    def _tail(self, found: Found, skips: set[Op], before: Found | None) -> list[Op]:
        path = self._path(found)
        if found.add in skips:
            return []
        for length, op in enumerate(path, 1):
            if op in skips:
                return path[:length]
        repeated = [op.name for op in before.tail[1:]] if before is not None else []
        if repeated and [op.name for op in path[: len(repeated)]] == repeated:
            return path[: len(repeated)]
        returned = [length for length, op in enumerate(path, 1) if found.add.call in op.returned]
        return path[: returned[-1]] if returned else []

    def _path(self, found: Found) -> list[Op]:
        """What is applied to the sum, operation by operation, each the only reader of the one before."""
        path, op = [], found.add
        while len(self.readers[op]) == 1 and op not in self.outside:
            after = self.readers[op][0]
            newer = any(o is not op and o.position > found.skip.position for o in after.inputs)
            keeps = after.width == op.width if self.shapes else after.keeps
            if newer or after.inputs[0] is not op or not keeps:
                break
            path.append(after)
            op = after
        return path

    def _level(self, blocks: list[Found]) -> list[Found]:
        """Of blocks that share operations those in the longer chain of one level, the outer ones on a tie."""
        outermost = {found.skip: found for found in sorted(blocks, key=lambda found: found.end.position)}
        left, kept = list(blocks), list[Found]()
        while left:
            alive = [found for found in blocks if found in left or found in kept]
            before, after = dict[Found, int](), dict[Found, int]()
            for found in alive:
                linked = [before[b] for b in before if b.end is found.skip and found is outermost[found.skip]]
                before[found] = 1 + max(linked, default=0)
            for found in reversed(alive):
                after[found] = 1 + after.get(outermost.get(found.end, found), 0)
            longest = max(before[found] + after[found] for found in left)
            level = [found for found in left if before[found] + after[found] == longest]
            for found in sorted(level, key=lambda b: -len(b.inside)):
                if all(found.inside.isdisjoint(other.inside) for other in kept):
                    kept.append(found)
            left = [f for f in left if f not in level and all(f.inside.isdisjoint(k.inside) for k in kept)]
        return [found for found in blocks if found in kept]
