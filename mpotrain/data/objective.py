"""From the configuration of an objective to the object that makes batches of samples."""

from __future__ import annotations

from mpotrain.data.causal import CausalObjective
from mpotrain.data.collation import Objective
from mpotrain.data.dataset import BlendedDataset
from mpotrain.data.masked import MaskedObjective
from mpotrain.data.objective_config import CausalConfig, MaskedConfig
from mpotrain.data.spans import SpanCorruptionObjective
from mpotrain.data.tokenizer import load_tokenizer


def open_objective(dataset: BlendedDataset) -> Objective:
    """Return the objective that a dataset was opened for; a loader of the dataset takes it.

    Args:
        dataset: its configuration names the objective, its tokenizer gives the ids.

    Raises:
        DataError: the tokenizer lacks what the objective needs: an end of text, or marks of where
            words begin. The key that mends it is named.
    """
    data, tokenizer = dataset.data, dataset.tokenizer
    config = data.objective
    if isinstance(config, CausalConfig):
        ids = config.special(tokenizer)
        return CausalObjective(data.sequence_length, ids.eot if config.document_mask else None)
    if isinstance(config, MaskedConfig):
        words = None
        if config.whole_word:
            words = load_tokenizer(dataset.sources[0].stream.folder).word_starts()
        return MaskedObjective(
            config,
            sequence_length=data.sequence_length,
            seed=data.seed,
            split=dataset.split,
            tokenizer=tokenizer,
            word_starts=words,
        )
    return SpanCorruptionObjective(
        config,
        sequence_length=data.sequence_length,
        seed=data.seed,
        split=dataset.split,
        tokenizer=tokenizer,
    )
