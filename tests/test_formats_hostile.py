"""Files made to do harm: to fill the memory, to crash a reader with values of odd kinds, to lead out of a folder.

Pickles that run something, and files that are damaged by chance, are in test_formats.py and test_formats_damage.py.
"""

from __future__ import annotations

import json
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import saeforge
from saeforge import formats
from saeforge.errors import CheckpointError, SaeforgeError
from saeforge.formats import files
from saeforge.registry import FORMATS
from tests.test_formats import GOLDEN, copied, random_sae
from tests.test_formats_damage import MAKERS, place_of, tensors_of

#: A reader that believes a hostile file asks for terabytes; one that does not needs little more than torch.
MEMORY_GROWTH = 1 << 30


def memory() -> int:
    """The most memory that this process has held, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def refused(read: Callable[[], Any], match: str | None = None) -> None:
    """One line, and no memory beyond measure."""
    before = memory()
    with pytest.raises(SaeforgeError, match=match) as error:
        read()
    assert "\n" not in str(error.value)
    assert memory() - before < MEMORY_GROWTH


# ---- tensors that are not what they seem


@pytest.mark.parametrize("format", ["qwen_scope", "openai"])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda tensor: torch.zeros(1).expand(1 << 20, 1 << 20),  # four bytes that claim to be four terabytes
        lambda tensor: torch.empty(1 << 20, 1 << 20, device="meta"),
        lambda tensor: tensor.to_sparse(),
        lambda tensor: torch.complex(tensor, tensor),
        lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        lambda tensor: [1.0, 2.0],
        lambda tensor: None,
    ],
    ids=["expanded", "meta", "sparse", "complex", "quantized", "list", "none"],
)
@pytest.mark.filterwarnings("ignore:.*(quantiz|TypedStorage):UserWarning", "ignore:.*quantiz:DeprecationWarning")
def test_a_tensor_of_an_odd_kind_is_refused(format: str, wrong: Callable[[Tensor], Any], tmp_path: Path) -> None:
    make, names = MAKERS[format]
    tensors = tensors_of(format)
    weights = make(tmp_path, tensors | {names["w_enc"]: wrong(tensors[names["w_enc"]])})
    refused(lambda: formats.read(place_of(weights, format), format), names["w_enc"])


def test_dictionary_learning_is_as_strict(tmp_path: Path) -> None:
    folder = copied("dictionary_learning/AutoEncoderTopK", tmp_path)
    tensors = torch.load(folder / "ae.pt", weights_only=True)
    torch.save(tensors | {"encoder.weight": torch.zeros(1).expand(1 << 20, 12)}, folder / "ae.pt")
    refused(lambda: formats.read(folder), r"encoder\.weight is no plain tensor")


# ---- headers and archives that claim too much


def _safetensors(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


HEADERS = {
    "a header of an exabyte": _safetensors(b"{}", length=1 << 60),
    "a header that is longer than the file": _safetensors(b"{}", length=1 << 20),
    "a terabyte of values": _safetensors(
        {"w_enc": {"dtype": "F32", "shape": [1 << 20, 1 << 18], "data_offsets": [0, 4]}}
    ),
    "offsets outside": _safetensors(
        {"w_enc": {"dtype": "F32", "shape": [1], "data_offsets": [1 << 40, (1 << 40) + 4]}}
    ),
    "offsets backwards": _safetensors({"w_enc": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"0000"),
    "a shape that overflows": _safetensors(
        {"w_enc": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}}, b"0000"
    ),
    "no header": _safetensors(b"[1, 2]"),
    "a header nested without end": _safetensors(b"[" * 100_000),
    "an unknown kind": _safetensors({"w_enc": {"dtype": "EVIL", "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_safetensors_header_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "params.safetensors").write_bytes(HEADERS[name])
    refused(lambda: formats.read(tmp_path), r"params\.safetensors is no safetensors file, or a damaged one")
    random_sae("threshold").save(tmp_path / "own")
    (tmp_path / "own" / "sae.safetensors").write_bytes(HEADERS[name])
    refused(lambda: saeforge.load(tmp_path / "own"), "damaged")


def _npz_member(shape: str, content: bytes = b"\0" * 64) -> bytes:
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (64 - (10 + len(head) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + content


@pytest.mark.parametrize(
    "shape", ["(1048576, 1048576)", "(-1, 4)", "(9223372036854775807, 4)", "(1,) + (2,)", "(__import__('os'),)"]
)
def test_an_array_that_lies_about_its_size_is_refused(shape: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
            archive.writestr(f"{name}.npy", _npz_member(shape))
    refused(lambda: formats.read(tmp_path), r"params\.npz is no \.npz of plain arrays")


def _bomb(path: Path, member: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(member, "w") as file:
        file.write(bytes(10 << 20))


def test_an_archive_that_grows_a_thousandfold_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SMALL", 1 << 20)
    _bomb(tmp_path / "params.npz", "W_enc.npy")
    refused(lambda: formats.read(tmp_path), "unpacks to 10,485,760")
    (tmp_path / "autoencoder.pt").write_bytes((tmp_path / "params.npz").read_bytes())
    refused(lambda: formats.read(tmp_path / "autoencoder.pt"), "unpacks to")


def test_an_archive_with_names_that_lead_out_writes_nothing(tmp_path: Path) -> None:
    inside = tmp_path / "deep" / "sae"
    inside.mkdir(parents=True)
    with zipfile.ZipFile(inside / "params.npz", "w") as archive:
        archive.writestr("../../escaped.npy", _npz_member("(4,)"))
    refused(lambda: formats.read(inside), "lacks")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "params.npz", "sae"]


# ---- configurations of odd kinds


ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    10**400,
    "12",
    [12],
    {"k": 12},
    float("inf"),
    float("nan"),
    "../../etc/passwd",
]
NUMBERS = {
    "saelens/topk": ("cfg.json", ["k", "d_in", "d_sae", "architecture", "metadata", "normalize_activations", "dtype"]),
    "sparsify/sae": ("cfg.json", ["k", "num_latents", "activation", "expansion_factor", "signed", "transcode"]),
    "dictionary_learning/AutoEncoderTopK": ("config.json", ["trainer", "buffer"]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_no_value_of_a_configuration_crashes_the_reader(name: str, tmp_path: Path) -> None:
    """It is read as the SAE that it is, or refused in one line."""
    folder = copied(name, tmp_path)
    file, keys = NUMBERS[name]
    config = json.loads((folder / file).read_text())
    whole = formats.read(folder)
    said = []
    for key in keys:
        for value in ODD:
            (folder / file).write_text(json.dumps(config | {key: value}))
            try:
                found = formats.read(folder)
            except SaeforgeError as error:
                said.append(str(error))
            else:
                assert (found.d_in, found.d_sae, found.rule) == (whole.d_in, whole.d_sae, whole.rule)
    assert said
    assert [text for text in said if "\n" in text] == []


@pytest.mark.parametrize("value", [10**400, float("inf"), float("nan")])
def test_a_number_that_is_none_is_refused(value: Any, tmp_path: Path) -> None:
    place = place_of(MAKERS["llama_scope"][0](tmp_path, tensors_of("llama_scope")), "llama_scope")
    config = json.loads((place / "hyperparams.json").read_text())
    (place / "hyperparams.json").write_text(json.dumps(config | {"jump_relu_threshold": value}))
    refused(lambda: formats.read(place), "expected a finite number")


@pytest.mark.parametrize(
    "change",
    [
        *(
            {key: value}
            for key in ("model", "site", "target", "variant", "training", "imported")
            for value in (5, "x", [1])
        ),
        {"site": {"id": 5, "module_path": "layers.1", "where": "out"}},
        {"site": {"id": "a", "module_path": ["b"], "where": "out"}},
        {"model": {"name": 7}},
        {"rule": ["topk"]},
        {"k": "5"},
        {"k": 10**400},
        {"d_in": "6"},
        {"version": -1.5},
        {"vectors_sha256": None},
        {"rule": "plugin", "encoder": {"class_path": "os.system", "options": {}}},
    ],
)
def test_what_our_own_files_say_is_not_believed(change: dict[str, Any], tmp_path: Path) -> None:
    random_sae("topk").save(tmp_path)
    place = tmp_path / "sae.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    refused(lambda: saeforge.load(tmp_path), "damaged|lacks|does not fold|rule plugin")


def test_our_own_files_are_not_nested_without_end_nor_of_integers(tmp_path: Path) -> None:
    random_sae("threshold").save(tmp_path)
    text, tensors = (tmp_path / "sae.json").read_text(), load_file(tmp_path / "sae.safetensors")
    (tmp_path / "sae.json").write_text('{"format": ' + "[" * 100_000)
    refused(lambda: saeforge.load(tmp_path), "damaged")
    (tmp_path / "sae.json").write_text(text)
    save_file(tensors | {"W_enc": tensors["W_enc"].to(torch.int32)}, tmp_path / "sae.safetensors")
    refused(lambda: saeforge.load(tmp_path), r"damaged \(W_enc is torch\.int32")


def test_a_yaml_that_grows_when_it_is_printed_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (tmp_path / "config.yaml").write_text("\n".join([*lines, "model_kind: *a9"]))
    save_file({"W_enc": torch.zeros(3, 3)}, tmp_path / "layer_0.safetensors")
    refused(lambda: formats.read(tmp_path / "layer_0.safetensors"), "aliases")


# ---- places


@pytest.mark.parametrize("what", ["folder", "socket of a name", "empty"])
def test_something_else_under_the_name_of_the_weights_is_refused(what: str, tmp_path: Path) -> None:
    for format in (record.name for record in FORMATS.records() if record.distribution == "saeforge"):
        place = tmp_path / f"{format}-SAE-Res-X-W1K-L0_5"
        place.mkdir()
        for name in ("cfg.json", "config.json", "sae.json", "hyperparams.json"):
            (place / name).write_text("{}")
        for name in (
            *("sae_weights.safetensors", "sae.safetensors", "ae.pt", "params.npz", "params.safetensors"),
            *("layer1.sae.pt", "autoencoder.pt", "checkpoints/final.safetensors"),
            *(("layer_3.safetensors",) if format == "circuit-tracer" else ()),
        ):
            (place / name).parent.mkdir(exist_ok=True)
            if what == "folder":
                (place / name).mkdir()
            elif what == "empty":
                (place / name).touch()
            else:
                (place / name).symlink_to("/dev/null/nothing")
        refused(lambda place=place, format=format: formats.read(place, format))  # type: ignore[misc]


def test_the_golden_files_pass_the_same_checks() -> None:
    for folder in sorted(GOLDEN.glob("*/*")):
        assert bool(np.isfinite(formats.read(folder).W_dec.numpy()).all())


def test_no_archive_check_stands_in_the_way_of_a_plain_file(tmp_path: Path) -> None:
    (tmp_path / "params.npz").write_bytes(b"no archive at all")
    with pytest.raises(CheckpointError, match=r"is no \.npz"):
        formats.read(tmp_path)
