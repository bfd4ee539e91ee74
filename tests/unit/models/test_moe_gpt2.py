"""GPT-2 with mixtures of experts against a loop over tokens with dense matrices."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mpotrain.batch import Batch
from mpotrain.models.activations import activation_memory
from mpotrain.models.gpt2 import GPT2
from mpotrain.models.gpt2_config import GPT2Config
from mpotrain.nn.moe.config import (
    AsymmetricExpertSite,
    DenseExpertSite,
    MoEConfig,
    MPOExpertSite,
    RouterConfig,
)
from mpotrain.nn.moe.experts import DenseExperts, MPOExperts
from mpotrain.nn.moe.mixture import MixtureOfExperts
from mpotrain.nn.roles import experts_of
from mpotrain.sample import causal_lengths
from mpotrain.tensor.contract import rebuild
from mpotrain.tensor.decompose import decompose

MPO = MPOExpertSite(start="independent", in_modes=(2, 6, 2), out_modes=(4, 6, 4))
MPO_BACK = MPOExpertSite(start="independent", in_modes=(4, 6, 4), out_modes=(2, 6, 2))
HALF = AsymmetricExpertSite(start="independent", in_mode=6, out_mode=8, in_bond=3, out_bond=4)
MOE = MoEConfig(
    num_experts=4, every=2, c_fc=MPO, c_proj=HALF, router=RouterConfig(top_k=2, z_loss=0.001)
)
CONFIG = GPT2Config(
    vocab_size=101, context_length=16, hidden_size=24, num_layers=4, num_heads=4, ffn_size=96,
    dropout=0.0, attention_dropout=0.0, init_std=0.2, moe=MOE,
)  # fmt: skip


def batch(rows: int = 2, length: int = 16, vocab: int = 101, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (rows, length + 1), generator=generator)
    mask = torch.rand(rows, length, generator=generator) > 0.2
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, torch.arange(rows))


def mixtures(model: GPT2) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def gradients(model: GPT2) -> Mapping[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return found  # type: ignore[return-value]


def matrix(experts: MPOExperts | DenseExperts, number: int) -> Tensor:
    if isinstance(experts, DenseExperts):
        return experts.weight[number]
    cores = [core[number] for core in experts.auxiliaries]
    cores.insert(experts.spec.central_index, experts.central)
    return rebuild(cores, experts.spec)


def reference(mixture: MixtureOfExperts, x: Tensor) -> Tensor:
    """Compute one token after the other, with every expert's matrices written out."""
    router, top_k = mixture.router, mixture.router.config.top_k
    result = []
    for token in x.flatten(0, 1):
        p = (router.weight @ token).softmax(-1)
        chosen = p.topk(top_k)
        gates = chosen.values / chosen.values.sum() if top_k > 1 else chosen.values
        y = torch.zeros_like(token)
        for gate, expert in zip(gates, chosen.indices.tolist(), strict=True):
            h = token @ matrix(mixture.c_fc, expert)
            h = h if mixture.c_fc.bias is None else h + mixture.c_fc.bias[expert]
            h = functional.gelu(h, approximate="tanh") @ matrix(mixture.c_proj, expert)
            y = y + gate * (h if mixture.c_proj.bias is None else h + mixture.c_proj.bias[expert])
        result.append(y)
    return torch.stack(result).view(x.shape)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_model_equals_a_loop_over_tokens(top_k: int) -> None:
    config = replace(
        CONFIG,
        moe=replace(
            MOE, router=RouterConfig(top_k=top_k), c_proj=DenseExpertSite(bias=False), every=1
        ),
    )
    model = GPT2(config, seed=3).double()
    model.compute_dtype = torch.float64
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("c_fc.bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    tokens = batch().inputs
    x = model.token_embedding(tokens, torch.float64) + model.position_embedding[:16]
    for block in model.blocks:
        x = x + block.attention(block.norm_1(x))
        x = x + reference(block.ffn, block.norm_2(x))
    torch.testing.assert_close(model.hidden(tokens), model.final_norm(x), rtol=1e-5, atol=1e-5)


def test_auxiliary_losses_are_part_of_the_objective_in_training() -> None:
    model, data = GPT2(CONFIG, seed=0), batch()
    out = model(data)
    assert out.auxiliary_sum is not None
    assert out.statistics is not None
    # Both losses of both mixtures, from the statistics (values times the B T routed tokens).
    routed = float(out.statistics["tokens"][0])
    weighted = 0.01 * out.statistics["balance_loss"] + 0.001 * out.statistics["z_loss"]
    expected = float(weighted.sum()) / routed * data.num_tokens
    assert out.auxiliary_sum.item() == pytest.approx(expected, rel=1e-5)
    assert out.auxiliary_sum.item() > 0
    assert out.objective.item() == pytest.approx(out.loss_sum.item() + expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(out.auxiliary_sum, [mixtures(model)[0].router.weight])
    assert gradient.abs().max() > 0
    model.eval()
    assert model(data).auxiliary_sum is None
    plain = GPT2(replace(CONFIG, moe=None), seed=0)(data)
    assert plain.auxiliary_sum is None
    assert not plain.statistics


def test_statistics_are_stacked_over_the_mixtures() -> None:
    model, data = GPT2(CONFIG, seed=0), batch()
    for out in (model(data), model.eval()(data)):
        assert out.statistics is not None
        assert set(out.statistics) - {"correct"} == {
            "expert_tokens", "dropped", "routed", "balance_loss", "z_loss", "router_entropy",
            "tokens",
        }  # fmt: skip
        shapes = {name: tuple(value.shape) for name, value in out.statistics.items()}
        assert shapes.pop("expert_tokens") == (2, 4)
        shapes.pop("correct", None)
        assert set(shapes.values()) == {(2,)}
        assert out.statistics["expert_tokens"].sum(1).tolist() == [64.0, 64.0]
        assert not any(value.requires_grad for value in out.statistics.values())
    # Rows are in block order: only the first mixture sends all of its tokens to one expert.
    first = mixtures(model)[0].router
    with torch.no_grad():
        first.weight.zero_()
    statistics = model(data).statistics
    assert statistics is not None
    assert statistics["expert_tokens"][0].tolist() == [32.0, 32.0, 0.0, 0.0]
    assert statistics["expert_tokens"][1].tolist() != [32.0, 32.0, 0.0, 0.0]


def test_recomputed_blocks_give_the_same_loss_statistics_and_gradients() -> None:
    data = batch()
    jitter = replace(CONFIG, moe=replace(MOE, router=replace(MOE.router, jitter=0.2)))
    results = []
    for checkpointing in (False, True):
        model = GPT2(replace(jitter, activation_checkpointing=checkpointing), seed=5)
        torch.manual_seed(7)
        out = model(data)
        out.objective.backward()
        results.append((out, gradients(model)))
    (plain, plain_gradients), (again, again_gradients) = results
    assert torch.equal(plain.objective, again.objective)
    assert plain.statistics is not None
    assert again.statistics is not None
    for name, value in plain.statistics.items():
        assert torch.equal(value, again.statistics[name])
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradient, again_gradients[name], rtol=1e-5, atol=1e-6)


def test_experts_without_tokens_have_zero_gradients() -> None:
    model = GPT2(CONFIG, seed=0)
    with torch.no_grad():
        for mixture in mixtures(model):
            mixture.router.weight.zero_()  # ties go to the lowest experts
    model(batch()).loss_sum.backward()
    for name, gradient in gradients(model).items():
        if experts_of(model.get_parameter(name)):
            assert gradient[:2].abs().max() > 0, name
            assert gradient[2:].abs().max() == 0, name


@pytest.mark.parametrize("gate_at", ["input", "output"])
def test_copies_of_a_dense_layer_compute_what_it_computes(gate_at: str) -> None:
    dense = GPT2(replace(CONFIG, moe=None), seed=2)
    router = RouterConfig(gate="straight_through", gate_at=gate_at)  # type: ignore[arg-type]
    moe = MoEConfig(num_experts=4, every=2, router=router, c_fc=MPO, c_proj=MPO_BACK)
    model = GPT2(replace(CONFIG, moe=moe), seed=77)
    source = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in source and parameter.shape == source[name].shape:
                parameter.copy_(source[name])
        for layer in (1, 3):
            for leaf in ("c_fc", "c_proj"):
                experts = model.get_submodule(f"blocks.{layer}.ffn.{leaf}")
                site = f"blocks.{layer}.ffn.{leaf}"
                modes = experts.spec.in_modes, experts.spec.out_modes
                cores = list(decompose(source[f"{site}.weight"].T, *modes).cores)
                experts.central.copy_(cores.pop(experts.spec.central_index))
                for own, core in zip(experts.auxiliaries, cores, strict=True):
                    own.copy_(core.expand_as(own))
                experts.bias.copy_(source[f"{site}.bias"].expand_as(experts.bias))
    tokens = batch().inputs
    torch.testing.assert_close(
        model.logits(model.hidden(tokens)), dense.logits(dense.hidden(tokens)), rtol=1e-5, atol=1e-5
    )


def test_mixtures_leave_the_start_weights_of_everything_else() -> None:
    dense = dict(GPT2(replace(CONFIG, moe=None), seed=4).named_parameters())
    mixed = dict(GPT2(CONFIG, seed=4).named_parameters())
    same = [name for name in dense if name in mixed and dense[name].shape == mixed[name].shape]
    assert {name.rpartition(".")[0] for name in dense.keys() - set(same)} == {
        f"blocks.{n}.ffn.{leaf}" for n in (1, 3) for leaf in ("c_fc", "c_proj")
    }
    assert all(torch.equal(dense[name], mixed[name]) for name in same)
    routers = [mixture.router.weight for mixture in mixtures(GPT2(CONFIG, seed=4))]
    assert not torch.equal(*routers)


@pytest.mark.parametrize(
    ("c_fc", "c_proj"),
    [
        (DenseExpertSite(), DenseExpertSite()),
        (
            MPOExpertSite(start="independent", in_modes=(4, 8, 4), out_modes=(8, 8, 8)),
            AsymmetricExpertSite(
                start="independent", in_mode=32, out_mode=16, in_bond=16, out_bond=8
            ),
        ),
    ],
)
def test_start_weights_of_experts_follow_gpt2(
    c_fc: MPOExpertSite | DenseExpertSite, c_proj: AsymmetricExpertSite | DenseExpertSite
) -> None:
    config = GPT2Config(
        vocab_size=64, context_length=16, hidden_size=128, num_layers=2, num_heads=4, ffn_size=512,
        moe=MoEConfig(num_experts=2, c_fc=c_fc, c_proj=c_proj),
    )  # fmt: skip
    for mixture in mixtures(GPT2(config, seed=0)):
        assert mixture.router.weight.std().item() == pytest.approx(0.02, rel=0.2)
        for expert in range(2):
            fc, proj = matrix(mixture.c_fc, expert), matrix(mixture.c_proj, expert)
            assert fc.std().item() == pytest.approx(0.02, rel=0.1)
            assert proj.std().item() == pytest.approx(0.02 / 2, rel=0.1)
        assert not torch.equal(matrix(mixture.c_fc, 0), matrix(mixture.c_fc, 1))


def test_bf16_compute_is_close_to_fp32() -> None:
    data = batch()
    config = replace(CONFIG, init_std=0.05)
    fp32, bf16 = GPT2(config, seed=1), GPT2(config, seed=1, compute_dtype=torch.bfloat16)
    out = bf16(data)
    assert out.loss_sum.dtype == torch.float32
    assert out.loss_sum.item() == pytest.approx(fp32(data).loss_sum.item(), rel=1e-2)
    out.objective.backward()
    assert all(gradient.dtype == torch.float32 for gradient in gradients(bf16).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "router",
    [
        RouterConfig(),
        RouterConfig(top_k=2, jitter=0.1),
        RouterConfig(gate="straight_through", gate_at="input"),
    ],
)
def test_foretold_activation_memory_is_what_autograd_keeps(
    router: RouterConfig, dtype: torch.dtype
) -> None:
    config = GPT2Config(
        vocab_size=64, context_length=64, hidden_size=128, num_layers=2, num_heads=4, ffn_size=512,
        dropout=0.0, attention_dropout=0.0, moe=MoEConfig(num_experts=8, every=2, router=router),
    )  # fmt: skip
    width = 4 if dtype == torch.float32 else 2

    def extra(rows: int) -> tuple[int, int]:
        plain = replace(config, moe=None)
        foretold = [
            activation_memory(c, causal_lengths(64), rows, width).blocks for c in (config, plain)
        ]
        kept = [_kept(c, dtype, rows) for c in (config, plain)]
        return foretold[0] - foretold[1], kept[0] - kept[1]

    # What grows with the tokens; casts of weights do not, and belong to no prediction.
    (many, many_kept), (few, few_kept) = extra(8), extra(4)
    assert many - few == pytest.approx(many_kept - few_kept, rel=0.02)


def _kept(config: GPT2Config, dtype: torch.dtype, rows: int) -> int:
    model = GPT2(config, seed=0, compute_dtype=dtype)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(batch(rows, 64, 64).inputs)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del hidden
    return total
