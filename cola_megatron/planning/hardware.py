"""GPUs as the vendor's data sheets describe them, and the shares of those figures that a plan assumes.

Every assumption of `cola plan` about speed stands in `Efficiency`; none has been measured by this project yet.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from cola_megatron.config import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """One accelerator in a node of several. All rates are peaks, per GPU; link rates count one direction."""

    name: str
    device: str
    """Regular expression that the driver's name of the device fits."""
    bf16_flops: float
    """Dense bfloat16 FLOP/s of the tensor cores (the data sheets print twice that, for 2:4 sparsity)."""
    fp32_flops: float
    """FLOP/s of float32 matrix products in torch's default, which leaves the tensor cores (TF32) unused."""
    memory_bytes: float
    memory_bandwidth: float
    """Bytes/s of the HBM."""
    node_bandwidth: float
    """Bytes/s to the other GPUs of the node (NVLink), one direction."""
    host_bandwidth: float
    """Bytes/s to the host's memory (PCIe), one direction."""
    network_bandwidth: float
    """Bytes/s to other nodes, one direction: an assumption about the cluster, one network port for each GPU."""
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU(
            name="a100",
            device=r"\bA100\b",
            bf16_flops=312e12,
            fp32_flops=19.5e12,
            memory_bytes=80 * GIB,
            memory_bandwidth=2.039e12,
            node_bandwidth=300e9,
            host_bandwidth=32e9,
            network_bandwidth=25e9,  # 200 Gb/s InfiniBand (HDR), as in DGX A100
            source="NVIDIA A100 Tensor Core GPU data sheet, A100 80GB SXM",
        ),
        GPU(
            name="h100",
            device=r"\bH100\b(?! (PCIe|NVL))",
            bf16_flops=989e12,
            fp32_flops=67e12,
            memory_bytes=80 * GIB,
            memory_bandwidth=3.35e12,
            node_bandwidth=450e9,
            host_bandwidth=64e9,
            network_bandwidth=50e9,  # 400 Gb/s InfiniBand (NDR), as in DGX H100
            source="NVIDIA H100 Tensor Core GPU data sheet, H100 SXM",
        ),
        GPU(
            name="h100-pcie",
            device=r"\bH100 PCIe\b",
            bf16_flops=756e12,
            fp32_flops=51e12,
            memory_bytes=80 * GIB,
            memory_bandwidth=2e12,
            node_bandwidth=300e9,  # the NVLink bridge of a pair
            host_bandwidth=64e9,
            network_bandwidth=25e9,  # 200 Gb/s
            source="NVIDIA H100 Tensor Core GPU data sheet, H100 PCIe",
        ),
        GPU(
            name="h100-nvl",
            device=r"\bH100 NVL\b",
            bf16_flops=835e12,
            fp32_flops=60e12,
            memory_bytes=94 * GIB,
            memory_bandwidth=3.9e12,
            node_bandwidth=300e9,  # the NVLink bridge of a pair
            host_bandwidth=64e9,
            network_bandwidth=25e9,  # 200 Gb/s
            source="NVIDIA H100 Tensor Core GPU data sheet, H100 NVL",
        ),
        GPU(
            name="h200",
            device=r"\bH200\b(?! NVL)",
            bf16_flops=989e12,
            fp32_flops=67e12,
            memory_bytes=141 * GIB,
            memory_bandwidth=4.8e12,
            node_bandwidth=450e9,
            host_bandwidth=64e9,
            network_bandwidth=50e9,  # 400 Gb/s InfiniBand (NDR)
            source="NVIDIA H200 Tensor Core GPU data sheet, H200 SXM",
        ),
        GPU(
            name="h200-nvl",
            device=r"\bH200 NVL\b",
            bf16_flops=835e12,
            fp32_flops=60e12,
            memory_bytes=141 * GIB,
            memory_bandwidth=4.8e12,
            node_bandwidth=450e9,  # the NVLink bridge of two or four
            host_bandwidth=64e9,
            network_bandwidth=25e9,  # 200 Gb/s
            source="NVIDIA H200 Tensor Core GPU data sheet, H200 NVL",
        ),
        GPU(
            name="b200",
            device=r"\bB200\b",
            bf16_flops=2250e12,
            fp32_flops=75e12,
            memory_bytes=180 * GIB,
            memory_bandwidth=8e12,
            node_bandwidth=900e9,
            host_bandwidth=64e9,
            network_bandwidth=50e9,  # 400 Gb/s InfiniBand (NDR), as in DGX B200
            source="NVIDIA DGX B200 data sheet (eight GPUs), per GPU",
        ),
    )
}
"""Names as `cola plan --gpu` takes them."""


def gpu_of_device(device_name: str) -> GPU | None:
    """The entry of a device by the name that its driver gives it, None for one that is not in the table."""
    return next((gpu for gpu in GPUS.values() if re.search(gpu.device, device_name)), None)


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that real work reaches, each to be replaced by a measurement of your own.

    Those of computation were measured on an H200 (docs/performance.md); those of traffic are assumptions.
    """

    mfu: float | None = None
    """A measured share of the peak FLOP/s for all computation of a micro-batch; it replaces the next six."""
    matrix: float = 0.77
    """Share of the peak FLOP/s in matrix products, everything elementwise around them left out."""
    attention: float = 0.23
    """Share of the peak FLOP/s in the attention product, over the pairs that the kernel computes."""
    memory: float = 0.88
    """Share of the HBM bandwidth in elementwise work and in the optimiser step."""
    elementwise_passes: float = 8.0
    """How often a byte that autograd keeps crosses the HBM in one forward and backward pass of compiled layers: written
    and read forward, read backward, its gradient written and read, and what the kernels between two products share."""
    plain_elementwise_passes: float = 21.0
    """The same of layers that are not compiled, each of whose operations reads and writes for itself."""
    kernel_seconds: float = 6e-6
    """Start of one kernel by the host: the least time that small operations take."""
    link: float = 0.75
    """Share of the bandwidth of NVLink, network and PCIe in a large transfer."""
    collective_seconds: float = 2e-5
    """Start of one collective or transfer, whatever its size."""
    overlap: float = 0.7
    """Share of the computation behind which data-parallel traffic can hide where the config overlaps it."""
    host_bandwidth: float = 40e9
    """Bytes/s at which one rank's share of the host updates parameters in host memory."""
    usable_memory: float = 0.92
    """Share of the GPU's memory that tensors may fill; the rest is the CUDA context, NCCL, and fragmentation."""


def efficiency_with(assignments: Iterable[str]) -> Efficiency:
    """The assumptions with some of them set, each as `name=value`.

    Raises:
        ConfigError: an unknown name, or a value that is no positive number (or, for a share, above 1).
    """
    names, values = [field.name for field in fields(Efficiency)], {}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        if name not in names:
            raise ConfigError(f"{assignment}: no such assumption; known are {', '.join(names)}")
        try:
            value = float(text)
        except ValueError:
            raise ConfigError(f"{assignment}: give a number, as in {name}=0.5") from None
        largest = float("1e15") if name.endswith(("elementwise_passes", "host_bandwidth")) else 1.0
        if not 0 < value <= largest:
            raise ConfigError(f"{assignment}: must lie above 0 and not above {largest:g}")
        values[name] = value
    return replace(Efficiency(), **values)
