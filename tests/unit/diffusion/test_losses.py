"""Losses against torch's own."""

from __future__ import annotations

import pytest
import torch

from simpletuner.diffusion.losses import LOSSES, per_sample

BUILT = [name for name, row in LOSSES.items() if not row.pending]


def test_l2_is_the_mean_squared_error_of_each_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 4, 8, 6, generator=generator)

    found = per_sample(LOSSES["l2"].load()(prediction, target))

    expected = [torch.nn.functional.mse_loss(p, t) for p, t in zip(prediction, target, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("shape", [(2, 4, 8, 6), (2, 4, 3, 8, 6)])
def test_every_loss_is_one_number_a_sample_nought_for_the_right_answer(
    name: str, shape: tuple[int, ...]
) -> None:
    loss = LOSSES[name].load()
    right = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    wrong = right + torch.tensor([0.0, 1.0]).view(2, *[1] * (len(shape) - 1))

    found = per_sample(loss(wrong, right))

    assert found.shape == (2,)
    assert float(found[0]) == 0 < float(found[1])


@pytest.mark.parametrize("name", BUILT)
def test_every_loss_runs_on_the_meta_device(name: str) -> None:
    batch = torch.zeros(2, 4, 8, 6, device="meta")

    assert per_sample(LOSSES[name].load()(batch, batch), batch[:, :1]).shape == (2,)


def test_a_mask_takes_elements_out_of_the_sum_and_not_out_of_the_count() -> None:
    errors = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 1, 4, 6)
    mask[0, :, :, 3:] = 0
    mask[0, :, 0, 0] = 0.5

    found = per_sample(errors, mask)

    kept = errors[0, :, :, :3].sum() - errors[0, :, 0, 0].sum() / 2
    torch.testing.assert_close(found, torch.stack([kept / (3 * 4 * 6), errors[1].mean()]))
