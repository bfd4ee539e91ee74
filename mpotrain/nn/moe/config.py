"""How a mixture of experts is built: router, expert matrices, which blocks have one (no torch)."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from mpotrain.errors import SpecError
from mpotrain.schema import collect_problems, config, known_size
from mpotrain.tensor.device import DeviceProfile, DType
from mpotrain.tensor.expert_plan import ExpertPlan, MergePrecision, plan_experts
from mpotrain.tensor.experts import asymmetric_spec
from mpotrain.tensor.spec import MPOSpec, mpo_spec

ExpertPlanChoice = Literal["auto", "grouped", "factored"]
ExpertInit = Literal["orthogonal", "balanced"]
ExpertStart = Literal["copies", "independent"]


_WEIGHTS = ("balance_loss", "z_loss", "balance_rate")
_CAPACITIES = ("capacity_factor", "eval_capacity_factor")


@config
class RouterConfig:
    """Which experts a token goes to, and what keeps their loads even."""

    top_k: int = 1
    """Experts of each token: 1 as in Switch (Fedus et al. 2022), 2 as in GShard."""
    gate: Literal["probability", "straight_through"] = "probability"
    """Factor of an expert's output with top_k 1: its probability p (Switch), or p divided by its
    own value: 1 in the forward pass with the gradient of log p (the released MPOE code)."""
    gate_at: Literal["output", "input"] = "output"
    """Whether the factor multiplies the expert's output or its input (top_k 1 only)."""
    normalise: bool = True
    """Divide the probabilities of the chosen experts by their sum (top_k of 2 and more)."""
    bias: bool = False
    """Whether the router's linear layer has a bias vector."""
    jitter: float = 0.0
    """Multiply the router's input by uniform noise in [1 - jitter, 1 + jitter] in training."""
    balance_loss: float = 0.01
    """Weight of the load-balancing loss E sum_e f_e P_e of a micro-batch (Fedus et al. 2022,
    eq. 4); 0 = none."""
    z_loss: float = 0.0
    """Weight of the mean squared log-sum-exp of the router's scores (Zoph et al. 2022, eq. 5)."""
    balance_rate: float = 0.0
    """Step of the selection biases that even out loads without a loss (Wang et al. 2024);
    0 = off."""
    capacity_factor: float | None = None
    """Most tokens of an expert over the even share, in training; later tokens of the micro-batch
    are dropped. Absent = no token is dropped."""
    eval_capacity_factor: float | None = None
    """The same in evaluation; generation never drops a token."""

    def problems(self, where: str, num_experts: int | None) -> list[str]:
        """Return everything wrong with the router, one line each.

        Args:
            where: dotted key of this section.
            num_experts: experts to choose from; None where their number is itself wrong.
        """
        return collect_problems(
            lambda: self._choice_problems(f"{where}.top_k", num_experts),
            lambda: self._gate_at_problems(f"{where}.gate_at"),
            lambda: self._gate_problems(f"{where}.gate"),
            lambda: self._jitter_problems(f"{where}.jitter"),
            *(partial(self._weight_problems, where, key) for key in _WEIGHTS),
            *(partial(self._capacity_problems, where, key) for key in _CAPACITIES),
        )

    def _choice_problems(self, where: str, num_experts: int | None) -> list[str]:
        if num_experts is None or 1 <= self.top_k <= num_experts:
            return []
        return [f"{where}: {self.top_k} of {num_experts} experts; use 1 to that"]

    def _gate_at_problems(self, where: str) -> list[str]:
        if self.gate_at != "input" or self.top_k <= 1:
            return []
        return [f"{where}: an input gate is defined for top_k 1 only, top_k is {self.top_k}"]

    def _gate_problems(self, where: str) -> list[str]:
        if self.gate != "straight_through" or self.top_k <= 1:
            return []
        return [
            f"{where}: straight_through is defined for top_k 1 only; with top_k {self.top_k} "
            "normalised probabilities already sum to 1"
        ]

    def _jitter_problems(self, where: str) -> list[str]:
        return [] if 0 <= self.jitter < 1 else [f"{where}: must be in [0, 1), is {self.jitter}"]

    def _weight_problems(self, where: str, key: str) -> list[str]:
        value = getattr(self, key)
        return [] if value >= 0 else [f"{where}.{key}: must not be negative, is {value}"]

    def _capacity_problems(self, where: str, key: str) -> list[str]:
        value = getattr(self, key)
        if value is None or value > 0:
            return []
        return [f"{where}.{key}: must be positive (or absent), is {value}"]


