"""GPT-2 against an independent implementation, and what tensorized sites must keep."""

from dataclasses import replace

import pytest
import torch

from mpotrain.batch import Batch
from mpotrain.models.activations import activation_memory
from mpotrain.models.gpt2 import GPT2
from mpotrain.models.gpt2_config import GPT2Config, GPT2Sites
from mpotrain.nn.config import MPOSite, TTMSite
from mpotrain.nn.linear import TensorizedEmbedding, TensorizedLinear
from mpotrain.sample import causal_lengths
from mpotrain.tensor.contract import rebuild
from mpotrain.tensor.decompose import decompose

CONFIG = GPT2Config(
    vocab_size=101,
    context_length=16,
    hidden_size=24,
    num_layers=2,
    num_heads=4,
    ffn_size=96,
    dropout=0.0,
    attention_dropout=0.0,
)
FULL = GPT2Sites(
    embedding=MPOSite(in_modes=(6, 17), out_modes=(4, 6)),
    qkv=MPOSite(in_modes=(4, 6), out_modes=(12, 6)),
    attention_out=MPOSite(in_modes=(4, 3, 2), out_modes=(2, 3, 4)),
    c_fc=MPOSite(in_modes=(4, 6), out_modes=(8, 12)),
    c_proj=MPOSite(in_modes=(12, 8), out_modes=(6, 4), layout="tt"),
)


def batch(rows: int = 2, length: int = 16, vocab: int = 101, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (rows, length + 1), generator=generator)
    mask = torch.rand(rows, length, generator=generator) > 0.2
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, torch.arange(rows))


def test_logits_equal_hugging_face_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    model = GPT2(CONFIG, seed=3).double()
    model.compute_dtype = torch.float64
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=101, n_positions=16, n_embd=24, n_layer=2, n_head=4, n_inner=96,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ).double()  # fmt: skip
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in ours.values():
            parameter.add_(
                torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
                )
                * 0.05
            )
        names = {"ln_1": "norm_1", "ln_2": "norm_2", "attn.c_attn": "attention.qkv",
                 "attn.c_proj": "attention.out", "mlp": "ffn", "ln_f": "final_norm",
                 "transformer.h": "blocks", "transformer.": ""}  # fmt: skip
        for name, parameter in reference.named_parameters():
            if name == "transformer.wte.weight":
                source = ours["token_embedding.weight"]
            elif name == "transformer.wpe.weight":
                source = ours["position_embedding"]
            else:
                for old, new in names.items():
                    name = name.replace(old, new)
                source = ours[name]
                # Hugging Face keeps GPT-2's matrices as (in, out).
                source = source.T if source.ndim == 2 else source
            parameter.copy_(source)
    data = batch()
    expected = reference(data.inputs).logits
    logits = model.logits(model.hidden(data.inputs))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_attention_is_causal() -> None:
    model = GPT2(CONFIG, seed=0).eval()
    tokens = batch().inputs
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 101
    before, after = (model.logits(model.hidden(t)) for t in (tokens, changed))
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_loss_is_the_sum_over_targets_that_count() -> None:
    model, data = GPT2(CONFIG, seed=0), batch()
    out = model(data, return_logits=True)
    assert out.logits is not None
    log_p = out.logits.double().log_softmax(-1)
    picked = log_p.gather(-1, data.targets[..., None])[..., 0]
    assert out.loss_sum.item() == pytest.approx(-picked[data.loss_mask].sum().item(), rel=1e-5)
    assert int(out.num_tokens) == data.num_tokens


@torch.no_grad()
def _as_dense_twin(tensorized: GPT2) -> GPT2:
    """Return the dense model with the rebuilt matrices of `tensorized`."""
    twin = GPT2(replace(tensorized.config, sites=GPT2Sites()), seed=99)
    ours, theirs = dict(tensorized.named_parameters()), dict(twin.named_parameters())
    for name, parameter in theirs.items():
        if name in ours:
            parameter.copy_(ours[name])
    for name, module in tensorized.named_modules():
        if isinstance(module, TensorizedLinear):
            theirs[f"{name}.weight"].copy_(rebuild(list(module.cores), module.spec).T)
        elif isinstance(module, TensorizedEmbedding):
            theirs[f"{name}.weight"].copy_(rebuild(list(module.cores), module.spec))
    return twin


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tensorized_model_equals_the_dense_model_of_its_rebuilt_matrices(
    checkpointing: bool,
) -> None:
    config = replace(CONFIG, sites=FULL, activation_checkpointing=checkpointing)
    model = GPT2(config, seed=5)
    twin = _as_dense_twin(model)
    data = batch()
    ours, theirs = model(data).loss_sum, twin(data).loss_sum
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    ours.backward()
    theirs.backward()
    # dL/dcore = contraction of dL/dW: checked through the gradient of the parts not tensorized.
    for name in ("position_embedding", "blocks.0.norm_1.weight", "blocks.1.ffn.c_fc.bias"):
        left, right = model.get_parameter(name).grad, twin.get_parameter(name).grad
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


