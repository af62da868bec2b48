"""The half of scripts/check_evaluation.py that runs in SAELens's environment, without saeforge.

    PYTHON scripts/check_evaluation_peer.py WORK

WORK/model is the language model, WORK/export-* are SAEs, WORK/tokens.safetensors has `document.N`, the texts one by
one, and `alone.N`, batches of equally long ones; WORK/ask.json says how many of these batches the model's loss is taken
on. `run_evals` judges every SAE on both the batches and the texts as SAELens's own loader packs them (`packed.N`, which
go to WORK/packed.safetensors), there with and without special tokens. Everything that it says goes to WORK/found.json.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from check_circuit_tracer import transformer_lens_parts


class Texts:
    """What `run_evals` asks of an `ActivationsStore`: batches in order, from the first one again after a reset."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches
        self.store_batch_size_prompts, self.context_size = batches[0].shape
        self.reset_input_dataset()

    def reset_input_dataset(self) -> None:
        """From the first batch again."""
        self.rest = iter(self.batches)

    def get_batch_tokens(self, batch_size: int | None = None) -> Tensor:
        """The next batch, (contexts, length), whatever the size asked for."""
        return next(self.rest)


def numbered(tensors: dict[str, Tensor], name: str) -> list[Tensor]:
    """`name.0`, `name.1`, ... in order."""
    return [tensors[f"{name}.{i}"].long() for i in range(sum(key.startswith(f"{name}.") for key in tensors))]


def packed(documents: list[Tensor], tokenizer: Any, context: int, contexts: int) -> list[Tensor]:
    """Batches of whole contexts, as its loader makes them with its default options."""
    from sae_lens.tokenization_and_batching import concat_and_batch_sequences

    bos = tokenizer.bos_token_id
    made = list(
        concat_and_batch_sequences(iter(documents), context, begin_batch_token_id=bos, sequence_separator_token_id=bos)
    )
    return [torch.stack(made[i : i + contexts]) for i in range(0, len(made) - contexts + 1, contexts)]


def main() -> None:
    """See the top of the file."""
    from sae_lens import SAE
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from transformer_lens import HookedTransformer

    work = Path(sys.argv[1])
    ask = json.loads((work / "ask.json").read_text())
    tensors = load_file(work / "tokens.safetensors")
    config, weights, tokenizer = transformer_lens_parts(work / "model")
    model = HookedTransformer(config, tokenizer=tokenizer)
    model.load_state_dict(weights, strict=False)
    model.eval()
    own = packed(numbered(tensors, "document"), tokenizer, ask["context"], ask["contexts"])
    save_file({f"packed.{i}": batch.contiguous() for i, batch in enumerate(own)}, work / "packed.safetensors")
    settings = {
        "alone": (numbered(tensors, "alone"), ask["alone"], True),
        "packed": (own, ask["packed"], True),
        "special": (own, ask["packed"], False),
    }
    found: dict[str, Any] = {"saes": {}}
    for export in sorted(work.glob("export-*")):
        sae = SAE.load_from_disk(str(export), device="cpu")
        here = found["saes"][export.name.removeprefix("export-")] = {}
        for name, (batches, scored, exclude) in settings.items():
            scalars, latents = run_evals(
                sae,
                Texts(batches),
                model,
                ActivationScaler(),
                get_eval_everything_config(
                    n_eval_reconstruction_batches=min(scored, len(batches)),
                    n_eval_sparsity_variance_batches=len(batches),
                ),
                exclude_special_tokens=exclude,
            )
            flat = {f"{group}.{key}": value for group, values in scalars.items() for key, value in values.items()}
            means = {key: sum(latents[key]) / sae.cfg.d_sae for key in ask["means"]}
            silent = sum(share == 0 for share in latents["feature_density"])
            here[name] = flat | means | {"feature_density == 0": silent}
    packages = ("sae-lens", "transformer-lens", "transformers", "torch")
    found["versions"] = [f"{package} {version(package)}" for package in packages]
    (work / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
