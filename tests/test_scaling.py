"""The arithmetic of `saeforge plan`: known figures, the sizes of real tensors, and the memory of real runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saeforge import scaling
from saeforge.cli.main import main
from saeforge.data import layout as data_layout
from saeforge.data import loader
from saeforge.data.batch import Batch
from saeforge.data.plan import Plan
from saeforge.data.tensor_source import TensorSource
from saeforge.ops import engine, shadow
from saeforge.optim import RowAdam
from saeforge.scaling import DEVICES, Layout, Shape, layout_of
from saeforge.training import module
from saeforge.variants import RunSettings, TopK

ROOT = Path(__file__).parents[1]
H200, CPU = DEVICES["h200"], DEVICES["cpu"]
A = Shape(768, 24_576, 32, 4096)
B = Shape(4096, 65_536, 100, 8192)
C = Shape(2304, 65_536, 64, 4096)
GIVEN = ["--d-in", "4096", "--d-sae", "65536", "--k=100", "--batch", "8192"]


@pytest.mark.parametrize(("shape", "ms", "tokens"), [(A, 0.73, 5.6e6), (B, 15.0, 0.55e6), (C, 5.05, 0.81e6)])
def test_floors_on_an_h200_are_those_of_the_published_accounting(shape: Shape, ms: float, tokens: float) -> None:
    """[speed 2.2]: one product, pre-activations written and read, three gathers, 34 bytes a parameter."""
    plan = scaling.plan(shape, Layout(), H200)
    assert 1e3 * plan.seconds["step"] == pytest.approx(ms, abs=0.01)
    assert plan.tokens_per_second == pytest.approx(tokens, rel=0.01)


def test_the_parts_of_shape_b() -> None:
    parts = {name: 1e3 * value for name, value in scaling.seconds(B, Layout(), H200).items()}
    wanted = {"encoder_product": 5.57, "pre_activations": 0.50, "gathers": 3 * 1.56, "optimizer": 3.50 + 0.75}
    for name, ms in wanted.items():
        assert parts[name] == pytest.approx(ms, abs=0.01), name
    assert parts["exchange"] == 0


def test_data_parallel_traffic_is_the_gradients() -> None:
    """2.15 GB in fp32; on 8 GPUs a ring of 450 GB/s takes 8 to 9 ms for it [speed 2.4]."""
    sent = scaling.traffic(B, Layout(8))
    assert sent["gradients"] == pytest.approx(2.15e9, rel=2e-3)
    assert 8e-3 < scaling.seconds(B, Layout(8), H200)["exchange"] < 9e-3


def test_latent_sharding_moves_a_fifteenth_of_that() -> None:
    sent = scaling.traffic(B, Layout(1, 8))
    assert sent["reconstruction"] == 67_108_864
    assert sent["candidates"] == 8192 * 100 * 4
    assert sent["rows"] == 8192 * 4096 * 2
    assert 15 < sum(scaling.traffic(B, Layout(8)).values()) / sum(sent.values()) < 16


@pytest.mark.parametrize("devices", [1, 2, 8, 64, 512])
def test_a_mesh_splits_rows_by_one_side_and_latents_by_the_other(devices: int) -> None:
    for kind in scaling.LAYOUTS:
        layout = layout_of(kind, devices, H200)
        assert layout.devices == devices
        alone, shared = scaling.seconds(B, Layout(), H200), scaling.seconds(B, layout, H200)
        assert shared["encoder_product"] == pytest.approx(alone["encoder_product"] / devices)
        assert shared["optimizer"] == pytest.approx(alone["optimizer"] / layout.latents)
        weights = scaling.memory(B, layout, H200)["weights"]
        assert weights == pytest.approx(scaling.memory(B, Layout(), H200)["weights"] / layout.latents, rel=1e-4)


def test_groups_across_nodes_pay_for_the_network() -> None:
    """Eight members of a node share its network in one ring; where each has its own ring, each pays alone."""
    within, across = (scaling.seconds(B, Layout(n), H200)["exchange"] for n in (8, 16))
    assert across == pytest.approx(2 * 15 / 16 * 2.148e9 / 450e9, rel=1e-3)  # links are slower than 8 x 50 GB/s
    slow = replace(H200, network=5.0)
    assert scaling.seconds(B, Layout(16), slow)["exchange"] == pytest.approx(2 / 2 * 2.148e9 / 40e9, rel=1e-3)
    mesh = scaling.seconds(B, Layout(2, 8), H200)["exchange"]
    assert mesh > 2 / 2 * 2.148e9 / 8 / 50e9
    assert within < across


def test_sizes_are_those_of_the_code() -> None:
    """Numbers that the light module repeats instead of importing torch."""
    assert scaling.INITIAL_ROWS == module.INITIAL_ROWS
    assert (scaling.BLOCK_BYTES, scaling.LANES) == (data_layout.MAX_BLOCK_BYTES, data_layout.LANES)
    assert scaling.BATCH_RING == loader.BATCH_RING
    for rows, d_sae in ((4096, 512), (4096, 24_576), (300, 65_536), (4096, 1 << 20)):
        for dtype in (torch.bfloat16, torch.float32):
            engine_rows = engine._chunk_rows(torch.empty(1, 4), torch.empty(d_sae, 4), dtype)
            chunk = scaling._chunk(d_sae, rows, dtype.itemsize, replace(CPU, host=True))
            assert dtype == torch.float32 or chunk == min(rows, engine_rows) * d_sae * dtype.itemsize
        meta = torch.empty(d_sae, 4, device="meta")
        engine_rows = engine._chunk_rows(torch.empty(1, 4, device="meta"), meta, torch.bfloat16)
        assert scaling._chunk(d_sae, rows, 2, H200) == min(rows, engine_rows) * d_sae * 2


def test_what_stays_in_memory_is_what_a_run_holds() -> None:
    """Weights, gradients, Adam's states and copies, byte for byte."""
    d, d_sae, batch = 64, 512, 256
    planned = scaling.memory(Shape(d, d_sae, 8, batch), Layout(), CPU)
    variant = TopK(d, d, d_sae=d_sae, k=8)
    torch.nn.init.normal_(variant.W_dec)
    torch.nn.init.normal_(variant.W_enc)
    variant.bind(RunSettings(compute_dtype=torch.bfloat16))
    optimizer = RowAdam(variant.param_groups())
    x = torch.randn(batch, d)
    terms = variant.step(Batch(x, x), {}).terms
    torch.stack(list(terms.values())).sum().backward()
    optimizer.step()
    parameters = list(variant.parameters())
    assert planned["weights"] == sum(each.nbytes for each in parameters)
    assert planned["gradients"] == sum(each.grad.nbytes for each in parameters if each.grad is not None)
    states = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert planned["adam"] == sum(each.nbytes for each in states)
    copies = [made for each in (variant.W_enc, variant.W_dec) if (made := shadow.to_update(each)) is not None]
    assert planned["bf16_copies"] == sum(each.rounded.nbytes for each in copies)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_windows_are_what_the_loader_allocates(world: int) -> None:
    source = TensorSource(torch.randn(40_000, 16).bfloat16())
    rows = source.block_rows("train")
    plan = Plan(source.n_blocks("train"), rows, 512, 8, 4)
    reading = loader.TrainLoader(source, plan, 60, rank=0, world=world, reuse=True)
    batches = iter(reading)
    most = 0
    for _ in range(50):
        next(batches)
        (stream,) = reading._streams
        held = [window.buffers for window in stream.windows.values()] + [free for free, _ in stream._free]
        buffers = sum(part.nbytes for window in held for part in window)
        order = sum(4 * rows * 8 for _ in held)
        most = max(most, buffers + order + sum(part.nbytes for batch in stream._outputs for part in batch))
    batches.close()  # type: ignore[attr-defined]  # a generator
    shape = Shape(16, 1024, 8, 512, block_rows=rows)
    assert scaling.memory(shape, Layout(world), CPU)["windows"] == most


