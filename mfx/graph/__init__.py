"""What a graph says; knows no block and no rule.

``notes`` (all that is written on nodes), ``operations`` and ``draws`` (what one node does), ``dataflow`` and ``order``
(what nodes have to do with each other), ``shapes`` (run without values), ``splice`` (a part of a graph, and back).
"""