def test_a_decomposed_dense_model_gives_the_same_logits() -> None:
    dense = GPT2(CONFIG, seed=2)
    site = MPOSite(in_modes=(4, 6), out_modes=(8, 12))
    model = GPT2(replace(CONFIG, sites=GPT2Sites(c_fc=site)), seed=77)
    source = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".cores." in name:
                stem, k = name.split(".cores.")
                weight = source[f"{stem}.weight"].T
                parameter.copy_(decompose(weight, site.in_modes, site.out_modes).cores[int(k)])
            else:
                parameter.copy_(source[name])
    tokens = batch().inputs
    torch.testing.assert_close(
        model.logits(model.hidden(tokens)), dense.logits(dense.hidden(tokens)), rtol=1e-5, atol=1e-5
    )


def test_start_weights_follow_gpt2() -> None:
    config = GPT2Config(
        vocab_size=512, context_length=64, hidden_size=128, num_layers=4, num_heads=4, ffn_size=512
    )
    model = GPT2(config, seed=0)
    scaled = 0.02 / (2 * 4) ** 0.5
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            std = scaled if name.endswith(("attention.out.weight", "c_proj.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name


def test_start_weights_of_one_site_do_not_depend_on_the_others() -> None:
    dense = dict(GPT2(CONFIG, seed=4).named_parameters())
    mixed = dict(
        GPT2(replace(CONFIG, sites=GPT2Sites(c_fc=TTMSite(rank=4))), seed=4).named_parameters()
    )
    same = [name for name in dense if name in mixed]
    assert len(same) > 20
    assert all(torch.equal(dense[name], mixed[name]) for name in same)
    assert not torch.equal(
        dense["blocks.0.attention.qkv.weight"], dense["blocks.1.attention.qkv.weight"]
    )


def test_dropout_acts_in_training_only() -> None:
    model = GPT2(replace(CONFIG, dropout=0.5, attention_dropout=0.5), seed=0)
    data = batch()
    torch.manual_seed(0)
    assert model(data).loss_sum.item() != model(data).loss_sum.item()
    model.eval()
    assert model(data).loss_sum.item() == model(data).loss_sum.item()


def test_bf16_compute_is_close_to_fp32() -> None:
    data = batch()
    fp32 = GPT2(replace(CONFIG, sites=FULL), seed=1)
    bf16 = GPT2(replace(CONFIG, sites=FULL), seed=1, compute_dtype=torch.bfloat16)
    out = bf16(data)
    assert out.loss_sum.dtype == torch.float32
    assert out.loss_sum.item() == pytest.approx(fp32(data).loss_sum.item(), rel=1e-2)
    out.loss_sum.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in bf16.parameters())


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"17 tokens.*16 positions"):
        GPT2(CONFIG, seed=0).hidden(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_foretold_activation_memory_is_what_autograd_keeps(
    dtype: torch.dtype, dropout: float
) -> None:
    config = GPT2Config(
        vocab_size=1024, context_length=64, hidden_size=128, num_layers=3, num_heads=4,
        ffn_size=512, dropout=dropout, attention_dropout=0.0, sites=GPT2Sites(c_fc=TTMSite(rank=8)),
    )  # fmt: skip
    model = GPT2(config, seed=0, compute_dtype=dtype)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Casts of weights are parameters' memory; what is counted grows with the tokens.
        grows = tensor.shape[:1] == (512,) or tensor.ndim > 2
        if storage.data_ptr() not in weights and grows:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    data = batch(8, 64, 1024)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(data.inputs)
    foretold = activation_memory(config, causal_lengths(64), 8, 4 if dtype == torch.float32 else 2)
    assert foretold.blocks == pytest.approx(sum(kept.values()), rel=0.1)
    del hidden
