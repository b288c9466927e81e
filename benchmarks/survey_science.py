"""Small configurations of models on graphs, molecules and proteins, of libraries that people install beside torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from survey_building import Made
from torch import Tensor, nn


class Graphs(nn.Module):
    """What people write with the layers of torch_geometric: an embedding, layers in turn, a readout."""

    def __init__(self, layers: list[nn.Module], takes_batch: bool, edges: int | None = None) -> None:
        super().__init__()
        self.embedding, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        self.edge_embedding = nn.Linear(4, edges) if edges else None
        self.layers, self.takes_batch = nn.ModuleList(layers), takes_batch

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, edge_attr: Tensor) -> Tensor:
        from torch_geometric.nn import global_add_pool

        x = self.embedding(x)
        for layer in self.layers:
            if self.takes_batch:
                x = layer(x, edge_index, batch)
            elif self.edge_embedding is not None:
                x = layer(x, edge_index, self.edge_embedding(edge_attr))
            else:
                x = layer(x, edge_index)
        return self.head(global_add_pool(x, batch))


def graph() -> tuple[Tensor, ...]:
    batch = torch.tensor([0] * 7 + [1] * 5)
    return torch.randn(12, 8), torch.randint(0, 12, (2, 40)), batch, torch.randn(40, 4)


def gps() -> Made:
    from torch_geometric.nn import GINConv, GPSConv

    def convolution() -> GINConv:
        return GINConv(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))

    layers = [GPSConv(16, convolution(), heads=2, dropout=0.1) for _ in range(6)]
    return Graphs(layers, takes_batch=True), graph()


def deep_gcn(block: str) -> Callable[[], Made]:
    def make() -> Made:
        from torch_geometric.nn import DeepGCNLayer, GENConv, LayerNorm

        layers = [
            DeepGCNLayer(
                GENConv(16, 16, aggr="softmax", learn_t=True, num_layers=2, norm="layer"),
                LayerNorm(16),
                nn.ReLU(inplace=True),
                block=block,
                dropout=0.1,
            )
            for _ in range(8)
        ]
        return Graphs(layers, takes_batch=False, edges=16), graph()

    return make


def atoms() -> tuple[Tensor, ...]:
    """Their kinds and places, and which of two molecules each belongs to."""
    return torch.randint(1, 9, (11,)), torch.randn(11, 3) * 2, torch.tensor([0] * 6 + [1] * 5)


def neighbours(pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of a molecule: torch_cluster's radius graph is compiled code."""
    pairs = (batch[:, None] == batch[None]).fill_diagonal_(False).nonzero().t()
    return pairs, (pos[pairs[0]] - pos[pairs[1]]).norm(dim=-1)


def schnet() -> Made:
    from torch_geometric.nn.models import SchNet

    return SchNet(16, 16, num_interactions=6, num_gaussians=10, interaction_graph=neighbours), atoms()


def protein(name: str) -> Callable[[], Made]:
    def make() -> Made:
        from argparse import Namespace

        from esm import Alphabet
        from esm.model.esm2 import ESM2
        from esm.model.msa_transformer import MSATransformer

        if name == "ESM2":
            return ESM2(6, 32, 2), (torch.randint(4, 24, (2, 20)),)
        sizes = {"layers": 4, "embed_dim": 32, "ffn_embed_dim": 64, "attention_heads": 2}
        alive = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
        rest = {
            "max_tokens_per_msa": 2**14,
            "max_tokens": 64,
            "max_positions": 64,
            "embed_positions_msa": True,
            "logit_bias": True,
        }
        net = MSATransformer(
            Namespace(**sizes, **alive, **rest, embed_positions_msa_dim=32),
            Alphabet.from_architecture("msa_transformer"),
        )
        return net, (torch.randint(4, 24, (1, 5, 12)),)

    return make


def egnn() -> Made:
    from egnn_pytorch import EGNN_Network

    net = EGNN_Network(num_tokens=10, dim=16, depth=6, num_nearest_neighbors=0, dropout=0.1, norm_coors=True)
    return net, (torch.randint(0, 10, (2, 9)), torch.randn(2, 9, 3))


def enformer() -> Made:
    from enformer_pytorch import Enformer
    from enformer_pytorch.config_enformer import EnformerConfig

    config = EnformerConfig(dim=48, depth=6, heads=2, target_length=8, num_downsamples=3, dim_divisible_by=4)
    return Enformer(config), (torch.randint(0, 4, (1, 128)),)


MODELS: dict[str, Callable[[], Made]] = {
    "enformer": enformer,
    "EGNN": egnn,
    "torch_geometric GPS": gps,
    "torch_geometric DeepGCN, res+": deep_gcn("res+"),
    "torch_geometric DeepGCN, res": deep_gcn("res"),
    "torch_geometric SchNet": schnet,
    "esm ESM2": protein("ESM2"),
    "esm MSA Transformer": protein("MSA"),
}
