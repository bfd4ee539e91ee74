"""Which Hugging Face model can compute what one of ours does, if any."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mpotrain.convert.hub_albert import ALBERT
from mpotrain.convert.hub_bert import BERT
from mpotrain.convert.hub_family import HubFamily
from mpotrain.convert.hub_gpt2 import GPT2
from mpotrain.convert.hub_t5 import T5
from mpotrain.convert.source import SpecialIds
from mpotrain.data.special_ids import CausalTokens, MaskedTokens
from mpotrain.errors import ConfigError
from mpotrain.models.config import AnyModel
from mpotrain.models.encoder_config import EncoderConfig, EncoderSites
from mpotrain.models.gpt2_config import GPT2Config, GPT2Sites
from mpotrain.models.t5_config import T5Sites
from mpotrain.nn.sharing_config import SharingConfig, StartConfig

PADDING = 0
"""Id that fills the rows of our masked data."""


def hub_form(config: AnyModel, origin: str) -> tuple[HubFamily[Any], AnyModel]:
    """Return the kind of Hugging Face model that a model becomes, and its dense form.

    Args:
        config: of our model, of any representation.
        origin: what to call it.

    Raises:
        ConfigError: there is none; all reasons are listed.
    """
    if config.moe is not None:
        raise ConfigError(
            [
                f"{origin}: has mixtures of experts, which no {config.kind} of Hugging Face has; "
                "only models without can be exported"
            ]
        )
    if isinstance(config, EncoderConfig):
        return _encoder_form(config, origin)
    if isinstance(config, GPT2Config):
        return GPT2, replace(config, sites=GPT2Sites())
    return T5, replace(config, sites=T5Sites())


def _encoder_form(config: EncoderConfig, origin: str) -> tuple[HubFamily[Any], AnyModel]:
    problems = []
    if config.norm != "post":
        problems.append(
            f'{origin}: model.norm is "{config.norm}"; BERT and ALBERT normalise after the residual'
        )
    if config.start.deepnorm:
        problems.append(
            f"{origin}: model.start.deepnorm multiplies every residual; BERT and ALBERT do not"
        )
    if problems:
        raise ConfigError(problems)
    plain = replace(config, sites=EncoderSites(), adapter=None, start=StartConfig())
    if config.embedding_size is None:
        return BERT, replace(plain, sharing=SharingConfig())
    # Only ALBERT has embeddings of their own width; as many groups as layers share nothing.
    is_shared = config.sharing.scope == "all" and config.adapter is None
    groups = config.sharing.groups if is_shared else config.num_layers
    return ALBERT, replace(plain, sharing=SharingConfig(scope="all", groups=groups))


def id_settings(special: SpecialIds | None) -> dict[str, int | None]:
    """Return the ids with a meaning of their own as `config.json` names them.

    Args:
        special: of the data that a model was trained on; None where they are not known.
    """
    ids: dict[str, int | None] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if special is None:
        return ids
    if isinstance(special, CausalTokens):
        return ids | {"bos_token_id": special.eot, "eos_token_id": special.eot}
    if isinstance(special, MaskedTokens):
        marks = {"bos_token_id": special.cls, "eos_token_id": special.sep}
        return ids | marks | {"pad_token_id": PADDING, "mask_token_id": special.mask}
    start = {"pad_token_id": special.start, "decoder_start_token_id": special.start}
    return ids | start | {"eos_token_id": special.eos}
