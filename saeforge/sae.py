"""`SAE`: the plain trained thing that every variant folds into.

It takes and returns raw activations: input scale, biases and decoder norms are folded in. It loads with torch and
safetensors alone, without the plugin that trained it. Evaluation, features, steering and formats see only this class.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from saeforge.errors import CheckpointError, ConfigError
from saeforge.ops import Above, Shard, SparseCode, TopK, decode, shards
from saeforge.ops.engine import select_code

FORMAT = "saeforge-sae"
FORMAT_VERSION = 1
WEIGHTS_FILE = "sae.safetensors"
META_FILE = "sae.json"

Rule = Literal["threshold", "topk", "plugin"]


class Encoder(Protocol):
    """What encodes where no product with a threshold or a top-k does: a variant that cannot fold, a torch module."""

    d_in: int
    arguments: dict[str, Any]

    def encode(self, x: Tensor) -> SparseCode:
        """The latents of raw activations (n, d_in)."""


class SAE(nn.Module):
    """A sparse autoencoder (or transcoder) over raw activations.

    `pre = x @ W_enc.T + b_enc`; the active latents are chosen by the rule; `decode` is `values @ W_dec + b_dec`
    (plus `x @ W_skip.T` for a skip transcoder). Rules:

    * threshold: latent i is active with value `pre_i` where `pre_i > threshold_i` (ReLU: threshold 0);
    * topk: the k largest pre-activations of a row, those that are positive; ties go to the lowest index;
    * plugin: whatever `encoder` returns (signed, iterative, by neighbours). There is no W_enc and b_enc then, and the
      package of the variant is needed to load it.

    Attributes:
        W_enc: (d_sae, d_in). b_enc: (d_sae,). W_dec: (d_sae, d_out). b_dec: (d_out,).
        threshold: (d_sae,), at least 0, or None. k: int or None. W_skip: (d_out, d_in) or None.
        encoder: of rule plugin, else None.
        meta: provenance and metrics as plain JSON values.
    """

    W_enc: Tensor  # not there under rule plugin
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None
    W_skip: Tensor | None

    def __init__(
        self,
        W_enc: Tensor | None,
        b_enc: Tensor | None,
        W_dec: Tensor,
        b_dec: Tensor,
        *,
        rule: Rule,
        threshold: Tensor | None = None,
        k: int | None = None,
        W_skip: Tensor | None = None,
        encoder: nn.Module | None = None,
        meta: dict[str, Any] | None = None,
        copy: bool = True,
    ) -> None:
        """Checks the shapes.

        Args:
            W_enc, b_enc, W_dec, b_dec, rule, threshold, k, W_skip, encoder, meta: see the class.
            copy: keep copies of the tensors; false where nobody else will write to them.

        Raises:
            ConfigError: shapes that do not fit, or a rule without its parameter.
        """
        super().__init__()
        if rule not in ("threshold", "topk", "plugin"):
            raise ConfigError(f"rule {rule!r}: expected 'threshold', 'topk' or 'plugin'")
        needs = {"threshold": "threshold W_enc b_enc", "topk": "k W_enc b_enc", "plugin": "encoder"}[rule].split()
        given = {"threshold": threshold, "k": k, "encoder": encoder, "W_enc": W_enc, "b_enc": b_enc}
        if {name for name, value in given.items() if value is not None} != set(needs):
            raise ConfigError(f"rule {rule!r} needs {', '.join(needs)} and nothing else")
        if W_dec.ndim != 2 or (W_enc is not None and W_enc.ndim != 2):
            shape = None if W_enc is None else tuple(W_enc.shape)
            raise ConfigError(f"W_enc has shape {shape} and W_dec {tuple(W_dec.shape)}, expected matrices")
        d_sae, d_out = W_dec.shape
        self.d_in: int = W_enc.shape[1] if W_enc is not None else cast(Encoder, encoder).d_in
        expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
            "W_enc": (W_enc, (d_sae, self.d_in)),
            "b_enc": (b_enc, (d_sae,)),
            "W_dec": (W_dec, (d_sae, d_out)),
            "b_dec": (b_dec, (d_out,)),
            "threshold": (threshold, (d_sae,)),
            "W_skip": (W_skip, (d_out, self.d_in)),
        }
        for name, (tensor, shape) in expected.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ConfigError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {shape} beside W_dec {(d_sae, d_out)}"
                )
        shard = shards.current()
        most = d_sae if shard is None else shard.d_sae  # a rank's part may have fewer latents than a row
        if k is not None and not 1 <= k <= most:
            raise ConfigError(f"k = {k} with d_sae = {most}: expected 1 <= k <= d_sae")
        if threshold is not None and bool((threshold < 0).any()):
            raise ConfigError(
                "threshold is negative for some latents; expected at least 0 (fold a ReLU as threshold 0)"
            )
        self.rule: Rule = rule
        self.k = k
        self.meta: dict[str, Any] = dict(meta or {})
        self.encoder = encoder
        for name, (tensor, _) in expected.items():
            if tensor is not None or name in ("threshold", "W_skip"):
                kept = None if tensor is None else tensor.detach()
                if kept is not None:
                    kept = kept.clone(memory_format=torch.contiguous_format) if copy else kept.contiguous()
                self.register_buffer(name, kept)

    @property
    def d_out(self) -> int:
        """Width of the output; d_in for an SAE."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_dec.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_dec.device

    def encode(self, x: Tensor) -> SparseCode:
        """The active latents of raw activations.

        Args:
            x: (..., d_in); leading dimensions are flattened into rows.

        Returns:
            A code of prod(leading) rows; `code.to_dense()` is (rows, d_sae).

        Raises:
            ConfigError: wrong width.
        """
        if x.shape[-1] != self.d_in:
            raise ConfigError(
                f"activations are {x.shape[-1]} wide, this SAE reads {self.d_in}; check the model and site"
            )
        rows = x.reshape(-1, self.d_in).to(self.W_dec.dtype)
        if self.encoder is not None:
            with torch.no_grad():
                return cast(Encoder, self.encoder).encode(rows)
        if self.rule == "topk" and self.k is not None:
            code = select_code(rows, self.W_enc, self.b_enc, TopK(self.k), None)
            return code.with_values(code.values.relu())
        assert self.threshold is not None
        return select_code(rows, self.W_enc, self.b_enc, Above(self.threshold), None)

    def decode(self, code: SparseCode | Tensor, x: Tensor | None = None) -> Tensor:
        """Raw activations of a code.

        Args:
            code: a `SparseCode`, or dense latents (..., d_sae).
            x: the input (rows, d_in); needed by a skip transcoder only.

        Returns:
            (rows, d_out), or (..., d_out) for dense latents.
        """
        if isinstance(code, SparseCode):
            out = decode(code, self.W_dec, self.b_dec)
        else:
            out = shards.sum_over_latents(code @ self.W_dec) + self.b_dec
        if self.W_skip is not None:
            if x is None:
                raise ConfigError("this SAE has a skip connection: pass decode(code, x) the input too")
            out = out + x.reshape(*out.shape[:-1], self.d_in).to(out.dtype) @ self.W_skip.T
        return out

    def part(self, shard: Shard) -> SAE:
        """The latents of one rank of several that hold the dictionary together; works inside `ops.latents_over(shard)`.

        Raises:
            ConfigError: rule plugin, whose encoder cannot be cut here.
        """
        if self.rule == "plugin":
            raise ConfigError("an SAE that is encoded by a plugin cannot share out its latents; use one device")
        own = slice(shard.first, shard.last)
        with shards.latents_over(shard):
            return SAE(
                self.W_enc[own],
                self.b_enc[own],
                self.W_dec[own],
                self.b_dec,
                rule=self.rule,
                threshold=None if self.threshold is None else self.threshold[own],
                k=self.k,
                W_skip=self.W_skip,
                meta=self.meta,
            )

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction, with the shape (..., d_out) and dtype of `x`."""
        out = self.decode(self.encode(x), x.reshape(-1, self.d_in))
        return out.reshape(*x.shape[:-1], self.d_out).to(x.dtype)

    def save(self, folder: str | Path) -> Path:
        """Writes `sae.safetensors` and `sae.json` into a folder: each under a temporary name, synced, then renamed.

        Returns:
            The folder.

        Raises:
            CheckpointError: the disk refused; nothing half written stands under the final names.
        """
        folder = Path(folder)
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        structure = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "rule": self.rule,
            "k": self.k,
            "d_in": self.d_in,
            "d_out": self.d_out,
            "d_sae": self.d_sae,
            "vectors_sha256": _vectors_sha256(tensors),
        }
        if self.encoder is not None:
            from saeforge import own_encoder  # finds plugins, which a folded SAE has no use for

            structure["encoder"] = own_encoder.describe(self.encoder, cast(Encoder, self.encoder).arguments)
        provenance = {key: value for key, value in self.meta.items() if key not in structure}
        text = json.dumps({**structure, **provenance}, indent=2) + "\n"  # before anything is written: it may fail
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _replace(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path))
            _replace(folder / META_FILE, lambda path: path.write_text(text))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"could not save the SAE to {folder}: {error}; free space or choose another folder"
            ) from error
        return folder

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> SAE:
        """Reads a folder written by `save`.

        Raises:
            CheckpointError: missing, damaged, or written by a newer format.
        """
        folder = Path(folder)
        weights, meta_path = folder / WEIGHTS_FILE, folder / META_FILE
        for path in (meta_path, weights):
            if not path.is_file():
                raise CheckpointError(
                    f"no SAE in {folder}: {path.name} is missing; give a RUN folder or its sae/ folder (another "
                    "tool's SAE: `saeforge import`)"
                )
        try:
            meta = json.loads(meta_path.read_text())
            _check_origin(meta)
            with safe_open(weights, framework="pt", device=str(device)) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            _check_floats(tensors)
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise CheckpointError(f"the SAE in {folder} is damaged ({error}); save or copy it again") from error
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise CheckpointError(f"{meta_path} is not a saeforge SAE; another tool's goes through `saeforge import`")
        version = meta.get("version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CheckpointError(
                f"{folder} has SAE format {version}, this saeforge reads up to {FORMAT_VERSION}; upgrade it"
            )
        own = meta.get("rule") == "plugin"
        missing = {"W_dec", "b_dec", *(() if own else ("W_enc", "b_enc"))} - tensors.keys()
        if missing:
            raise CheckpointError(f"{weights} lacks {', '.join(sorted(missing))}; save or copy the SAE again")
        structure = ("format", "version", "rule", "k", "d_in", "d_out", "d_sae", "vectors_sha256")
        lost = [name for name in structure if name not in meta]
        if lost or not isinstance(version, int):
            raise CheckpointError(
                f"{meta_path} is damaged ({', '.join(lost) or 'version'}); save or copy the SAE again"
            )
        try:
            sae = cls(
                tensors.get("W_enc"),
                tensors.get("b_enc"),
                tensors["W_dec"],
                tensors["b_dec"],
                rule=meta["rule"],
                k=meta["k"],
                threshold=tensors.get("threshold"),
                W_skip=tensors.get("W_skip"),
                encoder=_rebuilt(folder, meta, tensors) if own else None,
                meta={key: value for key, value in meta.items() if key not in (*structure, "encoder")},
            )
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"the SAE in {folder} is damaged ({error}); save or copy it again") from error
        widths = [meta["d_in"], meta["d_out"], meta["d_sae"]]
        if meta["vectors_sha256"] != _vectors_sha256(tensors) or widths != [sae.d_in, sae.d_out, sae.d_sae]:
            raise CheckpointError(
                f"{META_FILE} and {WEIGHTS_FILE} in {folder} are damaged, or belong to two SAEs; save or copy it again"
            )
        return sae

    def __repr__(self) -> str:
        rule = f"k={self.k}" if self.rule == "topk" else "threshold"
        site = (self.meta.get("site") or {}).get("id")
        return f"SAE(d_in={self.d_in}, d_sae={self.d_sae}, {rule}{f', site={site}' if site else ''})"


def load(run: str | Path, *, device: str | torch.device = "cpu") -> SAE:
    """The SAE of a RUN folder (`runs/<name>`) or of an `sae/` folder.

    Raises:
        CheckpointError: no SAE there, or a damaged one.
    """
    run = Path(run)
    if not run.exists():
        raise CheckpointError(f"{run} does not exist; expected a RUN folder (runs/<name>) or an sae/ folder")
    if (run / "sae" / META_FILE).is_file():
        run = run / "sae"
    elif several := sorted(path.parents[1] for path in run.glob(f"*/sae/{META_FILE}")):
        raise CheckpointError(f"{run} holds several SAEs: {', '.join(map(str, several))}; give one of these folders")
    elif not (run / META_FILE).is_file() and (run / "checkpoints").is_dir():
        raise CheckpointError(
            f"{run} has no finished SAE yet; go on with `saeforge fit --config {run}/config.yaml --ckpt_path last`"
        )
    return SAE.load(run, device=device)


def _check_origin(meta: Any) -> None:
    """Sees that what is said of model, sites and variant has the shape that its readers count on.

    Raises:
        ValueError: it has another.
    """
    if not isinstance(meta, dict):
        return
    for key in ("model", "site", "target", "variant", "training", "imported"):
        if not isinstance(meta.get(key), dict | None):
            raise ValueError(f"{key} is a {type(meta[key]).__name__}")
    for key in ("site", "target"):
        place = meta.get(key) or {}
        if not all(isinstance(place.get(word), str | None) for word in ("id", "module_path", "where")):
            raise ValueError(f"{key} is not named by texts")
    if not isinstance((meta.get("model") or {}).get("name"), str | None):
        raise ValueError("the model's name is no text")


def _check_floats(tensors: dict[str, Tensor]) -> None:
    """Sees that the SAE's own tensors are of floats; an encoder of rule plugin may keep others.

    Raises:
        ValueError: one is not.
    """
    for name, tensor in tensors.items():
        if "." not in name and not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}")


def _rebuilt(folder: Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    from saeforge import own_encoder  # see `save`

    return own_encoder.rebuild(folder, meta, tensors)


def _vectors_sha256(tensors: dict[str, Tensor]) -> str:
    """Ties the two files together: a digest of the vectors (the matrices would take seconds) and of all shapes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        if tensors[name].ndim == 1:
            digest.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _replace(path: Path, write: Any) -> None:
    """Temporary name + fsync + rename: a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
