"""What T5 must keep: causality, documents, masks, representations, precision, start values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from t5_cases import SMALL, VOCABULARY, batch, logits_of, shaken
from torch import Tensor

from mpotrain.batch import Batch
from mpotrain.models.seq2seq import T5
from mpotrain.models.t5_config import T5Config, T5Sites
from mpotrain.nn.config import DenseSite, MPOSite, TTMSite
from mpotrain.nn.linear import TensorizedEmbedding, TensorizedLinear
from mpotrain.nn.moe.config import AsymmetricExpertSite, MoEConfig, RouterConfig
from mpotrain.nn.t5_block import RMSNorm
from mpotrain.nn.t5_stack import T5Stack, hide
from mpotrain.tensor.contract import rebuild

ALL_SITES = T5Sites(
    embedding=MPOSite(in_modes=(6, 17), out_modes=(4, 6), cap=12),
    query=MPOSite(in_modes=(4, 6), out_modes=(4, 5), cap=6),
    key=MPOSite(in_modes=(4, 3, 2), out_modes=(5, 2, 2)),
    value=MPOSite(in_modes=(4, 6), out_modes=(4, 5), layout="tt"),
    attention_out=MPOSite(in_modes=(4, 5), out_modes=(4, 6), cap=7),
    c_fc=TTMSite(rank=4),
    c_proj=MPOSite(in_modes=(8, 6), out_modes=(6, 4), cap=9),
)
MOE = MoEConfig(
    num_experts=3,
    every=2,
    router=RouterConfig(top_k=2),
    c_proj=AsymmetricExpertSite(start="independent", in_mode=6, out_mode=6, in_bond=3, out_bond=4),
)


def test_later_inputs_of_the_decoder_do_not_change_earlier_scores() -> None:
    model, data = shaken(T5(SMALL, seed=0)).eval(), batch()
    changed = data.inputs.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCABULARY
    before, after = logits_of(model, data), logits_of(model, replace(data, inputs=changed))
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


@pytest.mark.parametrize("position", [0, 13])
def test_every_position_of_the_decoder_sees_the_whole_source(position: int) -> None:
    model, data = shaken(T5(SMALL, seed=0)).eval(), batch()
    assert data.encoder_inputs is not None
    changed = data.encoder_inputs.clone()
    changed[:, position] = (changed[:, position] + 1) % VOCABULARY
    before, after = logits_of(model, data), logits_of(model, replace(data, encoder_inputs=changed))
    assert (before != after).any(-1).all()


@pytest.mark.parametrize("moe", [None, MOE])
def test_documents_in_one_row_do_not_see_one_another(moe: MoEConfig | None) -> None:
    model = shaken(T5(replace(SMALL, moe=moe), seed=0)).eval()
    first, second = batch(1, source=8, length=5), batch(1, source=11, length=9, seed=1)
    packed = _packed([first, second], padding=(3, 2))
    together = logits_of(model, packed)[0]
    torch.testing.assert_close(together[:5], logits_of(model, first)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[5:14], logits_of(model, second)[0], rtol=1e-4, atol=1e-5)
    out, alone = model(packed), [model(first), model(second)]
    for name in ("loss_sum", "num_tokens"):
        found, wanted = getattr(out, name), sum(getattr(one, name) for one in alone)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    # Without document ids the same row is another text.
    mixed = replace(packed, document_ids=None, encoder_document_ids=None)
    assert not torch.allclose(logits_of(model, mixed)[0, :5], together[:5], atol=1e-2)


def test_padding_of_a_target_whose_source_has_none_stays_finite() -> None:
    model = shaken(T5(SMALL, seed=0))
    packed = _packed([batch(1)], padding=(0, 4))
    out = model(packed, return_logits=True)
    assert out.logits is not None
    assert out.logits.isfinite().all()
    out.objective.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert out.loss_sum.item() == pytest.approx(model(batch(1)).loss_sum.item(), rel=1e-5)


def _packed(rows: list[Batch], padding: tuple[int, int]) -> Batch:
    """Put one-row batches behind one another, and padding (source, target) behind them."""
    source, target = padding

    def joined(parts: list[Tensor], extra: int) -> Tensor:
        return torch.cat([*parts, parts[0].new_zeros(1, extra)], dim=1)

    sources = [row.encoder_inputs for row in rows if row.encoder_inputs is not None]
    return Batch(
        inputs=joined([row.inputs for row in rows], target),
        targets=joined([row.targets for row in rows], target),
        loss_mask=joined([row.loss_mask for row in rows], target),
        sample_ids=torch.arange(1),
        document_ids=joined(
            [torch.full_like(row.inputs, n) for n, row in enumerate(rows, 1)], target
        ),
        encoder_inputs=joined(sources, source),
        encoder_document_ids=joined(
            [torch.full_like(tokens, n) for n, tokens in enumerate(sources, 1)], source
        ),
    )


def test_loss_counts_the_masked_targets_alone() -> None:
    model, data = shaken(T5(SMALL, seed=0)), batch()
    out = model(data, return_logits=True)
    assert out.logits is not None
    log_p = out.logits.double().log_softmax(-1).gather(-1, data.targets[..., None])[..., 0]
    assert out.loss_sum.item() == pytest.approx(-log_p[data.loss_mask].sum().item(), rel=1e-5)
    assert int(out.num_tokens) == data.num_tokens
    assert out.auxiliary_sum is None
    assert not out.statistics
    elsewhere = (data.targets + 1) % VOCABULARY
    other = replace(data, targets=torch.where(data.loss_mask, data.targets, elsewhere))
    assert torch.equal(model(other).loss_sum, out.loss_sum)


def test_right_predictions_are_counted_in_evaluation() -> None:
    model, data = shaken(T5(SMALL, seed=0)).eval(), batch()
    best = logits_of(model, data).argmax(-1)
    half = torch.arange(9) % 2 == 0
    data = replace(data, targets=torch.where(half, best, (best + 1) % VOCABULARY))
    out = model(data)
    assert out.statistics is not None
    assert int(out.statistics["correct"]) == int((data.loss_mask & half).sum()) > 0


def test_mismatched_batches_are_refused() -> None:
    model, data = T5(SMALL, seed=0), batch()
    with pytest.raises(ValueError, match=r"encoder_inputs.*span_corruption"):
        model(replace(data, encoder_inputs=None))
    with pytest.raises(ValueError, match="document ids of one sequence alone"):
        model(replace(data, document_ids=torch.ones_like(data.inputs)))
    with pytest.raises(ValueError, match="document ids of one sequence alone"):
        model(replace(data, encoder_document_ids=torch.ones_like(data.encoder_inputs)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tensorized_model_equals_the_dense_model_of_its_rebuilt_matrices(
    checkpointing: bool,
) -> None:
    config = replace(SMALL, sites=ALL_SITES, activation_checkpointing=checkpointing)
    model = T5(config, seed=5)
    dense = T5(replace(SMALL, sites=T5Sites()), seed=99)
    weights = {}
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, TensorizedLinear | TensorizedEmbedding):
            cores = [leaves[f"{name}.cores.{k}"] for k in range(len(module.cores))]
            matrix = rebuild(cores, module.spec)
            transposed = isinstance(module, TensorizedLinear)
            weights[f"{name}.weight"] = matrix.T if transposed else matrix
    kept = {name: leaf for name, leaf in leaves.items() if ".cores." not in name}
    assert (weights | kept).keys() == dict(dense.named_parameters()).keys()
    data = batch()
    theirs = torch.func.functional_call(dense, weights | kept, (data,)).loss_sum
    ours = model(data).loss_sum
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    ours.backward()
    theirs.backward()
    for name, parameter in model.named_parameters():
        wanted = leaves[name].grad
        assert wanted is not None
        assert parameter.grad is not None
        gap = (parameter.grad - wanted).abs().max() / wanted.abs().max()
        assert float(gap) < 1e-3, name


def test_checkpointing_recomputes_the_same_dropout() -> None:
    data, found = batch(), []
    for checkpointing in (False, True):
        config = replace(SMALL, dropout=0.2, moe=MOE, activation_checkpointing=checkpointing)
        model = shaken(T5(config, seed=5))
        torch.manual_seed(2)
        out = model(data)
        out.objective.backward()
        found.append([out.loss_sum, *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_activation_checkpointing_keeps_less() -> None:
    sizes = []
    for checkpointing in (False, True):
        model = T5(replace(SMALL, activation_checkpointing=checkpointing), seed=0)
        sizes.append(_kept(model, batch(4, 64, 64)))
    assert sizes[1] < sizes[0] / 2


def _kept(model: T5, data: Batch) -> int:
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(data)
    return sum(kept)


def test_bf16_compute_is_close_to_fp32() -> None:
    data = batch(4)
    config = replace(SMALL, sites=replace(ALL_SITES, embedding=DenseSite()), moe=MOE)
    config = replace(config, init_factor=0.7)
    fp32, bf16 = T5(config, seed=1), T5(config, seed=1, compute_dtype=torch.bfloat16)
    out = bf16(data)
    assert bf16.encode(data.encoder_inputs).dtype == torch.bfloat16
    assert out.loss_sum.dtype == torch.float32
    assert out.loss_sum.item() == pytest.approx(fp32(data).loss_sum.item(), rel=1e-2)
    out.objective.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in bf16.parameters())


def test_rms_norm_is_computed_in_fp32() -> None:
    norm = RMSNorm(64, 1e-3)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x), expected)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, 64))
    torch.testing.assert_close(norm(x), expected * norm.weight)
    low = x.bfloat16()  # the weight has more digits than bf16
    assert torch.equal(norm(low), norm(low.float()).bfloat16())


def test_a_query_without_any_key_has_even_weights() -> None:
    """Whatever a kernel makes of a row of minus infinities."""
    seen = torch.tensor([[True, False, True], [False, False, False]])
    weights = hide(torch.randn(1, 2, 2, 3), seen).softmax(-1)
    assert (weights[..., 0, 1] == 0).all()
    torch.testing.assert_close(weights[..., 1, :], torch.full((1, 2, 3), 1 / 3))


def test_dropout_acts_in_training_only() -> None:
    model, data = T5(replace(SMALL, dropout=0.5), seed=0), batch()
    torch.manual_seed(0)
    assert model(data).loss_sum.item() != model(data).loss_sum.item()
    model.eval()
    assert model(data).loss_sum.item() == model(data).loss_sum.item()


def test_start_weights_follow_t5() -> None:
    config = T5Config(
        vocab_size=512, hidden_size=128, head_size=16, num_layers=2, num_heads=4, ffn_size=512,
        relative_buckets=64, relative_distance=999, init_factor=0.5,
        moe=MoEConfig(num_experts=4, every=2),
    )  # fmt: skip
    wanted = {
        "token_embedding": 1.0, "query": (128 * 16) ** -0.5, "key": 128**-0.5, "value": 128**-0.5,
        "out": 64**-0.5, "relative_bias": 128**-0.5, "c_fc": 128**-0.5, "c_proj": 512**-0.5,
        "router": 128**-0.5,
    }  # fmt: skip
    seen = set()
    for name, parameter in T5(config, seed=0).named_parameters():
        owner = name.split(".")[-2]
        if "norm" in owner:
            assert (parameter == 1).all()
            continue
        seen.add(owner)
        assert parameter.std().item() == pytest.approx(0.5 * wanted[owner], rel=0.2), name
    assert seen == set(wanted)


def test_start_weights_of_one_site_do_not_depend_on_the_others() -> None:
    dense = dict(T5(SMALL, seed=4).named_parameters())
    mixed = dict(T5(replace(SMALL, sites=T5Sites(c_fc=TTMSite(rank=4))), seed=4).named_parameters())
    same = [name for name in dense if name in mixed]
    assert len(same) > 40
    assert all(torch.equal(dense[name], mixed[name]) for name in same)
    drawn = [p for name, p in dense.items() if "norm" not in name]
    assert len({p.flatten()[0].item() for p in drawn}) == len(drawn)


def test_stacks_read_their_own_relative_positions() -> None:
    model, data = T5(SMALL, seed=0).eval(), batch()
    before = logits_of(model, data)
    for stack in (model.encoder, model.decoder):
        assert isinstance(stack, T5Stack)
        kept = stack.relative_bias.weight.data.clone()
        stack.relative_bias.weight.data.mul_(-3)
        assert not torch.allclose(logits_of(model, data), before)
        stack.relative_bias.weight.data.copy_(kept)
    assert torch.equal(logits_of(model, data), before)
