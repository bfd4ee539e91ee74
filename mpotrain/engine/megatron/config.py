"""The section of the run file for the Megatron engine (no torch)."""

from __future__ import annotations

from typing import Literal

from mpotrain.schema import collect_problems, config

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["fp32", "bf16"]


@config
class MegatronConfig:
    """Megatron-core: the network is cut over the ranks by the degrees of `parallel`."""

    kind: Literal["megatron"] = "megatron"
    """Name of the engine."""
    dtype: Dtype = "fp32"
    """Dtype of weights and activations; masters, moments and gradient sums are always fp32."""
    distributed_optimizer: bool = True
    """Split masters and moments over the data-parallel ranks (as ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients bucket by bucket while backward goes on."""
    overlap_param_gather: bool = False
    """Gather updated weights bucket by bucket while the next forward pass goes on; needs the
    distributed optimizer and `overlap_grad_reduce`."""
    bucket_elements: int = 40_000_000
    """Gradient elements of a bucket where communication is overlapped."""
    moe_dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens travel to experts on other ranks: each to its expert, or all to all ranks."""
    cache_weights: bool = False
    """Rebuild the matrices of tensorized layers once for all micro-batches of a step, and project
    their summed gradient on the cores once; costs the memory of the dense matrices and of their
    gradients in fp32."""
    extensions: Literal["auto", "off"] = "auto"
    """Use kernels of transformer-engine and apex on CUDA where they are installed."""
    device: Device = "auto"
    """Where to compute; "auto" takes CUDA where there is any."""

    def problems(self, where: str) -> list[str]:
        """Return everything wrong with the section itself, one line each.

        Args:
            where: dotted key of this section.
        """
        return collect_problems(
            lambda: self._bucket_problems(f"{where}.bucket_elements"),
            lambda: self._overlap_problems(where),
        )

    def _bucket_problems(self, where: str) -> list[str]:
        if self.bucket_elements >= 1:
            return []
        return [f"{where}: {self.bucket_elements}; it must be at least 1"]

    def _overlap_problems(self, where: str) -> list[str]:
        if not self.overlap_param_gather:
            return []
        needed = [
            f"{where}.{key}=true"
            for key in ("distributed_optimizer", "overlap_grad_reduce")
            if not getattr(self, key)
        ]
        if not needed:
            return []
        return [
            f"{where}.overlap_param_gather: gathers what each rank of the distributed optimizer "
            "has updated, in the buckets in which gradients are reduced during backward; set "
            f"{' and '.join(needed)}, or {where}.overlap_param_gather=false"
        ]
