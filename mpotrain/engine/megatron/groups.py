"""This rank's place on every axis, and the groups in which gradients are summed."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state as state

from mpotrain.engine.megatron.placement import Placement


@dataclass(frozen=True)
class Groups:
    """Process groups of this rank.

    Attributes:
        tensor: tensor-parallel ranks.
        pipeline: stages.
        context: ranks that share sequences.
        data: data-parallel ranks.
        data_context: ranks over which dense gradients are summed.
        expert: ranks that hold different experts.
        expert_tensor: ranks that share every expert.
        expert_data: ranks over which gradients of experts are summed.
    """

    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    context: dist.ProcessGroup
    data: dist.ProcessGroup
    data_context: dist.ProcessGroup
    expert: dist.ProcessGroup
    expert_tensor: dist.ProcessGroup
    expert_data: dist.ProcessGroup

    @classmethod
    def current(cls) -> Groups:
        """Return the groups that megatron-core has started."""
        return cls(
            tensor=state.get_tensor_model_parallel_group(),
            pipeline=state.get_pipeline_model_parallel_group(),
            context=state.get_context_parallel_group(),
            data=state.get_data_parallel_group(),
            data_context=state.get_data_parallel_group(with_context_parallel=True),
            expert=state.get_expert_model_parallel_group(),
            expert_tensor=state.get_expert_tensor_parallel_group(),
            expert_data=state.get_expert_data_parallel_group(),
        )

    def holds_first_copy(self, placement: Placement, *, is_split: bool) -> bool:
        """Return whether of all ranks that hold the same elements this is the one that counts.

        Copies on other stages are left out of account.

        Args:
            placement: of the parameter.
            is_split: whether the ranks that sum its gradient hold different elements of its
                master (distributed optimizer).
        """
        replicas = self.expert_data if placement.is_expert else self.data_context
        same = self.expert_tensor if placement.is_expert else self.tensor
        first_of_model = self.cuts_elements(placement) or same.rank() == 0
        return first_of_model and (is_split or replicas.rank() == 0)

    def cuts_elements(self, placement: Placement) -> bool:
        """Return whether the ranks that compute with a tensor together hold different parts of it.

        These are the tensor-parallel ranks, for a tensor with an expert axis the expert-tensor
        ranks: between them only cuts beyond the expert axis differ.
        """
        return any(
            cut.parts > 1 and (cut.dim > 0 or not placement.is_expert) for cut in placement.cuts
        )
