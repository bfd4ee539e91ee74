"""A feed-forward layer of many experts, of which every token meets a few."""

from __future__ import annotations

from torch import Tensor, nn

from mpotrain.nn.activation import ActivationName, activation
from mpotrain.nn.moe.dispatch import Dispatcher
from mpotrain.nn.moe.router import Router


class MixtureOfExperts(nn.Module):
    """Router, two expert matrices around an activation (GELU by tanh, as GPT-2), and the way back.

    Statistics are detached fp32 sums over the micro-batch, so that engines can add them up:

    * expert_tokens (E,): (token, choice) pairs that chose each expert, dropped ones included;
    * dropped (): pairs that found their expert full;
    * routed (): pairs in all;
    * balance_loss (), z_loss (): unweighted value times number of tokens;
    * router_entropy (): sum over the tokens of the entropy of their probabilities, nats;
    * tokens (): number of tokens.

    Attributes:
        router: chooses the experts.
        c_fc: first matrices (H -> F).
        c_proj: second matrices (F -> H).
        dispatcher: brings tokens to experts; an engine with expert parallelism replaces it.
    """

    dispatcher: Dispatcher

    def __init__(
        self,
        router: Router,
        c_fc: nn.Module,
        c_proj: nn.Module,
        dispatcher: Dispatcher,
        activation_name: ActivationName = "gelu_tanh",
    ) -> None:
        super().__init__()
        self._activate = activation(activation_name)
        self.router, self.c_fc, self.c_proj = router, c_fc, c_proj
        self.dispatcher = dispatcher

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Map x (B, T, H) to (B, T, H).

        Returns:
            The result; the weighted auxiliary loss, a mean over the B T tokens (fp32 scalar, with
            gradient); the statistics.
        """
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.router.route(self.router(tokens))
        gates: Tensor | None = routing.gates
        if self.router.config.gate_at == "input":
            tokens, gates = (tokens * routing.gates).to(x.dtype), None
        dispatched = self.dispatcher.dispatch(tokens, routing.experts, routing.kept)
        # With even loads every rank works on as many rows as it sends.
        nominal_rows = routing.experts.numel()
        rows = self.c_fc(dispatched.rows, dispatched.counts, nominal_rows)
        rows = self._activate(rows)
        rows = self.c_proj(rows, dispatched.counts, nominal_rows)
        y = self.dispatcher.combine(rows, dispatched, gates)
        return y.view(x.shape), routing.auxiliary_loss, routing.statistics
