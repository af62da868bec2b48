"""Small files of SAEs made by the tools themselves, for tests/test_formats_golden.py.

    python scripts/make_format_golden.py TOOL --python PYTHON [--out tests/golden]

TOOL is saelens, sparsify or dictionary_learning, PYTHON the interpreter of an environment with that tool
(sae-lens==6.54.12, eai-sparsify==1.3.3, dictionary-learning==0.1.0). Each folder gets the tool's own files and
expected.safetensors: inputs `x`, and that tool's latents `acts` and output `out` for them. Weights are random: norms
far from 1, biases and thresholds that matter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

D_IN, D_SAE, K, ROWS = 12, 40, 5, 24
TOOLS = ("saelens", "sparsify", "dictionary_learning")


def main() -> None:
    """Starts this file again inside the tool's environment, where it makes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--python", help="interpreter of an environment with the tool; default: this one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "tests" / "golden")
    parser.add_argument("--d_in", type=int, default=D_IN)
    parser.add_argument("--d_sae", type=int, default=D_SAE)
    parser.add_argument("--k", type=int, default=K)
    parser.add_argument("--rows", type=Path, help="safetensors file with `x` (rows, d_in); default: 24 random ones")
    given = parser.parse_args()
    if given.python:
        arguments = [f"--{name}={getattr(given, name)}" for name in ("out", "d_in", "d_sae", "k")]
        arguments += [f"--rows={given.rows}"] if given.rows else []
        done = subprocess.run([given.python, __file__, given.tool, *arguments], check=False)
        sys.exit(done.returncode)
    makers = {"saelens": saelens, "sparsify": sparsify, "dictionary_learning": dictionary_learning}
    makers[given.tool](given)
    print(f"written to {given.out / given.tool}")


def rows(given: argparse.Namespace) -> Any:
    """The inputs."""
    import torch
    from safetensors.torch import load_file

    if given.rows:
        return load_file(given.rows)["x"]
    return torch.randn(ROWS, given.d_in, generator=torch.Generator().manual_seed(1)) + 0.5


def randomise(module: Any, seed: int) -> None:
    """Random weights, biases and thresholds in place, decoder rows of norms between 0.5 and 2."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    scale = min(min(tensor.shape) for tensor in module.parameters() if tensor.ndim == 2) ** -0.5
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if tensor.ndim == 2:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale * 1.3)
            elif "threshold" in name:
                tensor.copy_(0.3 + 0.5 * torch.rand(tensor.shape, generator=generator))
            else:
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))


def expect(folder: Path, x: Any, acts: Any, out: Any) -> None:
    """Writes what the tool computes."""
    from safetensors.torch import save_file

    tensors = {"x": x, "acts": acts, "out": out}
    plain = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / "expected.safetensors")


def saelens(given: argparse.Namespace) -> None:
    """Every architecture that SAELens computes and this project reads."""
    import torch
    from sae_lens.registry import get_sae_class

    x = rows(given)
    to = {"d_out": given.d_in, "apply_b_dec_to_input": False}
    for number, (name, architecture, extra) in enumerate(
        [
            ("standard", "standard", {}),
            ("standard_no_shift", "standard", {"apply_b_dec_to_input": False}),
            ("topk", "topk", {"k": given.k}),
            ("topk_rescaled", "topk", {"k": given.k, "rescale_acts_by_decoder_norm": True}),
            ("jumprelu", "jumprelu", {}),
            ("gated", "gated", {}),
            ("transcoder", "transcoder", {**to, "d_out": given.d_in // 2}),
            ("skip_transcoder", "skip_transcoder", to),
            ("jumprelu_transcoder", "jumprelu_transcoder", to),
            ("jumprelu_skip_transcoder", "jumprelu_skip_transcoder", to),
        ]
    ):
        cls, config = get_sae_class(architecture)
        sae = cls(config(d_in=given.d_in, d_sae=given.d_sae, dtype="float32", device="cpu", **extra))
        sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "gpt2-small", "blocks.5.hook_resid_post"
        randomise(sae, number)
        folder = given.out / "saelens" / name
        folder.mkdir(parents=True, exist_ok=True)
        sae.save_model(folder)
        with torch.no_grad():
            expect(folder, x, sae.encode(x), sae(x))


def sparsify(given: argparse.Namespace) -> None:
    """SAE, transcoder, and a skip connection."""
    import torch
    from sparsify import SparseCoder, SparseCoderConfig

    x = rows(given)
    for number, (name, extra) in enumerate(
        [("sae", {}), ("transcoder", {"transcode": True}), ("skip", {"transcode": True, "skip_connection": True})]
    ):
        sae = SparseCoder(given.d_in, SparseCoderConfig(num_latents=given.d_sae, k=given.k, **extra))
        randomise(sae, number)
        folder = given.out / "sparsify" / name
        folder.mkdir(parents=True, exist_ok=True)
        sae.save_to_disk(folder)
        with torch.no_grad():
            found = sae.encode(x)
            acts = torch.zeros(len(x), given.d_sae).scatter_(1, found.top_indices, found.top_acts)
            expect(folder, x, acts, sae(x).sae_out)


def dictionary_learning(given: argparse.Namespace) -> None:
    """Every dictionary that it can load again."""
    import torch
    from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    x, d, f, k = rows(given), given.d_in, given.d_sae, given.k
    for number, ae in enumerate(
        [
            AutoEncoder(d, f),
            AutoEncoderNew(d, f),
            GatedAutoEncoder(d, f),
            AutoEncoderTopK(d, f, k),
            BatchTopKSAE(d, f, k),
            MatryoshkaBatchTopKSAE(d, f, k, [f // 4, f // 4, f // 2]),
            JumpReluAutoEncoder(d, f),
        ]
    ):
        randomise(ae, number)
        name = type(ae).__name__
        folder = given.out / "dictionary_learning" / name
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(ae.state_dict(), folder / "ae.pt")
        trainer = {"dict_class": name, "activation_dim": d, "dict_size": f, "layer": 5, "lm_name": "gpt2"}
        trainer |= {"k": k} if "TopK" in name else {}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}) + "\n")
        with torch.no_grad():
            expect(folder, x, ae.encode(x), ae(x))


if __name__ == "__main__":
    main()
