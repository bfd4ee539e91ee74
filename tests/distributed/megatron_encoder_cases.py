"""Encoders in chunks and on ranks, and how they are held against the local network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from distributed.megatron_grid import megatron_grid
from torch import Tensor, nn

from mpotrain.batch import Batch
from mpotrain.models.encoder import Encoder
from mpotrain.models.encoder_config import EncoderConfig, EncoderSites
from mpotrain.nn.config import MPOSite
from mpotrain.nn.sharing_config import BLOCK_FAMILIES, AdapterConfig, SharingConfig, StartConfig
from mpotrain.parallel.plan import ParallelConfig
from mpotrain.parallel.ranks import World

VOCABULARY, LENGTH, ROWS = 42, 16, 3
SQUARE = MPOSite(in_modes=(2, 4, 2), out_modes=(4, 2, 2))
SITES = EncoderSites(
    query=SQUARE,
    key=MPOSite(in_modes=(4, 4), out_modes=(4, 4), bias=False),
    value=SQUARE,
    attention_out=MPOSite(in_modes=(4, 2, 2), out_modes=(2, 4, 2)),
    c_fc=MPOSite(in_modes=(2, 4, 2), out_modes=(4, 4, 2)),
    c_proj=MPOSite(in_modes=(4, 4, 2), out_modes=(2, 4, 2), cap=6),
)
MPOBERT = EncoderConfig(
    vocab_size=VOCABULARY,
    context_length=LENGTH,
    hidden_size=16,
    num_layers=4,
    num_heads=4,
    ffn_size=32,
    embedding_size=8,
    dropout=0.0,
    attention_dropout=0.0,
    init_std=0.2,
    sites=SITES,
    sharing=SharingConfig(scope="central", groups=2, vectors="tied"),
    adapter=AdapterConfig(rank=2, std=0.3, families=BLOCK_FAMILIES),
)
NETWORKS = {
    "mpobert": MPOBERT,
    "mpobert-recomputed": replace(
        MPOBERT, norm="pre", activation_checkpointing=True,
        sharing=SharingConfig(scope="central", groups=1),
    ),
    "albert": replace(
        MPOBERT, sharing=SharingConfig(scope="all"), adapter=None, start=StartConfig(deepnorm=True)
    ),
    "bert": replace(
        MPOBERT, sharing=SharingConfig(), adapter=None, sites=EncoderSites(), embedding_size=None
    ),
    "bert-pre": replace(
        MPOBERT, sharing=SharingConfig(), adapter=None, sites=EncoderSites(), norm="pre",
        pair_head=False, activation="gelu",
    ),
}  # fmt: skip
LAYOUTS = {
    "one": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2),
    "tp2-sp": ParallelConfig(tensor=2, sequence=True),
    "cp2": ParallelConfig(context=2),
    "tp4": ParallelConfig(tensor=4),
    "tp4-sp": ParallelConfig(tensor=4, sequence=True),
    "tp2-sp-cp2": ParallelConfig(tensor=2, sequence=True, context=2),
}
FORGET_PARTIAL, FORGET_COPIES = "partial", "copies"
TOLERANCE = 1e-11


@dataclass(frozen=True)
class Outcome:
    """What a layout makes of a micro-batch, beside the local network.

    Attributes:
        error: largest difference of a gradient, relative to the tensor's largest or a thousandth
            of that of all.
        objective: from all ranks of this layout.
        reference: of the local network.
        sums: the loss and the statistics.
        expected: of the local network.
    """

    error: float
    objective: float
    reference: float
    sums: dict[str, float]
    expected: dict[str, float]

    def agrees(self) -> bool:
        far = [abs(self.sums[k] - v) > TOLERANCE * max(1.0, v) for k, v in self.expected.items()]
        off = abs(self.objective - self.reference) > TOLERANCE * max(1.0, abs(self.reference))
        assert set(self.sums) == set(self.expected)
        return self.error < TOLERANCE and not off and not any(far)


def rows(*, bare: bool = False, empty: bool = False, **changes: Any) -> Batch:
    """Rows of two documents and padding, with segments and pairs; or bare, or without targets."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    chosen = torch.rand(ROWS, LENGTH, generator=generator) < 0.3
    chosen[:, 0] = True
    chosen &= not empty
    labels = torch.full((ROWS, LENGTH), -100)
    if not empty:
        labels[:, 0] = torch.tensor([0, 1, 1])
        labels[0, 7] = 1
    fields: dict[str, Any] = {
        "inputs": tokens,
        "targets": torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator),
        "loss_mask": chosen,
        "sample_ids": torch.arange(ROWS),
        "pair_labels": labels,
    }
    if not bare:
        fields |= {
            "document_ids": torch.tensor([1] * 7 + [2] * 6 + [0] * 3).expand(ROWS, -1),
            "positions": torch.tensor([*range(7), *range(6), 0, 1, 2]).expand(ROWS, -1),
            "token_types": torch.tensor([0] * 3 + [1] * 6 + [0] * 7).expand(ROWS, -1),
            "pair_weight": torch.tensor(3.5, dtype=torch.float64),
        }
    return Batch(**(fields | changes))


