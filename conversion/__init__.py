# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on the move: to and from other formats, into self-contained folders, to the Hub, and their cards."""

from .checkpoint_writer import ConversionError
from .convert import ConversionReport, convert_from_fla, convert_to_fla, initialize_from_transformer
from .fla_format import config_from_fla, config_to_fla, state_dict_from_fla, state_dict_to_fla

__all__ = [
    "ConversionError",
    "ConversionReport",
    "config_from_fla",
    "config_to_fla",
    "convert_from_fla",
    "convert_to_fla",
    "initialize_from_transformer",
    "state_dict_from_fla",
    "state_dict_to_fla",
]
