"""OpenAI's sparse_autoencoder: one `.pt` file, a state_dict with the name of its activation.

latents = activation(encoder(x - pre_bias) + latent_bias), out = decoder(latents) + pre_bias. With "TopK" it first takes
mean and standard deviation off each token and puts them back after, which is no function of one product: refused.
"""

from __future__ import annotations

from pathlib import Path

from saeforge.errors import ConfigError
from saeforge.formats.base import Format, plain_sae
from saeforge.formats.files import matrix, read_torch, take
from saeforge.sae import SAE


class OpenAI(Format):
    """OpenAI's SAEs of GPT-2 small: those with ReLU; those with top-k divide each token by its own deviation."""

    title = "OpenAI"
    files = ("autoencoder.pt",)

    def recognises(self, path: Path) -> bool:
        """By a name that is a layer's number, `5.pt`, or `autoencoder.pt`."""
        file = path if path.is_file() else path / "autoencoder.pt"
        return file.is_file() and file.suffix == ".pt" and (file.stem == "autoencoder" or file.stem.isdigit())

    def read(self, path: Path) -> SAE:
        """See `Format.read`."""
        path = path if path.is_file() else path / "autoencoder.pt"
        found = read_torch(path)
        activation = found.pop("activation", "ReLU")
        if activation == "TopK":
            raise ConfigError(
                f"{path}: its top-k SAEs divide each token by its own standard deviation, which does not fold into "
                "weights; only those with ReLU can be imported"
            )
        if activation != "ReLU":
            raise ConfigError(f"{path}: activation {activation!r} cannot be imported; known: ReLU")
        tensors = take(
            path,
            found,
            ("pre_bias", "latent_bias", "encoder.weight", "decoder.weight"),
            optional=("activation_state_dict", "stats_last_nonzero"),
        )
        return plain_sae(
            path,
            matrix(path, "encoder.weight", tensors["encoder.weight"]),
            tensors["latent_bias"],
            matrix(path, "decoder.weight", tensors["decoder.weight"]).T,
            tensors["pre_bias"],
            threshold=0.0,
            shift=tensors["pre_bias"],
            meta={"imported": {"activation": activation}},
        )
