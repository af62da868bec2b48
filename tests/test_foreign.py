"""Files that others wrote: every kind of array is read exactly, everything else is refused by name."""

from __future__ import annotations

import io
import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saeforge.data.foreign import Span, first_bad_row, memory_of, read_rows, scan_npy, scan_safetensors
from saeforge.data.local import expand
from saeforge.data.tarscan import scan_tar
from saeforge.errors import ConfigError, DatasetError


def npy_bytes(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def values(span: Span) -> torch.Tensor:
    """All rows of a span, as float64."""
    from saeforge.data.foreign import TORCH_DTYPES

    out = torch.empty(span.rows, span.d, dtype=TORCH_DTYPES[span.dtype])
    descriptor = os.open(span.path, os.O_RDONLY)
    try:
        read_rows(descriptor, span, 0, memory_of(out))
    finally:
        os.close(descriptor)
    return out.double()


def rows(n: int = 6, d: int = 4, dtype: str = "<f4") -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, d)).astype(dtype)


# ---- .npy


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<f8"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_an_npy_file_is_read_exactly(tmp_path: Path, dtype: str, version: tuple[int, int]) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(npy_bytes(rows(dtype=dtype), version))
    span = scan_npy(path)
    assert (span.rows, span.d, span.context) == (6, 4, None)
    assert np.array_equal(values(span).numpy(), rows(dtype=dtype).astype("<f8"))


def test_contexts_are_rows_that_know_their_length(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows(24).reshape(4, 6, 4))
    span = scan_npy(tmp_path / "x.npy")
    assert (span.rows, span.d, span.context) == (24, 4, 6)
    assert np.array_equal(values(span).numpy(), rows(24).astype("<f8"))


def test_bits_of_bfloat16_are_bfloat16(tmp_path: Path) -> None:
    x = torch.from_numpy(rows()).bfloat16()
    np.save(tmp_path / "u2.npy", x.view(torch.int16).numpy().view("<u2"))
    np.save(tmp_path / "v2.npy", x.view(torch.int16).numpy().view("V2"))
    for name in ("u2.npy", "v2.npy"):
        span = scan_npy(tmp_path / name)
        assert span.dtype == "bfloat16"
        assert torch.equal(values(span), x.double())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (npy_bytes(rows().astype(">f4")), "dtype >f4"),
        (npy_bytes(rows().astype("<i4")), "dtype <i4"),
        (npy_bytes(rows()[0]), r"shape \(4,\), expected \(rows, d\) or \(contexts, length, d\)"),
        (npy_bytes(np.zeros((0, 4), "<f4")), r"shape \(0, 4\)"),
        (npy_bytes(np.asfortranarray(rows())), "Fortran order"),
        (npy_bytes(np.zeros(3, [("a", "<f4")])), "structured dtype"),
        (npy_bytes(rows())[:-1], "has 223 bytes, its header says 224"),
        (npy_bytes(rows()) + b"x", "has 225 bytes, its header says 224"),
        (npy_bytes(rows())[:40], "a .npy header of 128 bytes"),
        (b"", "does not begin like a .npy file"),
        (b"PK\x03\x04" + bytes(200), "does not begin like a .npy file"),
        (npy_bytes(rows()).replace(b"False", b"not 1"), "damaged"),
        (npy_bytes(rows()).replace(b"(6, 4)", b"(6, 5)"), "its header says 248"),
    ],
)
def test_any_other_npy_file_is_an_error_that_names_it(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=says) as caught:
        scan_npy(path)
    assert str(path) in str(caught.value)


