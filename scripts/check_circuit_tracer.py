"""circuit-tracer loads the transcoders of all layers that `saeforge export` wrote, and completes an attribution.

    python -m venv peer && peer/bin/pip install torch==2.13.0 circuit-tracer==0.5.0 "nnsight<0.7"
    saeforge fit --config configs/transcoder/all-layers.yaml
    python scripts/check_circuit_tracer.py runs/transcoders --peer-python peer/bin/python

RUN is one of the demo model, or of another model of the class LlamaForCausalLM in a folder: that circuit-tracer takes
through nnsight from its folder, and through TransformerLens by its own conversion of the weights. Passed, for each
backend: on the prompt, what the model computes is equal to transformers (logits within 1e-3), the active latents of all
layers and tokens are ours (at least 99.9% of those of either, values within 1e-3 of the largest) but for the first
token, which circuit-tracer leaves out; and `attribute` gives a graph of finite edges with latents in it, of which
pruning leaves some. And the two backends' graphs hold the same edges within 1e-3 of the largest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

PROMPT = "The bridge was built across the river, and"
SAME, VALUE = 0.999, 1e-3
BACKENDS = ("nnsight", "transformerlens")


def main() -> int:
    """Prints a table; 1 if a row of it fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="RUN that holds a transcoder for every layer")
    parser.add_argument("--peer-python", required=True, metavar="PYTHON", help="of an environment with circuit-tracer")
    parser.add_argument("--prompt", default=PROMPT)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        ours(given.run, given.prompt, work)
        command = [given.peer_python, __file__, "--peer", str(work)]
        subprocess.run(command, check=True)
        results = json.loads((work / "results.json").read_text())
    print(f"{'backend':<16} {'logits':>8} {'L0':>6} {'same':>8} {'value':>8} {'nodes':>7} {'kept':>5} {'replaced':>8}")
    for name, found in results["backends"].items():
        fails = not (
            found["logits"] <= VALUE
            and found["same"] >= SAME
            and found["value"] <= VALUE
            and found["finite"]
            and 0 < found["kept"] <= found["features"]
        )
        results["failed"] = results.get("failed", 0) + fails
        print(
            f"{name:<16} {found['logits']:8.1e} {found['l0']:6.1f} {found['same']:8.5f} {found['value']:8.1e} "
            f"{found['features']:7} {found['kept']:5} {found['replaced']:8.3f}{'  FAILS' if fails else ''}"
        )
    apart = results["apart"]
    print(f"edges of the two backends apart: {apart:.1e} of the largest{'' if apart <= VALUE else '  FAILS'}")
    failed = results["failed"] + (apart > VALUE)
    print(f"\n{failed} failed" if failed else "\nall passed")
    return int(failed > 0)


def ours(run: str, prompt: str, work: Path) -> None:
    """Exports, and keeps what our SAEs say of the prompt."""
    from safetensors.torch import save_file

    from saeforge import formats
    from saeforge.lm.origin import origin_of

    saes = list(formats.Stored(run))
    formats.write_set(saes, work / "export", "circuit-tracer")
    for note in formats.notes(saes[0], "circuit-tracer"):
        print(f"note: {note}")
    lm = origin_of(saes[0]).load_causal()
    tokens = torch.tensor([lm.tokenizer.bos_token_id, *lm.tokenizer(prompt, add_special_tokens=False).input_ids])
    base, found = lm.model.base_model, {}
    handles = [
        base.get_submodule(sae.meta["site"]["module_path"]).register_forward_pre_hook(
            lambda _module, inputs, at=layer: found.__setitem__(at, inputs[0][0])
        )
        for layer, sae in enumerate(saes)
    ]
    with torch.no_grad():
        logits = lm.model(tokens[None]).logits[0]
    for handle in handles:
        handle.remove()
    acts = torch.stack([sae.encode(found[layer]).to_dense() for layer, sae in enumerate(saes)])
    save_file({"tokens": tokens, "logits": logits.contiguous(), "acts": acts}, work / "expected.safetensors")
    shutil.copytree(lm.model.config._name_or_path, work / "model")  # as it is: transformers 4 reads it there


