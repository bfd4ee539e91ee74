"""How much of a matrix and of a micro-batch one rank works on (no torch)."""

from __future__ import annotations

from mpotrain.config import RunConfig
from mpotrain.engine.megatron.config import MegatronConfig
from mpotrain.engine.megatron.holdings import Holder
from mpotrain.models.network import ROUTER
from mpotrain.models.sites import Site
from mpotrain.tensor.spec import MPOSpec


class RankShare:
    """The part of each matrix that a rank multiplies by, and the rows that it multiplies.

    Matrices that tensor-parallel ranks compute alike, and the output layer, whose rows they share
    out, are counted whole and once.
    """

    def __init__(self, run: RunConfig, holder: Holder | None) -> None:
        """Prepare.

        Args:
            run: a validated run.
            holder: tells what a rank holds; None where every rank holds whole matrices.
        """
        self._run, self._holder = run, holder
        parallel = run.parallel
        self._context = 1 if holder is None else parallel.context
        splits = holder is not None and parallel.sequence
        self._stream_parts = parallel.tensor if splits else 1

    def spec(self, site: Site) -> MPOSpec | None:
        """Return the operator of the rank's part; None when dense."""
        if site.spec is None or self._holder is None:
            return site.spec
        return self._holder.part(site).spec(site.spec)

    def shape(self, site: Site) -> tuple[int, int]:
        """Return the size (in, out) of the rank's part of the matrix."""
        shape = (site.in_features, site.out_features)
        if self._holder is None:
            return shape
        part = self._holder.part(site)
        if part.side == "in":
            return shape[0] // part.parts, shape[1]
        return shape[0], shape[1] // part.parts

    def rows(self, site: Site) -> int:
        """Return the rows of a micro-batch that a rank brings to a site, each counted once.

        Ranks that share the features of an expert work on each other's rows, too.
        """
        run = self._run
        rows = run.train.micro_batch_size * run.sample_lengths().of(site.stream) // self._context
        if site.num_experts:
            shared = 1 if self._holder is None else run.parallel.expert_tensor
            rows = rows * shared // self._stream_parts
        elif site.family == ROUTER:
            rows //= self._stream_parts
        return max(1, rows)

    def ranks(self, site: Site) -> int:
        """Return how many ranks do such a part of a micro-batch's work."""
        if self._holder is None:
            return 1
        if site.num_experts or site.family == ROUTER:
            return self._context * self._stream_parts
        return self._context * self._holder.part(site).parts

    def caches(self, site: Site) -> bool:
        """Return whether the matrix is rebuilt once for all micro-batches of a step."""
        engine = self._run.engine
        if not isinstance(engine, MegatronConfig) or not engine.cache_weights:
            return False
        return site.spec is not None and not site.num_experts and site.family != "embedding"


def rank_share(run: RunConfig) -> RankShare:
    """Return what a rank of a run works on."""
    is_cut = isinstance(run.engine, MegatronConfig)
    return RankShare(run, Holder(run.model, run.parallel) if is_cut else None)