def test_pickled_objects_are_refused_without_being_read(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    np.save(tmp_path / "x.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(DatasetError, match="pickled Python objects"):
        scan_npy(tmp_path / "x.npy")
    assert not (tmp_path / "ran").exists()


def test_every_flipped_bit_of_an_npy_header_is_an_error_or_the_same_rows(tmp_path: Path) -> None:
    content = npy_bytes(rows())
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    whole = values(scan_npy(path))
    for bit in range(128 * 8):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            span = scan_npy(path)
        except DatasetError:
            continue
        assert torch.equal(values(span), whole), f"bit {bit}"


# ---- .safetensors


def test_tensors_of_a_safetensors_file_are_read_exactly(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(6, 4), "b": torch.randn(2, 3, 4).bfloat16(), "c": torch.randn(1, 4).half()}
    save_file(tensors, path, metadata={"note": "hello"})
    spans = scan_safetensors(path)
    assert [(span.name, span.dtype, span.context) for span in spans] == [
        ("a", "float32", None),
        ("b", "bfloat16", 3),
        ("c", "float16", None),
    ]
    for span in spans:
        assert torch.equal(values(span), tensors[span.name].reshape(-1, 4).double())
    assert [span.name for span in scan_safetensors(path, "b")] == ["b"]
    assert [span.name for span in scan_safetensors(path, "[ac]")] == ["a", "c"]


def test_other_tensors_need_a_key(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"acts": torch.randn(6, 4), "tokens": torch.zeros(6, 1, dtype=torch.int64)}, path)
    with pytest.raises(DatasetError, match=r"tokens: dtype I64.*name what you want with --key"):
        scan_safetensors(path)
    assert scan_safetensors(path, "acts")[0].rows == 6
    with pytest.raises(DatasetError, match=r"no tensor 'act'; it holds: acts, tokens"):
        scan_safetensors(path, "act")


def test_a_truncated_or_damaged_safetensors_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"acts": torch.randn(6, 4)}, path)
    content = path.read_bytes()
    bad = [content[:end] for end in (0, 5, 30, len(content) - 1)]
    bad += [struct.pack("<Q", 2**60) + content[8:], content + b"x", content.replace(b"[6,4]", b"[5,4]")]
    for damaged in bad:
        path.write_bytes(damaged)
        with pytest.raises(DatasetError, match=r"x\.safetensors"):
            scan_safetensors(path)


# ---- tar


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_a_tar_are_found_by_seeking(tmp_path: Path, tar_format: int) -> None:
    long = "deep/" * 30 + "b.npy"
    members = {
        "a.npy": npy_bytes(rows(6)),
        "a.json": b"{}",
        long: npy_bytes(rows(3, dtype="<f2")),
        "c.npy": npy_bytes(rows(1)[0]),
    }
    spans = scan_tar(write_tar(tmp_path / "x.tar", members, tar_format))
    assert [(span.name, span.rows, span.dtype) for span in spans] == [
        ("a.npy", 6, "float32"),
        (long, 3, "float16"),
        ("c.npy", 1, "float32"),
    ]
    for span, expected in zip(spans, (rows(6), rows(3, dtype="<f2"), rows(1)), strict=True):
        assert np.array_equal(values(span).numpy(), expected.astype("<f8"))
    assert [span.name for span in scan_tar(tmp_path / "x.tar", "c*.npy")] == ["c.npy"]


def test_a_tar_that_webdataset_wrote_is_read(tmp_path: Path) -> None:
    import webdataset as wds

    with wds.TarWriter(str(tmp_path / "x.tar")) as sink:
        for number in range(3):
            sink.write({"__key__": f"{number:03d}", "acts.npy": rows(5) + number, "json": {"n": number}})
    spans = scan_tar(tmp_path / "x.tar")
    assert [span.name for span in spans] == ["000.acts.npy", "001.acts.npy", "002.acts.npy"]
    assert np.array_equal(values(spans[2]).numpy(), (rows(5) + 2).astype("<f8"))


