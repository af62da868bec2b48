"""What a run of `fit` needs before it is started: memory, floor of a step, traffic. Pure numbers, nothing is imported.

A step on one device, in the order in which it happens (2 B d_in d_sae FLOP and everything else by its bytes):

    encoder product    2 b d_in f                      f = d_sae / latent ranks, b = B / data ranks
    pre-activations    2 e b f                         written once, read once; e = bytes of the compute type
    gathers            e b k' (2 d_out + d_in)         decode; gradients of values and W_dec together; of W_enc
    optimizer          (32 + 2 if bf16) f (d_in + d_out)
                                                       gradient written; RowAdam reads p g m v, writes p m v, the copy
    exchange           see `traffic`

where k' = k / latent ranks. Every gather is charged to memory, and the parts are added up: a floor, not a forecast.
Kernels that must wait for the launch of the next, AuxK's dead latents and what other work takes come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from saeforge.errors import ConfigError

PRECISIONS = ("bf16-mixed", "32-true")
LAYOUTS = ("ddp", "latent")
#: Rows that a variant is initialised from (training.module.INITIAL_ROWS; a test holds the two together).
INITIAL_ROWS = 32_768
#: Bytes of a block of the loader at most (data.layout.MAX_BLOCK_BYTES), and batches that its ring holds.
BLOCK_BYTES, BATCH_RING = 1 << 24, 3
#: Blocks of a window and lanes of an order, as `saeforge fit` has them by default.
WINDOW_BLOCKS, LANES = 4, 8
#: ops.engine: bytes of a chunk of pre-activations on a GPU; on a CPU, with its least rows and what these may take.
CUDA_CHUNK, CHUNK, CHUNK_ROWS, CHUNK_MOST = 1 << 30, 1 << 24, 256, 1 << 28
#: Bytes of a step for each number of a row beside the stored ones: the scaled and the shifted row, its bf16 form, the
#: reconstruction, the error, its square and its gradient, in fp32.
ROW_BYTES = 4 * 6 + 2
#: Bytes for each entry of a code: two values, the index, its place by latent and its row, two gradients.
ENTRY_BYTES = 4 + 4 + 8 + 8 + 8 + 4 + 4
#: Bytes of a held-out number: three in fp32, and five in the float64 of the metrics.
VALIDATION_BYTES = 4 * 3 + 8 * 5


@dataclass(frozen=True)
class Device:
    """What one device does in a second. G is 1e9.

    Attributes:
        name: of the device. tflops: of a large bf16 product. tflops_fp32: of an fp32 one (no TF32).
        bandwidth: GB/s of its memory. link: GB/s to a device of the same node, one direction.
        network: GB/s to another node, one direction, its share of the node's. memory: GB.
        per_node: devices of a node. host: the device is the CPU, whose memory also holds what a GPU leaves to its host.
    """

    name: str
    tflops: float
    tflops_fp32: float
    bandwidth: float
    link: float
    network: float
    memory: float
    per_node: int = 8
    host: bool = False


#: h200: 790 TFLOP/s and 4.3 TB/s measured, 80% and 90% of the data sheet; the other GPUs are taken at these shares of
#: theirs. cpu: two cores with AVX-512 BF16, measured, fp32 by way of the bf16 screen.
DEVICES = {
    device.name: device
    for device in (
        Device("h200", 790, 54, 4300, 450, 50, 141),
        Device("h100", 790, 54, 3000, 450, 50, 80),
        Device("a100", 250, 16, 1830, 300, 25, 80),
        Device("l4", 97, 24, 270, 25, 1.5, 24),
        Device("rtx4090", 132, 66, 900, 25, 1.5, 24),
        Device("cpu", 0.7, 0.5, 25, 2, 1, 16, per_node=1, host=True),
    )
}


@dataclass(frozen=True)
class Shape:
    """What is trained.

    Attributes:
        d_in, d_out, d_sae: widths. k: active latents of a row. batch: rows of an optimizer step, over all devices.
        precision: `bf16-mixed` or `32-true`. number_bytes: of a stored number; 2 for bf16 shards.
        block_rows: of a stored block; None: the largest that `saeforge harvest` makes.
    """

    d_in: int
    d_sae: int
    k: int
    batch: int
    d_out: int | None = None
    precision: str = "bf16-mixed"
    number_bytes: int = 2
    block_rows: int | None = None

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae", "k", "batch", "d_out", "block_rows"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise ConfigError(f"{name} = {given}: expected a positive number")
        if self.k > self.d_sae:
            raise ConfigError(f"k = {self.k} with d_sae = {self.d_sae}: expected 1 <= k <= d_sae")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision = {self.precision}: expected {' or '.join(PRECISIONS)}")

    @property
    def out(self) -> int:
        """Width of the reconstruction."""
        return self.d_out or self.d_in

    @property
    def token_bytes(self) -> int:
        """Bytes of a stored row: an SAE's input is its target, a transcoder has both."""
        return self.number_bytes * (self.d_in + (self.d_out or 0))

    @property
    def window_rows(self) -> int:
        """Rows of a lane's window."""
        widest = self.number_bytes * max(self.d_in, self.out)
        return WINDOW_BLOCKS * (self.block_rows or 1 << (max(1, BLOCK_BYTES // widest).bit_length() - 1))

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in the compute type."""
        return 2 if self.precision == "bf16-mixed" else 4


@dataclass(frozen=True)
class Layout:
    """`data` groups, each with rows of its own, of `latents` devices with d_sae / latents each. DDP is latents = 1."""

    data: int = 1
    latents: int = 1

    @property
    def devices(self) -> int:
        """All of them."""
        return self.data * self.latents

    @property
    def name(self) -> str:
        """`ddp`, or `latent` with its mesh."""
        return "ddp" if self.latents == 1 else f"latent {self.data}x{self.latents}"

    def check(self, shape: Shape) -> None:
        """Refuses what does not divide.

        Raises:
            ConfigError: rows or latents do not divide by the devices that share them.
        """
        if shape.batch % self.data:
            raise ConfigError(f"batch = {shape.batch} is not a multiple of {self.data} devices that share its rows")
        if shape.batch % lanes(self):
            raise ConfigError(
                f"batch = {shape.batch} is not a multiple of the {lanes(self)} lanes that it is read from"
            )
        if shape.d_sae % self.latents:
            raise ConfigError(f"d_sae = {shape.d_sae} is not a multiple of {self.latents} devices that share it")


def layout_of(kind: str, devices: int, device: Device, latent_ranks: int | None = None) -> Layout:
    """A layout for so many devices; latents stay inside a node unless `latent_ranks` says otherwise.

    Raises:
        ConfigError: no such kind, or `latent_ranks` does not divide the devices.
    """
    if kind not in LAYOUTS:
        raise ConfigError(f"layout {kind!r}: expected {' or '.join(LAYOUTS)}")
    if devices < 1:
        raise ConfigError(f"devices = {devices}: expected a positive number")
    if kind == "ddp":
        return Layout(devices)
    ranks = min(devices, device.per_node) if latent_ranks is None else min(devices, latent_ranks)
    if ranks < 1 or devices % ranks:
        raise ConfigError(f"latent_ranks = {ranks} does not divide {devices} devices")
    return Layout(devices // ranks, ranks)


def memory(shape: Shape, layout: Layout, device: Device) -> dict[str, int]:
    """Bytes on a device, by part, and the highest sum of them.

    Returns:
        `weights`, `gradients`, `adam`, `bf16_copies` and `windows` (the loader's, with its ring of batches) stay;
        `chunk` of pre-activations, `rows` and `code` are a step's; under DDP `bucketing`, a gradient on its way into
        its bucket; `validation` is a folded copy of the SAE and what it computes; `initialisation` comes before
        gradients and Adam. `peak` is the highest sum on the device, `host` what a process takes beside a GPU.
    """
    layout.check(shape)
    f, rows = shape.d_sae // layout.latents, shape.batch // layout.data
    widest, bf16 = max(shape.d_in, shape.out), shape.precision == "bf16-mixed"
    weights = 4 * (f * (shape.d_in + shape.out + 1) + shape.out)
    screen = 2 * f * shape.d_in if device.host else 0  # the encoder in bf16, for exact fp32 at its price
    windows = 2 * lanes(layout) // layout.data * shape.window_rows * (shape.token_bytes + 8)
    numbers = shape.token_bytes // shape.number_bytes
    # The rows as fp32; the geometric median wants them scaled, in float64, and their distances.
    initialisation = INITIAL_ROWS * (shape.token_bytes + (4 * numbers if shape.number_bytes < 4 else 0))
    initialisation += INITIAL_ROWS * shape.out * (4 + 8 + 8)
    # In whole blocks; the SAE holds weights of its own.
    held_out = max(rows, shape.window_rows // WINDOW_BLOCKS)
    validating = weights + screen + _chunk(f, held_out, 4, device) + held_out * VALIDATION_BYTES * widest
    parts = {
        "weights": weights,
        "gradients": weights,
        "adam": 2 * weights,
        "bf16_copies": 2 * f * (shape.d_in + shape.out) if bf16 else screen,
        "windows": windows + (BATCH_RING if device.host else 2) * rows * shape.token_bytes,
        "chunk": _chunk(f, rows, shape.compute_bytes, device),
        "rows": rows * ROW_BYTES * widest,
        "code": rows * -(-shape.k // layout.latents) * ENTRY_BYTES,
        "bucketing": 4 * f * widest if layout.data > 1 else 0,
        "validation": validating,
        "initialisation": initialisation if device.host else 0,
    }
    stay = sum(parts[name] for name in ("weights", "gradients", "adam", "bf16_copies", "windows"))
    step = stay + sum(parts[name] for name in ("chunk", "rows", "code", "bucketing"))
    parts["peak"] = max(step, stay + parts["validation"], weights + parts["initialisation"])
    # Weights are made on the host and then moved; a GPU's windows are read into pinned memory.
    parts["host"] = 0 if device.host else max(weights + initialisation, windows)
    return parts


def lanes(layout: Layout) -> int:
    """`data.lanes`: the default, or the least multiple of the data ranks above it."""
    return LANES if layout.data <= LANES and LANES % layout.data == 0 else -(-LANES // layout.data) * layout.data


def _chunk(f: int, rows: int, number_bytes: int, device: Device) -> int:
    """Bytes of the pre-activations that are in memory at once, as `ops.engine` cuts them."""
    row = f * (2 if device.host else number_bytes)  # fp32 on a CPU is screened in bf16
    if not device.host:
        return min(rows, max(1, CUDA_CHUNK // row)) * row
    return min(rows, max(1, CHUNK // row, min(CHUNK_ROWS, CHUNK_MOST // row))) * row


def traffic(shape: Shape, layout: Layout) -> dict[str, int]:
    """Bytes that a rank hands to the collectives of a step (a ring sends up to twice as many).

    Returns:
        `gradients` (fp32) and `counts` of firings (int64), summed over data ranks; `candidates`, the k
        largest values of each row (fp32), gathered from all latent ranks, `reconstruction` (in the compute type) and
        `sums` (the pre-encoder bias' gradient, the gradients' norm), summed over them, as `ops.shards` has it; `rows`
        as they were stored, which the first of these ranks hands on to the others, and `copies`, of the decoder bias'
        gradient where rows are shared too.
    """
    f, rows = shape.d_sae // layout.latents, shape.batch // layout.data
    found = dict.fromkeys(("gradients", "counts", "candidates", "reconstruction", "sums", "rows", "copies"), 0)
    if layout.data > 1:
        found["gradients"] = 4 * (f * (shape.d_in + shape.out + 1) + shape.out)
        found["counts"] = 8 * f
    if layout.latents > 1:
        found["candidates"] = 4 * rows * min(shape.k, f)
        found["reconstruction"] = shape.compute_bytes * rows * shape.out
        found["sums"] = 4 * shape.d_in + 8
        found["rows"] = shape.token_bytes * rows
        found["copies"] = 4 * shape.out if layout.data > 1 else 0
    return found


def seconds(shape: Shape, layout: Layout, device: Device) -> dict[str, float]:
    """Floor of a step by part, in seconds; the head of this file has the formulas. `step` is their sum."""
    layout.check(shape)
    f, rows, e = shape.d_sae // layout.latents, shape.batch // layout.data, shape.compute_bytes
    bf16, width = shape.precision == "bf16-mixed", shape.d_in + shape.out
    rate, bandwidth = 1e12 * (device.tflops if bf16 else device.tflops_fp32), 1e9 * device.bandwidth
    sent = traffic(shape, layout)
    parts = {
        "encoder_product": 2 * rows * shape.d_in * f / rate,
        "pre_activations": 2 * e * rows * f / bandwidth,
        "gathers": e * rows * shape.k / layout.latents * (2 * shape.out + shape.d_in) / bandwidth,
        "optimizer": (32 + (2 if bf16 else 0)) * f * width / bandwidth,
        "exchange": _all_reduce(sent["gradients"] + sent["counts"], layout.data, layout.latents, device)
        + _all_reduce(sent["reconstruction"] + sent["sums"], layout.latents, 1, device)
        + _all_gather(sent["candidates"], layout.latents, device)
        + _hand_on(sent["rows"] + sent["copies"], layout.latents, device),
    }
    return {**parts, "step": sum(parts.values())}


def _all_reduce(size: int, ranks: int, apart: int, device: Device) -> float:
    """Seconds of a ring: 2 (n - 1) / n of the bytes over the slower of links and network.

    Args:
        size: bytes of each rank. ranks: of the group. apart: its neighbours are so many devices apart.
    """
    if ranks == 1:
        return 0.0
    inside = max(1, min(ranks, device.per_node // apart))  # members of the group in one node, with a share each
    nodes = -(-ranks // inside)
    linked = 2 * (ranks - 1) / ranks * size / (1e9 * device.link) if inside > 1 else 0.0
    networked = 2 * (nodes - 1) / nodes * size / (1e9 * device.network * inside) if nodes > 1 else 0.0
    return max(linked, networked)


def _all_gather(size: int, ranks: int, device: Device) -> float:
    """Seconds until each of `ranks` neighbours has what all of them sent."""
    inside = min(ranks, device.per_node)
    rate = device.link if ranks <= device.per_node else device.network * inside
    return (ranks - 1) * size / (1e9 * rate)


def _hand_on(size: int, ranks: int, device: Device) -> float:
    """Seconds until what the first of `ranks` neighbours has went from each to the next, in pieces."""
    return size / (1e9 * (device.link if ranks <= device.per_node else min(device.link, device.network)))


@dataclass(frozen=True)
class Plan:
    """A run on one layout.

    Attributes:
        memory: bytes of a device. seconds: floor of a step. traffic: bytes that a rank hands over in a step.
        tokens_per_second: of all devices together. disk: GB/s that they read together.
        fits: whether the peak is within the device's memory. limit: the longest part of a step.
    """

    layout: Layout
    memory: dict[str, int]
    seconds: dict[str, float]
    traffic: dict[str, int]
    tokens_per_second: float
    disk: float
    fits: bool
    limit: str


def plan(shape: Shape, layout: Layout, device: Device) -> Plan:
    """What a run needs.

    Raises:
        ConfigError: rows or latents do not divide by the devices that share them.
    """
    needed, floor = memory(shape, layout, device), seconds(shape, layout, device)
    rate = shape.batch / floor["step"]
    return Plan(
        layout,
        needed,
        floor,
        traffic(shape, layout),
        rate,
        rate * shape.token_bytes / 1e9,
        needed["peak"] <= 1e9 * device.memory,
        max((name for name in floor if name != "step"), key=floor.__getitem__),
    )


def assumptions(device: Device) -> list[str]:
    """What the figures rest on, one line each."""
    return [
        f"{device.name}: {device.tflops:g} TFLOP/s in bf16, {device.tflops_fp32:g} in fp32, {device.bandwidth:g} GB/s "
        f"of memory, {device.link:g} GB/s a device in a node of {device.per_node}, {device.network:g} GB/s to others "
        f"and {device.memory:g} GB",
        "a floor: parts are added up, every gather goes to memory, no kernel waits for its launch, nothing overlaps",
        "topk without dead latents: AuxK adds 8 bytes of memory for each dead latent and row, and products of its own",
        "RowAdam in fp32, one SAE; not counted: the process, the CUDA context and the allocator's slack (about 1 GB)",
        f"windows of {WINDOW_BLOCKS} blocks, {LANES} lanes or one a data rank; validation folds a copy of the SAE",
        "exchange is by rings, without latency; DDP sends fp32 gradients and does not hide them behind the backward",
        "latent sharding (trainer.strategy latent_parallel): each rank has d_sae / n latents, gathers k fp32 "
        "candidates a row and sums one reconstruction; rows are read once a group of ranks and handed on",
    ]
