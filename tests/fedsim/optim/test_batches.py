"""Hard batches against the loop written plainly, and its edges."""

import pytest
import torch

from fedsim.optim.batches import HardBatches


def plain_loop(losses_at: list[float], count: int, delta: float, steps: int) -> list[int]:
    """One client, a list and a loop; the loss of batch b at step s is losses_at[s] + b / 100."""
    table, done, visited = [0.0] * count, 0, []
    cycle = list(range(count))
    while done < steps:
        for b in cycle:
            if done == steps:
                break
            table[b] = losses_at[done] + b / 100
            visited.append(b)
            done += 1
        hardest = sorted(range(count), key=lambda b: -table[b])[: max(1, int(delta * count))]
        cycle = sorted(hardest)
    return visited


def test_a_stack_of_clients_visits_what_the_plain_loop_visits() -> None:
    counts, steps = [4, 7, 1], 20
    noise = torch.rand(3, steps, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy, num = HardBatches(delta=0.5), torch.tensor(counts)
    table = policy.table(num).double()
    visited: list[list[int]] = [[], [], []]
    for c in range(3):
        own, one = table[c : c + 1], num[c : c + 1]
        while len(visited[c]) < steps:
            index, length = policy.cycle(own, one)
            for i in range(min(int(length), steps - len(visited[c]))):
                at = index[:, i]
                policy.record(own, at, noise[c, len(visited[c])] + at / 100)
                visited[c].append(int(at))
    assert visited == [plain_loop(noise[c].tolist(), counts[c], 0.5, steps) for c in range(3)]


def test_clients_of_one_stack_choose_as_they_would_alone() -> None:
    num = torch.tensor([5, 3, 4])
    losses = torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    policy = HardBatches(delta=0.7)
    index, length = policy.cycle(losses, num)
    assert length.tolist() == [3, 2, 2]
    for c in range(3):
        alone, n = policy.cycle(losses[c : c + 1], num[c : c + 1])
        assert index[c, : int(n)].tolist() == alone[0, : int(n)].tolist()
    assert index[1, 2] == index[1, 1]


def test_delta_one_is_ordinary_training_and_a_tiny_delta_still_trains() -> None:
    losses, num = torch.rand(1, 3), torch.tensor([3])
    assert HardBatches(delta=1.0).cycle(losses, num)[0].tolist() == [[0, 1, 2]]
    assert HardBatches(delta=0.1).cycle(losses, num)[1].tolist() == [1]
    with pytest.raises(ValueError, match="delta is a share"):
        HardBatches(delta=0.0)
