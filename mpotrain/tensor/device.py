"""Device profiles: the constants that contraction plans are predicted with (torch-free).

A plan decides the order of floating-point operations, hence the bits of a run. Profiles are
therefore constants that are chosen by the name of the device; nothing is measured at run time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

DType = Literal["bf16", "fp32"]
"""Compute precision of a layer: the dtype of its input."""

BYTES: dict[DType, int] = {"bf16": 2, "fp32": 4}
"""Bytes of one element."""


@dataclass(frozen=True)
class DeviceProfile:
    """Speeds of one kind of device, as a training process sees them.

    A matrix product of m x k by k x n reaches the fraction
    ``1 / ((1 + (half_m/m)^p) (1 + (half_n/n)^p) (1 + (half_k/k)^p))`` of the peak.

    Attributes:
        name: how plans call the device.
        bf16_flops: reachable peak of large bf16 matrix products, FLOP/s.
        fp32_flops: the same in fp32, in the mode that torch is set to use, FLOP/s.
        bandwidth: bytes per second of operations that do not fit `cache_bytes`.
        permute_bandwidth: bytes per second (read + written) of copies that reorder axes.
        cache_bytes: working sets up to this size move at `cache_bandwidth`.
        cache_bandwidth: bytes per second out of the cache.
        cache_permute_bandwidth: bytes per second of reordering copies out of the cache.
        launch_seconds: fixed cost of one operation.
        half_m: rows m at which a product reaches half of the peak.
        half_n: likewise, columns n.
        half_k: likewise, inner size k.
        half_width: columns of the slices at which a batched product reaches half of that.
        exponent: sharpness p of the efficiency curve.
    """

    name: str
    bf16_flops: float
    fp32_flops: float
    bandwidth: float
    permute_bandwidth: float
    cache_bytes: float
    cache_bandwidth: float
    cache_permute_bandwidth: float
    launch_seconds: float
    half_m: float
    half_n: float
    half_k: float
    half_width: float
    exponent: float

    def flops(self, dtype: DType) -> float:
        """Return the peak for a compute dtype, FLOP/s."""
        return self.bf16_flops if dtype == "bf16" else self.fp32_flops

    def efficiency(self, m: int, n: int, k: int) -> float:
        """Return the reachable fraction of the peak of an m x k by k x n product."""
        fraction = 1.0
        for size, half in ((m, self.half_m), (n, self.half_n), (k, self.half_k)):
            fraction /= 1.0 + math.pow(half / max(size, 1), self.exponent)
        return fraction

    def batched_efficiency(self, n: int) -> float:
        """Return the further fraction of a product that is split into slices of n columns."""
        return 1.0 / (1.0 + math.pow(self.half_width / n, 2.0 * self.exponent))

    def permute_seconds(self, num_bytes: float) -> float:
        """Return the time in which a copy in another order of axes reads and writes `num_bytes`."""
        cached = num_bytes <= self.cache_bytes
        return num_bytes / (self.cache_permute_bandwidth if cached else self.permute_bandwidth)

    def move_seconds(self, num_bytes: float) -> float:
        """Return the time in which an operation reads and writes `num_bytes` in order."""
        cached = num_bytes <= self.cache_bytes
        return num_bytes / (self.cache_bandwidth if cached else self.bandwidth)


# One thread of a Zen 4 server core, measured with torch 2.13. Products above the cache are bound
# by the first touch of freshly allocated pages, far below the speed of main memory.
_CPU = DeviceProfile(
    name="cpu",
    bf16_flops=465e9,
    fp32_flops=107e9,
    bandwidth=3.5e9,
    permute_bandwidth=3.3e9,
    cache_bytes=24e6,
    cache_bandwidth=30e9,
    cache_permute_bandwidth=6e9,
    launch_seconds=5e-6,
    half_m=6.0,
    half_n=20.0,
    half_k=12.0,
    half_width=28.0,
    exponent=2.0,
)

# 790 TFLOP/s of bf16 products and 4.3 TB/s of copies were measured on an H200; the other GPU
# figures are nominal. fp32 is the exact mode, which torch uses unless TF32 is allowed.
_H200 = DeviceProfile(
    name="h200",
    bf16_flops=790e12,
    fp32_flops=50e12,
    bandwidth=4.3e12,
    permute_bandwidth=3.0e12,
    cache_bytes=30e6,
    cache_bandwidth=6.0e12,
    cache_permute_bandwidth=4.0e12,
    launch_seconds=4e-6,
    half_m=64.0,
    half_n=64.0,
    half_k=64.0,
    half_width=64.0,
    exponent=1.0,
)
_H100 = replace(_H200, name="h100", bandwidth=2.9e12, permute_bandwidth=2.1e12)
_A100 = replace(
    _H200,
    name="a100",
    bf16_flops=270e12,
    fp32_flops=18e12,
    bandwidth=1.7e12,
    permute_bandwidth=1.2e12,
    cache_bytes=20e6,
    cache_bandwidth=3.0e12,
    cache_permute_bandwidth=2.0e12,
)

PROFILES: dict[str, DeviceProfile] = {
    profile.name: profile
    for profile in (
        _CPU,
        _H200,
        _H100,
        _A100,
        replace(_H200, name="h200-tf32", fp32_flops=400e12),
        replace(_H100, name="h100-tf32", fp32_flops=400e12),
        replace(_A100, name="a100-tf32", fp32_flops=130e12),
    )
}
"""Built-in profiles by name; `-tf32` is for runs that allow TF32 in fp32 matrix products."""
