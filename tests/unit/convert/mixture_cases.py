"""Mixtures of experts that compute what the dense layer did which they are made of."""

FIVE_CORES = (
    'c_fc={kind="mpo", in_modes=[2, 2, 2, 2, 2], out_modes=[2, 2, 4, 4, 2]}, '
    'c_proj={kind="mpo", in_modes=[2, 2, 4, 4, 2], out_modes=[2, 2, 2, 2, 2]}'
)
THREE_CORES = (
    'c_fc={kind="mpo", in_modes=[4, 2, 4], out_modes=[4, 8, 4]}, '
    'c_proj={kind="mpo", in_modes=[4, 8, 4], out_modes=[4, 2, 4]}'
)
ASYMMETRIC = (
    'c_fc={kind="asymmetric", in_mode=8, out_mode=16}, '
    'c_proj={kind="asymmetric", in_mode=16, out_mode=8}'
)
SWITCH = 'top_k=1, gate="straight_through"'
MIXTURES = {
    "top-1": f"num_experts=4, router={{{SWITCH}}}, {THREE_CORES}",
    "top-1, gate at the input": f"num_experts=3, router={{{SWITCH}, gate_at='input'}}, "
    f"{ASYMMETRIC}",
    "top-2, published shape": f"num_experts=4, router={{top_k=2}}, {FIVE_CORES}",
    "balanced, no token dropped": f"num_experts=4, router={{{SWITCH}, bias=true, "
    f"balance_rate=0.01, eval_capacity_factor=4.0}}, {ASYMMETRIC}",
    "all experts": f"num_experts=2, router={{top_k=2, normalise=false}}, {THREE_CORES}",
    "one expert": f"num_experts=1, {THREE_CORES}",
    "dense experts in every other block": f"num_experts=3, every=2, router={{{SWITCH}}}",
}
