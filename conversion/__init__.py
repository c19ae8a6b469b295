# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on the move: to and from other formats, into self-contained folders, to the Hub, and their cards."""