@config
class DenseExpertSite:
    """Every expert has an ordinary matrix of its own, as in Switch."""

    kind: Literal["dense"] = "dense"
    bias: bool = True
    """Whether every expert has a bias vector."""

    def spec(self, in_features: int, out_features: int) -> MPOSpec | None:
        """Return None: a dense matrix has no cores."""
        return None


@config
class MPOExpertSite:
    """Experts share the central tensor and own the others (MPOE, Gao et al. 2022)."""

    kind: Literal["mpo"] = "mpo"
    in_modes: tuple[int, ...]
    """Factors of the input size, one for each core."""
    out_modes: tuple[int, ...]
    """Factors of the output size, one for each core."""
    bonds: tuple[int, ...] | None = None
    """Inner bond dimensions; without `bonds` and `cap` they are exact."""
    cap: int | None = None
    """One bound for all bonds, instead of `bonds`."""
    bias: bool = True
    """Whether every expert has a bias vector."""
    init: ExpertInit = "orthogonal"
    """`orthogonal`: auxiliaries orthogonal, the central tensor carries the scale. `balanced`: the
    elements of all cores have one spread."""
    start: ExpertStart = "copies"
    """Auxiliaries at start: one draw copied to all experts, as in MPOE (routing parts them), or a
    draw for each, which the shared central tensor then has to serve all at once."""
    plan: ExpertPlanChoice = "auto"
    """Execution: the cheapest by the cost model, or one kind by name."""
    merge_precision: MergePrecision = "fp32"
    """Precision in which cores are merged and gradients projected on them; `compute` = that of the
    activations, as the released code: several times faster where experts are rebuilt in bf16, with
    about twice the rounding error."""

    def spec(self, in_features: int, out_features: int) -> MPOSpec:
        """Return the operator of one expert's `in_features` x `out_features` matrix.

        Raises:
            SpecError: the modes or bonds do not fit these sizes.
        """
        return mpo_spec(
            in_features,
            out_features,
            self.in_modes,
            self.out_modes,
            bonds=self.bonds,
            cap=self.cap,
            layout="ttm",
        )


@config
class AsymmetricExpertSite:
    """Experts act on one input mode and one output mode; a plain matrix between them is shared.

    W_e = L_e C R_e with L_e (in_mode, in_bond) on the first input mode, R_e (out_bond, out_mode) on
    the last output mode, and the central tensor C (in_bond, I / in_mode, J / out_mode, out_bond).
    With in_bond <= in_mode and out_bond <= out_mode one matrix product with C serves the tokens of
    all experts and costs no more than a dense layer.
    """

    kind: Literal["asymmetric"] = "asymmetric"
    in_mode: int
    """Input mode of the left auxiliary tensors; divides the input size."""
    out_mode: int
    """Output mode of the right auxiliary tensors; divides the output size."""
    in_bond: int | None = None
    """Bond between left auxiliaries and central tensor; absent = in_mode (full)."""
    out_bond: int | None = None
    """Bond between central tensor and right auxiliaries; absent = out_mode (full)."""
    bias: bool = True
    """Whether every expert has a bias vector."""
    init: ExpertInit = "orthogonal"
    """See the mpo kind."""
    start: ExpertStart = "copies"
    """See the mpo kind."""
    plan: ExpertPlanChoice = "auto"
    """Execution: the cheapest by the cost model, or one kind by name."""
    merge_precision: MergePrecision = "fp32"
    """See the mpo kind."""

    def spec(self, in_features: int, out_features: int) -> MPOSpec:
        """Return the three-core operator of one expert.

        Raises:
            SpecError: modes or bonds do not fit these sizes.
        """
        return asymmetric_spec(
            in_features, out_features, self.in_mode, self.out_mode, self.in_bond, self.out_bond
        )


ExpertSite = MPOExpertSite | AsymmetricExpertSite
"""Sites whose experts share a central tensor."""
ExpertSiteConfig = Annotated[
    DenseExpertSite | MPOExpertSite | AsymmetricExpertSite, Field(discriminator="kind")
]


