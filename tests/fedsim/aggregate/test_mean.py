import pytest
import torch

from fedsim.aggregate.mean import Mean


def test_rows_count_by_their_weights_however_they_are_summed() -> None:
    g = torch.Generator().manual_seed(0)
    v, w = torch.randn(10, 7, generator=g, dtype=torch.float64), torch.rand(10, generator=g, dtype=torch.float64)
    expected = (w[:, None] * v).sum(0) / w.sum()
    for got in (Mean()(v, w), Mean().weigh(w) @ v):
        assert torch.allclose(got, expected, atol=1e-14)


def test_uniform_weights_count_every_row_once() -> None:
    v, w = torch.tensor([[0.0], [3.0]]), torch.tensor([2.0, 1.0])
    assert Mean()(v, w).tolist() == [1.0]
    assert Mean(weights="uniform")(v, w).tolist() == [1.5]
    assert Mean().weigh(torch.tensor([3, 1])).tolist() == [0.75, 0.25]
    assert Mean(weights="uniform").weigh(torch.tensor([3, 0])).tolist() == [0.5, 0.5]


def test_a_diverged_row_shows_in_the_mean() -> None:
    assert not Mean()(torch.tensor([[1.0], [torch.nan]]), torch.ones(2)).isfinite()


def test_weights_that_make_no_mean_are_refused() -> None:
    with pytest.raises(ValueError, match="positive number"):
        Mean()(torch.ones(2, 1), torch.zeros(2))
    for counts in ([0, 0], [2, -1], []):
        with pytest.raises(ValueError, match="not negative and not all zero"):
            Mean().weigh(torch.tensor(counts))