def local(config: EncoderConfig, dtype: torch.dtype = torch.float64) -> Encoder:
    """The local network, shaken so that nothing is zero or one."""
    model = Encoder(config, seed=3, compute_dtype=dtype).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise)
    return model.to(dtype)


def build_chunks(
    model: Encoder, parallel: ParallelConfig, places: int, dtype: torch.dtype = torch.float64
) -> list[nn.Module]:
    """The network in as many chunks, with the weights of the local one."""
    from mpotrain.engine.megatron.config import MegatronConfig
    from mpotrain.engine.megatron.copies import chunk_layers, names_of_several
    from mpotrain.engine.megatron.encoder import build_encoder
    from mpotrain.engine.megatron.encoder_sources import layer_source, shared_names
    from mpotrain.engine.megatron.feature_cuts import feature_periods
    from mpotrain.engine.megatron.holdings import layer_names
    from mpotrain.engine.megatron.placement import placement_of
    from mpotrain.engine.megatron.settings import transformer_config
    from mpotrain.engine.megatron.slots import Slots, Whole
    from mpotrain.nn.roles import Role

    config = model.config
    settings = transformer_config(config, MegatronConfig(), parallel, on_cuda=False)
    settings.params_dtype = settings.pipeline_dtype = dtype
    periods = feature_periods(config, parallel.tensor, parallel.expert_tensor)
    layers = list(chunk_layers(config.num_layers, places).values())
    names = {info.name for info in config.parameters()}
    held = [set[str]().union(*(layer_names(config, n, names) for n in some)) for some in layers]
    if places > 1:
        held[0].add("token_embedding.weight")
        held[-1].add("token_embedding.weight")
    chunks, named = [], dict(model.named_parameters())
    for number, some in enumerate(layers):
        slots = Slots(
            {p.name: Whole(p.shape, Role(p.role), p.num_experts) for p in config.parameters()},
            shared=shared_names(config),
            copied=names_of_several(held),
            device=torch.device("cpu"),
            dtype=dtype,
        )
        chunk = build_encoder(
            config,
            settings,
            slots,
            {n: layer_source(config, n, slots, periods) for n in some},
            pre_process=number == 0,
            post_process=number == places - 1,
            vp_stage=None,
        )
        for parameter in chunk.parameters():
            placement = placement_of(parameter)
            parameter.data.copy_(placement.take(named[placement.name].data))
        chunks.append(chunk)
    return chunks


