"""Rules as torch optimizers: steps, groups, closures, schedulers, saved states."""

import copy

import pytest
import torch
from torch import nn

from fedsim.optim import torch_optimizer


def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return net.double()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, scheduler: object = None) -> None:
    for i in steps:
        x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()  # type: ignore[attr-defined]


def flat(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def test_groups_and_a_scheduler_behave_as_with_torchs_own_adamw() -> None:
    ours, theirs = model(), model()

    def groups(net: nn.Module) -> list[dict]:
        return [{"params": net[0].parameters(), "lr": 0.05}, {"params": net[2].parameters(), "weight_decay": 0.3}]

    a = torch_optimizer("adamw", groups(ours), lr=0.1, decay_vectors=True)
    b = torch.optim.AdamW(groups(theirs), lr=0.1)
    for net, opt in ((ours, a), (theirs, b)):
        train(net, opt, range(12), torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10))
    assert torch.allclose(flat(ours), flat(theirs), rtol=0, atol=1e-14)


def test_a_scheduler_of_momentum_reaches_the_rule() -> None:
    ours, theirs = model(), model()
    a = torch_optimizer("sgd", ours.parameters(), lr=0.1, momentum=0.9)
    b = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for net, opt in ((ours, a), (theirs, b)):
        train(net, opt, range(9), torch.optim.lr_scheduler.OneCycleLR(opt, 0.2, total_steps=10))
    assert torch.allclose(flat(ours), flat(theirs), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion", "adagrad"])
def test_a_saved_state_resumes_in_the_middle(name: str) -> None:
    net = model()
    optimizer = torch_optimizer(name, net.parameters(), lr=0.01)
    train(net, optimizer, range(3))
    half, saved = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, range(3, 6))
    resumed = torch_optimizer(name, half.parameters(), lr=0.5)
    resumed.load_state_dict(saved)
    train(half, resumed, range(3, 6))
    assert torch.equal(flat(net), flat(half))


def test_a_closure_is_called_with_gradients_on_and_its_loss_comes_back() -> None:
    w = nn.Parameter(torch.tensor([[3.0]]))
    optimizer = torch_optimizer("sgd", [w], lr=0.5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 0.5 * w.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.5 and w.item() == 1.5


def test_a_parameter_without_a_gradient_stays() -> None:
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = torch_optimizer("adamw", [a, b], lr=0.1, weight_decay=0.5)
    a.grad = torch.ones(2, 2)
    optimizer.step()
    assert (a != 1).all() and (b == 1).all()


def test_bad_keys_are_refused_when_it_is_made() -> None:
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="did you mean 'momentum'"):
        torch_optimizer("sgd", [w], lr=0.1, momentm=0.9)
    with pytest.raises(ValueError, match=r"lr: must lie in \[0, inf\), got -1.0"):
        torch_optimizer("sgd", [{"params": [w], "lr": -1.0}], lr=0.1)
