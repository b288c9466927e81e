"""Find: the residual blocks of a captured graph.  Pure; reads the graph, changes nothing.

For each add ``y = s + b`` of two tensors computed from a common input (and other sums, :mod:`mfx.find.match`):

1. the *skip* is the operand that the other one is computed from, looking through nodes that do nothing;
   where there is none the skip path transforms x and the add is kept;
2. the *branch* is all nodes on paths from skip to the other operand, with what they alone use: side values
   computed on the way, metadata queries, assertions, in-place writes to the branch's own values;
3. operations ``h`` after the add belong to the block (``y = h(x + f(x))``, a *wrapped* block) when they keep
   the shape, use nothing else that depends on x, have no other consumer, and (a) the next block's skip
   starts after them, (b) they end in what the add's own module returns, or (c) they repeat the ``h`` of the
   block before;
4. a module named by the caller is a wrapped block by itself, and so is a block between two rearrangements of x
   (:mod:`mfx.find.reshaped`).

Everything that is a residual add and not a block is a :class:`Rejection` with its node and reason, or, where its skip
is far, left for the plan to ask for (:mod:`mfx.find.far`).

Reference: Sander et al., ICML 2021, arXiv 2102.07870, section 3.
Known limits: blocks whose skip and branch meet otherwise than in an add (concatenation, gates).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from mfx.find.block import Block, Rejection
from mfx.find.far import Far, Spans
from mfx.find.match import match_sum, without_parts
from mfx.find.reshaped import take_in
from mfx.find.tail import wrap
from mfx.find.whole.named import calls_of, named_blocks
from mfx.graph.dataflow import Dataflow, analyse
from mfx.graph.notes import SCOPE


@dataclass(frozen=True, eq=False)
class Found:
    """What :func:`find` found, in order of execution; ``sums`` are no residual adds."""

    flow: Dataflow
    blocks: tuple[Block, ...]
    rejections: tuple[Rejection, ...]
    far: tuple[Far, ...] = ()
    sums: tuple[Rejection, ...] = ()

    @property
    def rows(self) -> tuple[Block | Rejection | Far, ...]:
        """All residual adds, in no order."""
        return (*self.blocks, *self.rejections, *self.far)


def find(
    graph: fx.Graph, root: nn.Module, *, kind: str = "wrapped", only_whole: bool = False, prefix: str = ""
) -> Found:
    """The blocks of ``graph``.

    Args:
        graph: a captured graph; the module calls marked in it (:mod:`mfx.find.whole.named`) are blocks.
        root: the module that it is relative to.
        kind: what these calls are: ``"wrapped"`` blocks, or ``"branch"``, the branch of a residual add that the graph
            has or that is to be put in.
        only_whole: leave everything else as it is.
        prefix: the path of ``root`` in the model that blocks are named in.
    """
    calls = calls_of(graph)
    flow = analyse(graph, root, {call.value: call.x for call in calls})
    whole = named_blocks(flow, calls, kind)
    covered = {node for match in whole.values() if isinstance(match, Block) for node in match.members}
    matches: list[Block | Rejection | Far] = []
    spans = Spans(flow)
    for node in flow.nodes:
        if node in whole:
            matches.append(whole[node])
        elif node in flow.sums and not only_whole and node not in covered:
            match = match_sum(flow, node)
            match = match.collected(flow) if isinstance(match, Far) and not spans.is_far(match) else match
            matches += [match] if match is not None else []
    matches = wrap(flow, take_in(flow, without_parts(flow, matches)), part=bool(prefix))
    sums = [match for match in matches if isinstance(match, Rejection) and not match.residual]
    matches = [match for match in matches if match not in sums]
    paths = {end: call.path for end, call in zip(whole, calls, strict=True)}
    named = [replace(match, name=name) for match, name in zip(matches, _names(matches, paths, prefix), strict=True)]
    apart = [replace(one, name=name) for one, name in zip(sums, _names(sums, paths, prefix, "~"), strict=True)]
    return Found(
        flow,
        tuple(match for match in named if isinstance(match, Block)),
        tuple(match for match in named if isinstance(match, Rejection)),
        tuple(match for match in named if isinstance(match, Far)),
        tuple(apart),
    )


def _names(
    matches: Sequence[Block | Rejection | Far], whole: Mapping[fx.Node, str], prefix: str, mark: str = "#"
) -> list[str]:
    """Module path of each residual add, with ``#k`` where one module runs several or at the root."""
    paths = [".".join(filter(None, (prefix, _path(match, whole)))) for match in matches]
    total = Counter(paths)
    seen: Counter[str] = Counter()
    names = []
    for path in paths:
        names.append(f"{path}{mark}{seen[path]}" if total[path] > 1 or not path else path)
        seen[path] += 1
    return names


def _path(match: Block | Rejection | Far, whole: Mapping[fx.Node, str]) -> str:
    return whole[match.add] if match.add in whole else match.add.meta[SCOPE].path
