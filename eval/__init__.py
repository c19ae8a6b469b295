# SPDX-License-Identifier: Apache-2.0
"""Evaluation of language models: analyses, benchmarks and their command lines."""
