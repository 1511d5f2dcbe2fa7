"""The losses of pictures: what each is low for, what it moves, and that the critic trains along and is not saved."""

import pytest
import torch
from torch.nn import functional as F

from anytoken.tokenizers.base import TokenizerError, load_tokenizer
from anytoken.tokenizers.image import ImageTokenizer, psnr_db
from anytoken.tokenizers.losses.image import PatchDiscriminator, feature_loss, pixel_loss, psnr_loss

SETTINGS = {
    "width": 16, "encoder_depth": 1, "decoder_depth": 1, "refine_width": 8, "refine_depth": 1, "levels": [5, 5, 4],
}  # fmt: skip
WEIGHTS = {"pixel": 0.5, "psnr": 0.1, "feature": 0.2, "adversarial": 0.1}


def pictures(count: int = 4) -> torch.Tensor:
    """Blocks of random colours with hard edges."""
    generator = torch.Generator().manual_seed(0)
    return F.interpolate(torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1, 32, mode="nearest")


def blurred(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 5, 1, 2, count_include_pad=False)


def test_the_pixel_loss_is_zero_for_equal_pictures_only():
    x = torch.rand(2, 3, 8, 8)
    assert pixel_loss(x, x) == 0
    assert pixel_loss(x + 0.1, x) < pixel_loss(x + 0.2, x)


def test_the_psnr_loss_is_the_mean_psnr_in_nats():
    target = pictures()
    output = target + 0.1 * torch.arange(1, 5)[:, None, None, None] * torch.randn_like(target)
    error = (output - target).square().flatten(1).mean(1)
    assert psnr_loss(output, target).item() == pytest.approx(error.log().mean().item(), rel=1e-6)
    inside = output.clamp(-1, 1)
    nats = (
        (psnr_db(inside, target) - 10 * torch.log10(torch.tensor(4.0))).mean()
        * -torch.log(torch.tensor(10.0))
        / 10
    )
    assert psnr_loss(inside, target).item() == pytest.approx(nats.item(), rel=1e-5)


def test_the_feature_loss_moves_the_output_and_not_the_encoder():
    torch.manual_seed(0)
    encoder = torch.nn.Conv2d(3, 8, 3)
    target = pictures()
    output = blurred(target).requires_grad_()
    loss = feature_loss(encoder, lambda x: x, output, target)
    loss.backward()
    assert loss > 0 and output.grad.abs().sum() > 0 and encoder.weight.grad is None
    assert feature_loss(encoder, lambda x: x, target, target) == 0


def test_the_critic_learns_to_tell_blurs_and_shows_the_way_out():
    torch.manual_seed(0)
    critic, target = PatchDiscriminator(8), pictures(8)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    for _ in range(60):
        _, told = critic.losses(blurred(target), target)
        optimizer.zero_grad()
        told.backward()
        optimizer.step()
    assert critic(target).mean() > critic(blurred(target)).mean() + 0.5
    output = blurred(target).requires_grad_()
    fooled, told = critic.losses(output, target)
    critic.zero_grad()
    fooled.backward()
    assert all(one.grad is None for one in critic.parameters()), (
        "the decoder's term leaves the critic as it is"
    )
    nearer = critic(output - 5 * output.grad / output.grad.abs().max()).mean()
    assert nearer > critic(output).mean()


def test_terms_and_critic_train_along_and_only_the_tokenizer_is_saved(tmp_path):
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(**SETTINGS)
    names, before = set(tokenizer.state_dict()), tokenizer.fingerprint()
    critic = tokenizer.configure_losses(WEIGHTS)
    assert set(tokenizer.state_dict()) == names and tokenizer.fingerprint() == before
    loss, seen = tokenizer.train().training_loss(pictures())
    assert set(seen) == {"psnr_db", *WEIGHTS}
    loss.backward()
    parts = [*tokenizer.parameters(), *(one for one in critic.parameters() if one.ndim > 1)]
    assert all(one.grad.abs().sum() > 0 for one in parts)
    assert load_tokenizer(tokenizer.eval().save_pretrained(tmp_path / "saved")).fingerprint() == before


def test_what_is_not_weighed_costs_nothing():
    torch.manual_seed(0)
    plain, weighed = (ImageTokenizer(**SETTINGS) for _ in range(2))
    weighed.load_state_dict(plain.state_dict())
    assert weighed.configure_losses({"pixel": 2.0, "feature": 0.0}) is None
    ours, twice = (one.training_loss(pictures()) for one in (plain, weighed))
    assert twice[0].item() == pytest.approx(2 * ours[0].item()) and ours[1] == twice[1]


@pytest.mark.parametrize("weights", [{"sharpness": 1.0}, {"pixel": -1.0}, {"pixel": 0.0}])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(
        TokenizerError,
        match="loss weighs pixel, psnr, feature, adversarial, each 0 or more and one above; received",
    ):
        ImageTokenizer(**SETTINGS).configure_losses(weights)
