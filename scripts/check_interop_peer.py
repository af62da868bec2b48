"""The half of scripts/check_interop.py that runs inside another tool's environment, without saeforge.

    PYTHON scripts/check_interop_peer.py load TOOL FOLDER...      its latents and outputs of our exports
    PYTHON scripts/check_interop_peer.py train saelens FOLDER     SAEs trained there for a few hundred steps, exported

Rows come from FOLDER/../rows.safetensors (`x`); what the tool computes goes to FOLDER/expected.safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from make_format_golden import expect

STEPS, BATCH, D_SAE, K = 200, 512, 512, 16


def computed(tool: str, folder: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and output of the SAE in a folder, loaded as that tool's users would."""
    if tool == "saelens":
        from sae_lens import SAE

        sae = SAE.load_from_disk(str(folder), device="cpu")
        return sae.encode(x), sae(x)
    if tool == "sparsify":
        from sparsify import SparseCoder

        coder = SparseCoder.load_from_disk(folder, device="cpu")
        found = coder.encode(x)
        acts = torch.zeros(len(x), coder.num_latents).scatter_(1, found.top_indices, found.top_acts)
        return acts, coder(x).sae_out
    # What its `load_dictionary` does; that module itself asks for datasets and nnsight.
    from dictionary_learning.dictionary import AutoEncoderNew, JumpReluAutoEncoder
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    classes = {cls.__name__: cls for cls in (AutoEncoderNew, JumpReluAutoEncoder, AutoEncoderTopK)}
    arguments = {"k": trainer["k"]} if trainer["dict_class"] == "AutoEncoderTopK" else {}
    ae = classes[trainer["dict_class"]].from_pretrained(str(folder / "ae.pt"), **arguments)
    return ae.encode(x), ae(x)


def trained(out: Path, x: torch.Tensor, names: tuple[str, ...] = ()) -> None:
    """SAELens's own training classes (or those named) on the rows, each written as its `save_inference_model` does."""
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import TrainStepInput

    options: dict[str, dict[str, Any]] = {
        "standard": {"l1_coefficient": 5.0},
        "gated": {"l1_coefficient": 5.0},
        "topk": {"k": K},
        "batchtopk": {"k": K},
        "matryoshka_batchtopk": {"k": K, "matryoshka_widths": [D_SAE // 4, D_SAE // 2]},
        "jumprelu": {"l0_coefficient": 1.0, "jumprelu_init_threshold": 0.1, "jumprelu_bandwidth": 0.5},
    }
    for name, extra in options.items():
        if names and name not in names:
            continue
        torch.manual_seed(0)
        cls, config = get_sae_training_class(name)
        sae = cls(config(d_in=x.shape[1], d_sae=D_SAE, dtype="float32", device="cpu", **extra))
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
        coefficients = {
            key: value if isinstance(value, float | int) else value.value
            for key, value in sae.get_coefficients().items()
        }
        for step in range(STEPS):
            batch = x[torch.randint(len(x), (BATCH,))]
            given: dict[str, Any] = {"sae_in": batch, "coefficients": coefficients, "dead_neuron_mask": None}
            fields = TrainStepInput.__dataclass_fields__
            given |= {"n_training_steps": step} if "n_training_steps" in fields else {}
            given |= {"is_logging_step": False} if "is_logging_step" in fields else {}
            loss = sae.training_forward_pass(TrainStepInput(**given)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        folder = out / f"trained_{name}"
        folder.mkdir(parents=True, exist_ok=True)
        sae.save_inference_model(folder)


def main() -> None:
    """See the top of the file."""
    what, tool, *folders = sys.argv[1:]
    for place in map(Path, folders):
        x = load_file(place.parent / "rows.safetensors")["x"]
        if what == "train":
            trained(place, x)
        for folder in sorted(place.glob("trained_*")) if what == "train" else [place]:
            with torch.no_grad():
                expect(folder, x, *computed(tool, folder, x))


if __name__ == "__main__":
    main()
