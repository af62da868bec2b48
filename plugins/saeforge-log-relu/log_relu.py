import torch
from torch import nn

from saeforge.ops import Above, decode, encode
from saeforge.variants import Recipe, Variant, random_unit_rows


class LogReLU(Variant):
    """ReLU latents under the penalty sum log(1 + 10 f), which spares strong latents."""

    def __init__(self, d_in: int, d_out: int, *, d_sae: int = 4096, strength: float = 0.01) -> None:
        super().__init__(d_in, d_out, d_sae=d_sae, input_scale="rms")
        self.strength = strength
        self.W_enc, self.b_enc = nn.Parameter(torch.empty(d_sae, d_in)), nn.Parameter(torch.zeros(d_sae))
        self.W_dec, self.b_dec = nn.Parameter(torch.empty(d_sae, d_out)), nn.Parameter(torch.zeros(d_out))

    @torch.no_grad()
    def initialise(self, stats, x, target, generator):
        self.set_scale(stats)
        self.W_dec.copy_(random_unit_rows(self.d_sae, self.d_out, generator))
        tied = self.d_in == self.d_out
        self.W_enc.copy_(self.W_dec if tied else random_unit_rows(self.d_sae, self.d_in, generator))

    def step(self, batch, schedule):
        x, target = self.scaled(batch)
        code = encode(x, self.W_enc, self.b_enc, Above(0.0), dtype=self.run.compute_dtype)
        error = (target - decode(code, self.W_dec, self.b_dec)).square().sum(1)
        penalty = self.mean_entries(torch.log1p(10 * code.values), code, batch.weight)
        terms = {"mse": self.mean_rows(error, batch.weight), "log": self.strength * penalty}
        return self.output(terms, code, error)

    def schedules(self, total_steps):
        return {}

    def recipe(self, total_steps):
        return Recipe(lr=3e-4, warmup_steps=total_steps // 20)

    def param_groups(self):
        free = [self.W_enc, self.b_enc, self.b_dec]
        return [{"params": [self.W_dec], "constraint": "unit_norm"}, {"params": free, "constraint": None}]

    def fold(self):
        zero = torch.zeros_like(self.b_enc)
        return self.folded(self.W_enc, self.b_enc, self.W_dec, self.b_dec, threshold=zero)
