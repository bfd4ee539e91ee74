"""T5 with mixtures of experts in both stacks against a loop over tokens with dense matrices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from t5_cases import SMALL, batch, shaken
from torch import Tensor, nn

from mpotrain.models.seq2seq import T5
from mpotrain.nn.moe.config import (
    AsymmetricExpertSite,
    DenseExpertSite,
    MoEConfig,
    MPOExpertSite,
    RouterConfig,
)
from mpotrain.nn.moe.experts import DenseExperts, MPOExperts
from mpotrain.nn.moe.mixture import MixtureOfExperts
from mpotrain.nn.moe.router import Router
from mpotrain.tensor.contract import rebuild

MPO = MPOExpertSite(start="independent", in_modes=(2, 6, 2), out_modes=(4, 3, 4))
MPO_BACK = MPOExpertSite(start="independent", in_modes=(4, 3, 4), out_modes=(2, 6, 2), cap=7)
HALF = AsymmetricExpertSite(start="independent", in_mode=6, out_mode=8, in_bond=3, out_bond=4)
MOE = MoEConfig(num_experts=4, c_fc=MPO, c_proj=HALF, router=RouterConfig(top_k=2, z_loss=0.001))
KINDS = [
    MOE,
    MoEConfig(num_experts=3, c_fc=MPO, c_proj=MPO_BACK, every=2),
    MoEConfig(num_experts=5, every=3, router=RouterConfig(top_k=3, bias=True)),
    MoEConfig(
        num_experts=2, c_fc=DenseExpertSite(), c_proj=MPO_BACK,
        router=RouterConfig(gate="straight_through", gate_at="input"),
    ),
]  # fmt: skip


def matrix(experts: MPOExperts | DenseExperts, number: int) -> Tensor:
    if isinstance(experts, DenseExperts):
        return experts.weight[number]
    cores = [core[number] for core in experts.auxiliaries]
    cores.insert(experts.spec.central_index, experts.central)
    return rebuild(cores, experts.spec)


class LoopOverTokens(nn.Module):
    """A mixture computed token after token, with every expert's matrices written out."""

    def __init__(self, mixture: MixtureOfExperts) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x: Tensor) -> Tensor:
        router = self.mixture.router
        result = []
        for token in x.flatten(0, 1):
            scores = router.weight @ token
            p = (scores if router.bias is None else scores + router.bias).softmax(-1)
            chosen = p.topk(router.config.top_k)
            gates = chosen.values
            if router.config.top_k > 1:
                gates = gates / gates.sum()
            elif router.config.gate == "straight_through":
                gates = torch.ones_like(gates)
            y = torch.zeros_like(token)
            for gate, expert in zip(gates, chosen.indices.tolist(), strict=True):
                inner = (token @ matrix(self.mixture.c_fc, expert)).clamp(min=0)
                y = y + gate * (inner @ matrix(self.mixture.c_proj, expert))
            result.append(y)
        return torch.stack(result).view(x.shape)


@pytest.mark.parametrize("moe", KINDS)
def test_model_equals_a_loop_over_tokens(moe: MoEConfig) -> None:
    model = shaken(T5(replace(SMALL, moe=moe), seed=3)).eval()
    data = batch()
    out = model(data)
    blocks = [*model.encoder.blocks, *model.decoder.blocks]
    replaced = [block for block in blocks if isinstance(block.ffn, MixtureOfExperts)]
    assert len(replaced) == len(model.config.mixtures())
    assert out.statistics is not None
    assert len(out.statistics["routed"]) == len(replaced)
    for block in replaced:
        block.ffn = LoopOverTokens(block.ffn)
    torch.testing.assert_close(out.loss_sum, model(data).loss_sum, rtol=1e-4, atol=1e-4)


def test_statistics_come_in_the_order_of_the_mixtures() -> None:
    config = replace(SMALL, moe=MOE)
    model, data = T5(config, seed=0), batch()
    names = [name for name, module in model.named_modules() if isinstance(module, Router)]
    assert names == [f"{mixture}.router" for mixture in config.mixtures()]
    statistics = model(data).statistics
    # 14 tokens of the source, 9 of the target, in 2 rows each.
    assert statistics["tokens"].tolist() == [28.0] * 2 + [18.0] * 3
    assert statistics["expert_tokens"].shape == (5, 4)
    assert statistics["expert_tokens"].sum(1).tolist() == [56.0] * 2 + [36.0] * 3
    with torch.no_grad():
        router = model.get_submodule("decoder.blocks.1.ffn.router")
        router.weight.zero_()  # all scores are equal: the first experts are chosen
    loads = model(data).statistics["expert_tokens"]
    assert loads[3].tolist() == [18.0, 18.0, 0.0, 0.0]
    assert all(row.tolist() != loads[3].tolist() for row in loads[[0, 1, 2, 4]])


def test_auxiliary_losses_are_means_over_the_tokens_of_each_mixture() -> None:
    model, data = T5(replace(SMALL, moe=MOE), seed=0), batch()
    out = model(data)
    told = out.statistics
    weighted = (0.01 * told["balance_loss"] + 0.001 * told["z_loss"]) / told["tokens"]
    expected = float(weighted.sum()) * data.num_tokens
    assert out.auxiliary_sum.item() == pytest.approx(expected, rel=1e-5)
    assert out.objective.item() == pytest.approx(out.loss_sum.item() + expected, rel=1e-6)
    routers = [m.weight for m in model.modules() if isinstance(m, Router)]
    gradients = torch.autograd.grad(out.auxiliary_sum, routers)
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients)
    assert model.eval()(data).auxiliary_sum is None


@pytest.mark.parametrize("moe", KINDS)
def test_every_parameter_takes_part(moe: MoEConfig) -> None:
    model = T5(replace(SMALL, moe=moe), seed=0)
    model(batch()).objective.backward()
    assert all(p.grad is not None for p in model.parameters())
