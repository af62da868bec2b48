"""Run where the plugin and pytest are installed: `pytest plugins/saeforge-log-relu`."""

import torch
from log_relu import LogReLU

import saeforge


def test_it_learns_and_its_penalty_makes_it_sparse() -> None:
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(64, 16), dim=1)
    x = (torch.rand(4096, 64) * (torch.rand(4096, 64) < 0.05)) @ directions
    l0 = []
    for strength in (0.0, 0.02):
        options = {"d_sae": 64, "strength": strength}
        sae = saeforge.train(x, variant=LogReLU, lr=3e-3, tokens=200_000, batch_size=512, progress=False, **options)
        l0.append(sae.encode(x).l0().float().mean())
        residual = (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
        assert residual < 0.2
    assert l0[1] < 0.8 * l0[0]
