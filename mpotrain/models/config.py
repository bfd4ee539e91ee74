"""The networks that a run file can ask for: one section, tagged by `kind` (no torch)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mpotrain.models.encoder_config import EncoderConfig
from mpotrain.models.gpt2_config import GPT2Config
from mpotrain.models.t5_config import T5Config

ModelConfig = Annotated[GPT2Config | EncoderConfig | T5Config, Field(discriminator="kind")]
"""The section `model`."""
AnyModel = GPT2Config | EncoderConfig | T5Config
"""What code that works for every network takes."""