def expert_site_plan(
    site: MPOExpertSite | AsymmetricExpertSite,
    spec: MPOSpec,
    num_experts: int,
    rows: int,
    dtype: DType,
    profile: DeviceProfile,
) -> ExpertPlan:
    """Return the plan of an expert site: what its layer executes and what `plan` prints.

    Args:
        site: the representation, which may force a kind of plan.
        spec: the operator of one expert.
        num_experts: experts of this process.
        rows: nominal rows over all of them; 0 is planned as 1.
        dtype: dtype of the rows.
        profile: constants of the device.
    """
    return plan_experts(
        spec,
        num_experts,
        max(rows, 1),
        dtype,
        profile,
        force=None if site.plan == "auto" else site.plan,
        merge_precision=site.merge_precision,
    )


@config
class MoEConfig:
    """A mixture of experts in place of the feed-forward layer of every n-th block."""

    num_experts: int
    """Experts of each mixture."""
    every: int = 1
    """1: every block has a mixture; n: blocks n, 2n, 3n, ... counted from 1."""
    router: RouterConfig = RouterConfig()
    """Choice of experts."""
    c_fc: ExpertSiteConfig = DenseExpertSite()
    """First matrix of every expert (hidden x ffn)."""
    c_proj: ExpertSiteConfig = DenseExpertSite()
    """Second matrix of every expert (ffn x hidden)."""

    def layers(self, num_layers: int) -> list[int]:
        """Return the numbers (from 0) of the blocks that have a mixture."""
        return [n for n in range(num_layers) if (n + 1) % self.every == 0]

    def problems(
        self, where: str, hidden_size: int | None, ffn_size: int | None, num_layers: int | None
    ) -> list[str]:
        """Return everything that makes this mixture impossible, one line each.

        What is None is itself wrong, and nothing is held against it.

        Args:
            where: dotted key of this section, at the head of every line.
            hidden_size: width of the residual stream.
            ffn_size: width between the two matrices of an expert.
            num_layers: blocks of the model.
        """
        experts = known_size(lambda: self.num_experts)
        return collect_problems(
            lambda: self._number_problems(where),
            lambda: self._interval_problems(where, num_layers),
            lambda: self.router.problems(f"{where}.router", experts),
            lambda: _operator_problems(self.c_fc, hidden_size, ffn_size, f"{where}.c_fc"),
            lambda: _operator_problems(self.c_proj, ffn_size, hidden_size, f"{where}.c_proj"),
        )

    def _number_problems(self, where: str) -> list[str]:
        if self.num_experts >= 1:
            return []
        return [f"{where}.num_experts: must be at least 1, is {self.num_experts}"]

    def _interval_problems(self, where: str, num_layers: int | None) -> list[str]:
        if num_layers is None or 1 <= self.every <= num_layers:
            return []
        return [f"{where}.every: {self.every} of {num_layers} blocks; use 1 to {num_layers}"]


def _operator_problems(
    site: DenseExpertSite | MPOExpertSite | AsymmetricExpertSite,
    in_features: int | None,
    out_features: int | None,
    where: str,
) -> list[str]:
    if in_features is None or out_features is None:
        return []
    return expert_site_problems(site, (in_features, out_features), where)


def expert_site_problems(
    site: DenseExpertSite | MPOExpertSite | AsymmetricExpertSite,
    shape: tuple[int, int],
    where: str,
) -> list[str]:
    """Return what is wrong with an expert site for matrices of `shape` (in, out).

    Args:
        site: the representation asked for.
        shape: sizes (in_features, out_features) of one expert's matrix.
        where: dotted key of the site.
    """
    try:
        spec = site.spec(*shape)
    except SpecError as error:
        return [f"{where}: {line}" for line in str(error).splitlines()]
    if spec is None:
        return []
    found = []
    if spec.num_cores < 3:
        found.append(
            f"{where}: {spec.num_cores} cores leave no auxiliary tensor on one side of the central "
            "one; use at least 3"
        )
    if spec.is_padded:
        found.append(
            f"{where}: the modes multiply to {spec.padded_in} x {spec.padded_out}, but expert "
            f"matrices are not padded: they must multiply to {shape[0]} x {shape[1]} exactly"
        )
    return found
