"""Linear layers and token embeddings: dense, or executed from a contraction plan.

Precision is explicit: parameters keep their own dtype (fp32 masters, or bf16 under an engine that
holds masters elsewhere) and are cast to the dtype of the activations where they are used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpotrain.nn.config import MPOSite, TTMSite, site_plan
from mpotrain.nn.roles import Role, set_role
from mpotrain.tensor import contract
from mpotrain.tensor.device import DType
from mpotrain.tensor.init import Scheme, init_cores
from mpotrain.tensor.plan import PROFILES, ContractionPlan
from mpotrain.tensor.spec import MPOSpec


def _make_cores(
    spec: MPOSpec, std: float, scheme: Scheme, generator: torch.Generator | None
) -> nn.ParameterList:
    """Return the cores of a freshly drawn operator, marked central or auxiliary."""
    cores = init_cores(
        spec, None if scheme == "xavier" else std, scheme=scheme, generator=generator
    )
    parameters = nn.ParameterList(nn.Parameter(core) for core in cores)
    for k, core in enumerate(parameters):
        set_role(core, Role.CENTRAL if k == spec.central_index else Role.AUXILIARY)
    return parameters


class DenseLinear(nn.Linear):
    """`y = x W + b` with a dense W; computes in the dtype of x."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        std: float,
        generator: torch.Generator | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        weight = torch.empty(out_features, in_features)
        self.weight = nn.Parameter(weight.normal_(0.0, std, generator=generator))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., I) to (..., J)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.weight.to(x.dtype), bias)


class TensorizedLinear(nn.Module):
    """`y = x W + b` where W is a matrix product operator, executed from its contraction plan.

    Only x and the cores are kept for the backward pass (Chekalina et al. 2023), whatever the
    plan; a dense W exists for the time of one matrix product at most. The plan depends on the
    number of tokens, so it is looked up (and cached) for each input shape.

    Attributes:
        spec: modes and bonds of the operator.
        cores: parameters (d_k, i_k, j_k, d_{k+1}), roles central and auxiliary.
        bias: parameter (J,) or None.
    """

    def __init__(
        self,
        spec: MPOSpec,
        site: MPOSite | TTMSite,
        *,
        bias: bool,
        std: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.site = spec, site
        self.cores = _make_cores(spec, std, site.init, generator)
        self.bias = nn.Parameter(torch.zeros(spec.out_features)) if bias else None

    def plan(self, num_tokens: int, dtype: torch.dtype, device: torch.device) -> ContractionPlan:
        """Return the plan for `num_tokens` rows of x on `device`."""
        profile = PROFILES[profile_name(device, dtype)]
        return site_plan(self.site, self.spec, num_tokens, dtype_name(dtype), profile)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., I) to (..., J)."""
        num_tokens = x.numel() // self.spec.in_features
        plan = self.plan(num_tokens, x.dtype, x.device)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return contract.linear(x, list(self.cores), self.spec, plan, bias)

    def extra_repr(self) -> str:
        """Describe the operator in `print(model)`."""
        spec = self.spec
        return (
            f"{spec.in_features} -> {spec.out_features}, modes {spec.in_modes} x "
            f"{spec.out_modes}, bonds {spec.bonds}"
        )


class DenseEmbedding(nn.Module):
    """Token embedding that is also the output layer (tied weights).

    Attributes:
        weight: parameter (V, H).
    """

    def __init__(
        self,
        num_tokens: int,
        hidden_size: int,
        *,
        std: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        weight = torch.empty(num_tokens, hidden_size)
        self.weight = nn.Parameter(weight.normal_(0.0, std, generator=generator))

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Look up tokens (B, T) and return (B, T, H) in `dtype`."""
        return functional.embedding(tokens, self.weight).to(dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Map x (..., H) to scores of all tokens (..., V)."""
        return functional.linear(x, self.weight.to(x.dtype))


class TensorizedEmbedding(nn.Module):
    """Tied embedding whose table (V, H) is a matrix product operator.

    Attributes:
        spec: rows are the vocabulary, columns the hidden size.
        cores: parameters (d_k, i_k, j_k, d_{k+1}).
    """

    def __init__(
        self,
        spec: MPOSpec,
        site: MPOSite | TTMSite,
        *,
        std: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.site = spec, site
        self.transposed_spec = spec.transposed()
        self.cores = _make_cores(spec, std, site.init, generator)

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Look up tokens (B, T) and return (B, T, H) in `dtype`."""
        return contract.embedding(tokens, list(self.cores), self.spec).to(dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Map x (..., H) to scores of all tokens (..., V): x times the transposed table."""
        num_tokens = x.numel() // self.spec.out_features
        profile = PROFILES[profile_name(x.device, x.dtype)]
        plan = site_plan(self.site, self.transposed_spec, num_tokens, dtype_name(x.dtype), profile)
        # The transposed operator has the same cores with their two middle axes swapped.
        cores = [core.transpose(1, 2) for core in self.cores]
        return contract.linear(x, cores, self.transposed_spec, plan)


def dtype_name(dtype: torch.dtype) -> DType:
    """Return the name of a compute dtype in plans: `bf16` for 16-bit types, else `fp32`."""
    return "bf16" if dtype in (torch.bfloat16, torch.float16) else "fp32"


def profile_name(device: torch.device, dtype: torch.dtype) -> str:
    """Return the device profile that plans use on `device` for inputs of `dtype`.

    In 16-bit runs cores are merged in TF32 on CUDA, in fp32 runs in full fp32.

    The profile is chosen by the name of the device and never measured at run time: the plan
    decides the order of the sums, and so the bits of the result.
    """
    if device.type != "cuda":
        return "cpu"
    name = torch.cuda.get_device_name(device).lower()
    known = next((known for known in ("h200", "h100", "a100") if known in name), "h100")
    return known if dtype == torch.float32 else f"{known}-tf32"
