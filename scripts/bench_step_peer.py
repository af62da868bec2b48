"""One peer's training step, as a worker of bench_step.py; runs in an environment of its own.

bench_step.py starts it; it imports nothing of saeforge. By hand (then type `run 3` and `quit`):
    PEER/bin/python scripts/bench_step_peer.py JOB.json

JOB.json: `contender` (sparsify, saelens or dictionary_learning), `precision` (fp32, or bf16 for autocast), `fused`
(false: the optimizer as shipped; true: torch's fused Adam in its place), `d_sae`, `k`, `seed`, and what `Gate` needs.

Each peer runs its own code, from its configuration's defaults. Three things had to be written around it:
  sparsify             `Trainer.fit` itself, whole. Its language model is a stand-in whose only layer hands over the
                       next batch. Its forward asks for autocast on CUDA only; for bf16 it is wrapped in the CPU's.
  saelens              `SAETrainer.step`, called in a loop as `SAETrainer.fit` calls it; autocast is its own setting.
  dictionary_learning  `TopKTrainer.update`, called in a loop as its `trainSAE` calls it, which has autocast on CUDA
                       only; for bf16 the call is wrapped in the CPU's.
Nobody's auxiliary loss acts: no latent is dead so early.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from bench_gate import Gate
from torch import Tensor, nn

#: Steps that schedules are laid out for; more than any benchmark takes.
TOTAL_STEPS = 100_000


class Finished(Exception):
    """No more batches are wanted."""


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Makes a torch Adam that has not stepped yet use its fused kernel."""
    assert type(optimizer) is torch.optim.Adam
    assert not optimizer.state
    for group in [*optimizer.param_groups, optimizer.defaults]:
        group["foreach"], group["fused"] = False, True


def autocast(job: dict[str, Any]) -> Any:
    """The CPU's autocast to bf16 where the job asks for it."""
    return torch.autocast("cpu", torch.bfloat16) if job["precision"] == "bf16" else nullcontext()


def sparsify(gate: Gate) -> None:
    """Its Trainer, with a language model that only hands over activations."""
    from sparsify import SaeConfig, TrainConfig, Trainer

    gate.imported("eai-sparsify", "schedulefree")
    job = gate.job

    class Activations(nn.Module):
        """What the Trainer asks of a transformers model, and one layer."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()
            self.batches: Any = iter([torch.zeros(1, job["d_in"])])  # the Trainer looks at its width first
            self.device = torch.device("cpu")
            self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

        @property
        def base_model(self) -> nn.Module:
            return self

        def forward(self, input_ids: Tensor) -> Tensor:
            rows = next(self.batches, None)
            if rows is None:
                raise Finished
            return self.layer(rows.float()[None])

    class Tokens(torch.utils.data.Dataset):
        """Contexts of as many tokens as a batch has rows; nobody reads them."""

        def __len__(self) -> int:
            return TOTAL_STEPS

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"input_ids": torch.zeros(job["batch"], dtype=torch.int64)}

    config = TrainConfig(
        SaeConfig(num_latents=job["d_sae"], k=job["k"]),
        batch_size=1,
        hookpoints=["layer"],
        init_seeds=[job["seed"]],
        log_to_wandb=False,
        save_every=10**9,
        **({"optimizer": "adam"} if job["fused"] else {}),
    )
    model = Activations()
    trainer = Trainer(config, Tokens(), model)
    if job["fused"]:
        fuse(trainer.optimizers[0])
    (sae,) = trainer.saes.values()
    if job["precision"] == "bf16":
        sae.forward = torch.autocast("cpu", torch.bfloat16)(sae.forward)
    sae.register_forward_hook(lambda module, inputs, out: gate.losses.append(out.fvu.detach()))
    model.batches = gate.batches()
    try:
        trainer.fit()
    except Finished:
        pass


def saelens(gate: Gate) -> None:
    """Its SAETrainer and TopKTrainingSAE."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    gate.imported("sae-lens")
    job = gate.job
    torch.manual_seed(job["seed"])
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=job["d_in"], d_sae=job["d_sae"], k=job["k"]))
    config = SAETrainerConfig(
        total_training_samples=TOTAL_STEPS * job["batch"],
        train_batch_size_samples=job["batch"],
        lr_end=3e-5,  # no scheduler uses it, but the trainer insists
        autocast=job["precision"] == "bf16",
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, data_provider=iter(()))
    if job["fused"]:
        fuse(trainer.optimizer)
    for rows in gate.batches():
        trainer.maybe_reset_sparsity()
        out = trainer.step(rows.float())
        trainer.n_training_steps += 1
        gate.losses.append(out.loss.detach())


def dictionary_learning(gate: Gate) -> None:
    """Its TopKTrainer."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    gate.imported("dictionary-learning")
    job = gate.job
    trainer = TopKTrainer(
        steps=TOTAL_STEPS,
        activation_dim=job["d_in"],
        dict_size=job["d_sae"],
        k=job["k"],
        layer=0,  # only stored in its config
        lm_name="saved activations",
        seed=job["seed"],
        device="cpu",
    )
    if job["fused"]:
        fuse(trainer.optimizer)
    for step, rows in enumerate(gate.batches()):
        with autocast(job):
            gate.losses.append(trainer.update(step, rows.float()))


PEERS = {"sparsify": sparsify, "saelens": saelens, "dictionary_learning": dictionary_learning}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    PEERS[job["contender"]](Gate(job))


if __name__ == "__main__":
    main()