def theirs(work: Path) -> None:
    """In circuit-tracer's environment: what it computes from the export."""
    from circuit_tracer import attribute
    from circuit_tracer.graph import compute_graph_scores, prune_graph
    from circuit_tracer.transcoder.activation_functions import TopK
    from circuit_tracer.utils.hf_utils import load_transcoder_from_hub
    from safetensors.torch import load_file

    expected = load_file(work / "expected.safetensors")
    results: dict[str, Any] = {"backends": {}}
    edges = []
    for backend in BACKENDS:
        transcoders, config = load_transcoder_from_hub(str(work / "export"), device=torch.device("cpu"))
        if config["activation"] == "topk":
            for transcoder in transcoders:
                transcoder.activation_function = torch.nn.Sequential(TopK(config["k"]), torch.nn.ReLU())
        model = {"nnsight": by_nnsight, "transformerlens": by_transformer_lens}[backend](work / "model", transcoders)
        logits, acts = model.get_activations(expected["tokens"])
        graph = attribute(expected["tokens"], model, max_n_logits=3, batch_size=64, verbose=False)
        mine, other = expected["acts"][:, 1:] != 0, acts[:, 1:] != 0
        both = mine & other
        difference = (expected["acts"][:, 1:] - acts[:, 1:])[both].abs().max()
        nodes = prune_graph(graph).node_mask
        edges.append(graph.adjacency_matrix)
        results["backends"][backend] = {
            "logits": float((logits.squeeze(0) - expected["logits"]).abs().max()),
            "l0": float(other.sum(-1).float().mean()),
            "same": float(both.sum() / (mine | other).sum()),
            "value": float(difference / expected["acts"].abs().max()),
            "features": len(graph.selected_features),
            "kept": int(nodes[: len(graph.selected_features)].sum()),
            "finite": bool(torch.isfinite(graph.adjacency_matrix).all()),
            "replaced": compute_graph_scores(graph)[0],
        }
    alike = edges[0].shape == edges[1].shape
    results["apart"] = float((edges[0] - edges[1]).abs().max() / edges[0].abs().max()) if alike else float("inf")
    (work / "results.json").write_text(json.dumps(results))


def by_nnsight(folder: Path, transcoders: Any) -> Any:
    """The model from its folder."""
    from circuit_tracer import ReplacementModel

    return ReplacementModel.from_pretrained_and_transcoders(
        str(folder), transcoders, backend="nnsight", device=torch.device("cpu")
    )


def by_transformer_lens(folder: Path, transcoders: Any) -> Any:
    """The model with the weights of its folder: TransformerLens loads by the names it knows only."""
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel

    made, weights, tokenizer = transformer_lens_parts(folder)
    model = TransformerLensReplacementModel(made, tokenizer=tokenizer)
    model.load_state_dict(weights, strict=False)
    model._configure_replacement_model(transcoders)
    return model


def transformer_lens_parts(folder: Path) -> tuple[Any, dict[str, torch.Tensor], Any]:
    """Configuration, weights by TransformerLens's own conversion, and tokenizer of a LlamaForCausalLM in a folder."""
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(folder)
    config = theirs.config
    settings = config.to_dict() | (getattr(config, "rope_parameters", None) or {})  # there since transformers 5
    head = config.hidden_size // config.num_attention_heads
    made = HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_ctx=config.max_position_embeddings,
        d_head=head,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        act_fn="silu",
        eps=config.rms_norm_eps,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_base=settings["rope_theta"],
        rotary_dim=head,
        rotary_adjacent_pairs=False,
        final_rms=True,
        gated_mlp=True,
        original_architecture="LlamaForCausalLM",
        model_name="demo",
        tokenizer_name=str(folder),
        device="cpu",
    )
    return made, convert_llama_weights(theirs, made), AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        theirs(Path(sys.argv[2]))
        sys.exit(0)
    sys.exit(main())