def test_shapes_that_do_not_divide_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, part in (
        (["--devices=3"], "batch = 8192 is not a multiple of 3"),
        (["--devices=0"], "devices = 0"),
        (["--devices=1024"], "expected 1 to 512"),
        (["--k=0"], "k = 0"),
        (["--devices=4", "--latent_ranks=3"], "does not divide"),
        (["--memory=0"], "memory = 0"),
        (["--gpu=abacus"], "abacus"),
        (["--devicse=2"], "did you mean 'devices'"),
    ):
        assert main(["plan", *GIVEN, *words]) == 2, words
        said = capsys.readouterr().err
        assert part in said, said
        assert said.count("\n") == 1


def test_the_command_prints_all_layouts_and_its_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *GIVEN, "--devices", "512", "--gpu", "h200"]) == 0
    said = capsys.readouterr().out
    for text in ("latent 64x8", "ddp", "790 TFLOP/s", "latent_parallel", "reconstruction"):
        assert text in said, said
    assert main(["plan", *GIVEN, "--devices", "1", "--gpu", "rtx4090", "--memory", "12"]) == 0
    assert "(too much)" in capsys.readouterr().out


def test_json_says_the_same_in_bytes_and_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *GIVEN, "--devices=2", "--json", "--tflops=395", "--precision=bf16-mixed"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["layout"]["name"] for each in found["plans"]] == ["ddp", "ddp", "latent 1x2"]
    assert found["plans"][0]["seconds"]["encoder_product"] == pytest.approx(2 * 5.57e-3, rel=1e-3)
    assert found["plans"][0]["memory"] == scaling.memory(B, Layout(), H200)
    assert found["assumptions"]


def test_fp32_is_slower_and_has_no_copies_on_a_gpu() -> None:
    single = replace(B, precision="32-true")
    assert scaling.memory(single, Layout(), H200)["bf16_copies"] == 0
    assert scaling.seconds(single, Layout(), H200)["step"] > scaling.seconds(B, Layout(), H200)["step"]


def test_a_transcoder_reads_both_sides() -> None:
    both = replace(B, d_out=4096)
    assert both.token_bytes == 2 * B.token_bytes
    assert scaling.plan(both, Layout(), H200).disk == pytest.approx(2 * scaling.plan(B, Layout(), H200).disk)


@pytest.mark.parametrize("batch", ["8192", "65536"])
def test_the_worked_example_of_the_docs_is_what_the_command_prints(
    batch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *GIVEN[:-1], batch, "--gpu=h100", "--devices=8"]) == 0
    table = capsys.readouterr().out.partition("devices  layout")[2].partition("\n\n")[0]
    assert table in (ROOT / "docs" / "scaling.md").read_text()


@pytest.mark.slow
def test_memory_is_within_a_fifth_of_what_runs_take() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/check_plan.py"], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
