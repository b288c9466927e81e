"""Under Lightning's Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import Net, rows
from torch.nn.functional import mse_loss

import mfx

lightning = pytest.importorskip("lightning.pytorch")


class Module(lightning.LightningModule):
    """A momentumized net, and the gammas that its steps ran with."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mfx.momentumize(Net(p=0.0), 0.0)
        self.gammas: list[float] = []

    def training_step(self, batch: Any, index: int) -> Any:
        self.gammas.append(round(mfx.chains(self.net)[0].gammas[0], 6))
        return mse_loss(self.net(batch), torch.zeros(2, 2, dtype=torch.float64))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(module: Module, callback: Any, path: Any, resume: Any = None, **options: Any) -> Any:
    data = torch.utils.data.DataLoader(rows(8).detach(), batch_size=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(callbacks=[callback], default_root_dir=path, **quiet, **options)
    trainer.fit(module, data, ckpt_path=resume)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_the_callback_anneals_gamma_with_the_steps_of_the_optimizer(tmp_path: Any) -> None:
    from mfx.integrations.lightning import GammaCallback

    module, callback = Module(), GammaCallback(0.0, 0.8, steps=4)
    assert callback.gamma is None
    trainer = fitted(module, callback, tmp_path, max_epochs=1)
    assert module.gammas == [0.0, 0.2, 0.4, 0.6]
    assert callback.gamma == pytest.approx(0.8)
    trainer.save_checkpoint(tmp_path / "here.ckpt")
    again = Module()
    fitted(again, GammaCallback(0.0, 0.8, steps=8), tmp_path, resume=tmp_path / "here.ckpt", max_epochs=2)
    assert again.gammas == [0.4, 0.5, 0.6, 0.7], "the count of steps is that of the checkpoint"


@pytest.mark.filterwarnings("ignore")
def test_batches_that_are_accumulated_are_one_step(tmp_path: Any) -> None:
    from mfx.integrations.lightning import GammaCallback

    module = Module()
    fitted(module, GammaCallback(0.0, 0.8), tmp_path, max_epochs=1, accumulate_grad_batches=2)
    assert module.gammas == [0.0, 0.0, 0.4, 0.4]