@pytest.mark.parametrize("name", ["a.pth", "a.acts.pt", "a.pickle"])
def test_pickles_in_a_tar_are_refused(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.npy": npy_bytes(rows()), name: b"x"})
    with pytest.raises(DatasetError, match=rf"{name}: is a pickle.*weights_only=True"):
        scan_tar(path)


def test_links_compression_and_emptiness_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.npy")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DatasetError, match="a link or a special file"):
        scan_tar(path)
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.npy"))
    with pytest.raises(DatasetError, match="compressed"):
        scan_tar(path)
    write_tar(path, {"a.json": b"{}"})
    with pytest.raises(DatasetError, match=r"no \.npy member"):
        scan_tar(path)
    path.write_bytes(b"")
    with pytest.raises(DatasetError, match="truncated"):
        scan_tar(path)


@pytest.fixture
def small_tar(tmp_path: Path) -> bytes:
    """Three members: header 512, array 128 + 96 bytes padded to 512, each; then the end."""
    return write_tar(tmp_path / "whole.tar", {f"{i}.npy": npy_bytes(rows() + i) for i in range(3)}).read_bytes()


def test_a_tar_cut_anywhere_is_an_error_that_names_it(tmp_path: Path, small_tar: bytes) -> None:
    path = tmp_path / "cut.tar"
    end = 3 * 1024  # of the last member; then 1,024 bytes mark the end, and the rest is padding
    for length in [*range(0, end + 1024, 64), end + 1023]:
        path.write_bytes(small_tar[:length])
        with pytest.raises(DatasetError, match=r"cut\.tar"):
            scan_tar(path)
    path.write_bytes(small_tar[: end + 1024])
    assert len(scan_tar(path)) == 3


def test_every_flipped_bit_of_a_tar_header_is_an_error(tmp_path: Path, small_tar: bytes) -> None:
    path = tmp_path / "flipped.tar"
    for bit in range(512 * 8):
        flipped = bytearray(small_tar)
        flipped[1024 + bit // 8] ^= 1 << bit % 8  # of the second of three members
        path.write_bytes(flipped)
        try:
            spans = scan_tar(path)
        except DatasetError:
            continue
        # The checksum field has room that means nothing: a space for a NUL.
        assert [(span.name, span.rows) for span in spans] == [(f"{i}.npy", 6) for i in range(3)], f"bit {bit}"


def test_a_zeroed_header_is_not_the_end(tmp_path: Path, small_tar: bytes) -> None:
    path = tmp_path / "zeroed.tar"
    path.write_bytes(small_tar[:1024] + bytes(512) + small_tar[1536:])
    with pytest.raises(DatasetError, match=r"data follows the mark of the end after 0\.npy"):
        scan_tar(path)


# ---- names, values


def test_names_expand_as_with_webdataset(tmp_path: Path) -> None:
    for name in ("a-000.tar", "a-001.tar", "b-000.tar"):
        (tmp_path / name).touch()
    names = ["a-000.tar", "a-001.tar"]
    assert [p.name for p in expand([f"{tmp_path}/a-{{000..001}}.tar"])] == names
    assert [p.name for p in expand([f"{tmp_path}/a-*.tar"])] == names
    assert [p.name for p in expand([f"{tmp_path}/{{b,a}}-000.tar"])] == ["b-000.tar", "a-000.tar"]
    assert [p.name for p in expand([f"{tmp_path}/{{b,a}}-*.tar"])] == ["b-000.tar", *names]
    for wrong, says in (
        (f"{tmp_path}/a-{{000..002}}.tar", "a-002.tar: no such file"),
        (f"{tmp_path}/c-*.tar", "matches no file"),
        (f"{tmp_path}/a-{{2..1}}.tar", "no range"),
        ("pipe:cat x.tar", "runs a shell command and is refused"),
        ("https://example.org/x.tar", "local files"),
    ):
        with pytest.raises(ConfigError, match=says):
            expand([wrong])


def test_a_bad_row_is_found_and_large_values_are_none() -> None:
    x = torch.full((5, 3), 3e38)
    assert first_bad_row(x) is None
    assert first_bad_row(torch.full((5, 3), 60000.0, dtype=torch.float16)) is None
    for bad in (float("nan"), float("inf"), -float("inf")):
        x[3, 1] = bad
        assert first_bad_row(x) == 3
