"""Schedules against torch's lr_scheduler and by hand."""

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedules

from fedsim.optim import build
from fedsim.optim.schedules import Schedule
from fedsim.params import Layout

CASES = {
    "step": (lambda o: torch_schedules.StepLR(o, 3, 0.5), {"every": 3, "gamma": 0.5}),
    "multi_step": (lambda o: torch_schedules.MultiStepLR(o, [2, 5], 0.1), {"at": (2, 5), "gamma": 0.1}),
    "exponential": (lambda o: torch_schedules.ExponentialLR(o, 0.9), {"gamma": 0.9}),
    "cosine": (lambda o: torch_schedules.CosineAnnealingLR(o, 8, eta_min=0.1), {"length": 8, "floor": 0.1}),
    "polynomial": (lambda o: torch_schedules.PolynomialLR(o, 8, 2.0), {"length": 8, "power": 2.0}),
    "constant": (
        lambda o: torch_schedules.LinearLR(o, 0.25, 1.0, total_iters=4),
        {"warmup": 4, "warmup_from": 0.25},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_schedule_equals_torchs(name: str) -> None:
    make, hyper = CASES[name]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs, ours = make(optimizer), Schedule(name=name, **hyper)
    for k in range(9):
        assert ours.factor(k) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-14)
        optimizer.step()
        theirs.step()


def test_inverse_sqrt_and_warmup_stable_decay_by_hand() -> None:
    rise = Schedule(name="inverse_sqrt", warmup=4)
    assert [rise.factor(k) for k in (0, 3, 15)] == [0.25, 1.0, 0.5]
    wsd = Schedule(name="warmup_stable_decay", length=10, warmup=2, decay=0.2)
    assert [wsd.factor(k) for k in (1, 5, 8, 9, 10)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])
    assert Schedule(name="warmup_stable_decay", length=10, decay=0.4, shape="sqrt").factor(7) == pytest.approx(0.5)


def test_the_unit_says_which_counter_is_read() -> None:
    at = {"rounds": 3, "steps": 30, "fraction": 0.25}
    factors = [
        Schedule(name="exponential", gamma=0.9, unit=unit).at_step(**at) for unit in ("rounds", "steps", "fraction")
    ]
    assert factors == [0.9**3, 0.9**30, 0.9**250]


def test_an_optimizers_section_may_hold_a_schedule() -> None:
    layout = Layout.of({"w": (1, 1)})
    spec = {"name": "sgd", "lr": 0.1, "schedule": {"name": "step", "every": 10}}
    schedule = build(spec, layout).schedule
    assert schedule is not None and schedule.factor(10) == 0.1
    for bad, message in (
        ({"name": "cosin"}, "name: expected one of"),
        ({"name": "cosine"}, "length"),
        ({"evry": 1}, "every"),
    ):
        with pytest.raises(ValueError, match=message):
            build({"name": "sgd", "lr": 0.1, "schedule": bad}, layout)
