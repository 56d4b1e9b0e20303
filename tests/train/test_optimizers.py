"""Each of timm's optimizers resumes bit-exactly, or is refused."""

import io
from argparse import Namespace

import pytest
import timm.optim
import torch
from timm.utils import ModelEmaV3
from tiny import same

from localvit.train.config import TrainConfig
from localvit.train.optimization import build_optimizer, build_scheduler
from localvit.train.state import TrainState

REFUSED = [name for name in timm.optim.list_optimizers() if name.startswith(("bnb", "fused"))] + ["adahessian"]
NAMES = [name for name in timm.optim.list_optimizers() if name not in REFUSED]
STEPS = 4


class TinyModel(torch.nn.Module):
    """Convolution, matrix, norm and a parameter that is not used in each step."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3)
        self.norm = torch.nn.BatchNorm2d(5)
        self.head = torch.nn.Linear(5, 7)
        self.sometimes = torch.nn.Parameter(torch.ones(5))

    def forward(self, x_BCHW, step):
        x_BC = self.norm(self.conv(x_BCHW)).relu().mean((2, 3))
        return self.head(x_BC * self.sometimes if step % 2 else x_BC)


def new_state(name):
    torch.manual_seed(1)
    model = TinyModel()
    config = TrainConfig(opt=name, lr=0.01, epochs=4, warmup_epochs=0, locality_lr_scale=1.0)
    optimizer = build_optimizer(config, model, 512)
    return TrainState(
        model=model,
        ema=ModelEmaV3(model),
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, STEPS // 2),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )


def advance(state, epochs):
    for epoch in epochs:
        state.begin_epoch()
        for step in range(STEPS // 2):
            torch.manual_seed(100 * epoch + step)
            state.optimizer.zero_grad()
            state.model(torch.randn(2, 3, 5, 7), step).square().sum().backward()
            state.optimizer.step()
        state.finish_epoch({"epoch": epoch, "test_acc1": 0.0}, {})


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state.to_entries({"about": {"config": {}}}), file)
    file.seek(0)
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(file, weights_only=True)


@pytest.mark.filterwarnings("ignore:It is highly recommended")
@pytest.mark.parametrize("name", [*NAMES, "lookahead_sgd", "lookahead_lamb"])
def test_an_optimizer_resumes_bit_exactly(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **arguments: function)  # kron would compile for minutes
    whole = new_state(name)
    advance(whole, range(2))
    entries = saved_and_loaded(whole)
    resumed = new_state(name)
    resumed.load_entries(entries)
    for state in (whole, resumed):
        advance(state, range(2, 5))
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert same(whole.optimizer.state_dict(), resumed.optimizer.state_dict())


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_is_refused(name):
    with pytest.raises(ValueError, match=f"^opt={name} .*adamw") as raised:
        build_optimizer(TrainConfig(opt=name), torch.nn.Linear(3, 5), 512)
    assert "\n" not in str(raised.value)