def through(chunks: list[nn.Module], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the chunks one after the other."""
    from mpotrain.engine.megatron.micro import Micro, Tally

    tally = Tally()
    micro = Micro(slot=0, is_last=True, loss_scale=1.0, auxiliary_scale=1.0, tally=tally)
    hidden = None
    for chunk in chunks:
        if hidden is not None:
            chunk.set_input_tensor([hidden])
        hidden = chunk(batch, micro)
    assert hidden is not None
    return hidden, tally.sums


def whole_gradients(chunks: list[nn.Module], forget: str | None) -> dict[str, Tensor]:
    """Gradients by logical name: summed over context, partial ones over tp, copies over chunks."""
    from megatron.core import parallel_state

    from mpotrain.engine.megatron.placement import placement_of

    tensor_group = parallel_state.get_tensor_model_parallel_group()
    found: dict[str, Tensor] = {}
    holders: dict[str, int] = {}
    shared = set()
    for chunk in chunks:
        for parameter in chunk.parameters():
            placement = placement_of(parameter)
            gradient = parameter.grad
            assert gradient is not None, placement.name
            dist.all_reduce(gradient, group=parallel_state.get_context_parallel_group())
            if placement.is_partial and forget != FORGET_PARTIAL:
                dist.all_reduce(gradient, group=tensor_group)
            whole = gradient.new_zeros(placement.shape)
            placement.put(whole, gradient)
            if any(cut.parts > 1 for cut in placement.cuts):
                dist.all_reduce(whole, group=tensor_group)
            elif not placement.is_partial:
                assert_same_everywhere(whole, tensor_group, placement.name)
            holders[placement.name] = holders.get(placement.name, 0) + 1
            if placement.is_shared:
                shared.add(placement.name)
            if forget != FORGET_COPIES or placement.name not in found:
                found[placement.name] = found.get(placement.name, 0.0) + whole
    assert shared == {name for name, count in holders.items() if count > 1}
    return found


def assert_same_everywhere(mine: Tensor, group: Any, name: str) -> None:
    """Replicated parameters have whole gradients, the same on all tensor-parallel ranks."""
    others = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(others, mine.contiguous(), group=group)
    scale = float(mine.abs().max()) + 1e-3
    assert all(float((other - mine).abs().max()) < 1e-11 * scale for other in others), name


def largest_error(gradients: dict[str, Tensor], model: Encoder) -> float:
    """Return the largest difference from the gradients of the local network, see `Outcome`."""
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys() == dict(model.named_parameters()).keys()
    highest = max(float(gradient.abs().max()) for gradient in expected.values())
    return max(
        float((gradients[name] - wanted).abs().max())
        / max(float(wanted.abs().max()), 1e-3 * highest, 1e-30)
        for name, wanted in expected.items()
    )


def compare(
    world: World,
    network: str,
    parallel: ParallelConfig,
    batch: Batch,
    places: int,
    forget: str | None,
    training: bool,
) -> Outcome:
    """Run the local network and the chunks on a micro-batch (on every rank)."""
    from megatron.core import parallel_state

    with megatron_grid(world, parallel):
        model = local(NETWORKS[network]).train(training)
        reference = model(batch)
        chunks = build_chunks(model, parallel, places)
        for chunk in chunks:
            chunk.train(training)
        objective, sums = through(chunks, batch)
        error = 0.0
        if training:
            reference.objective.backward()
            objective.backward()
            error = largest_error(whole_gradients(chunks, forget), model)
        group = parallel_state.get_context_parallel_group()
        counted = {name: value.clone() for name, value in sums.items()}
        counted["objective"] = objective.detach().clone()
        for value in counted.values():
            dist.all_reduce(value, group=group)
        told = {name: float(value) for name, value in counted.items()}
        wanted_sums = {"loss_sum": reference.loss_sum, **(reference.statistics or {})}
        return Outcome(
            error,
            told.pop("objective"),
            float(reference.objective),
            told,
            {name: float(value) for name, value in wanted_sums.items()},
        )


Run = Callable[..., list[Outcome]]
