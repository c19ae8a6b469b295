# SPDX-License-Identifier: Apache-2.0
"""Writes the cards of this repository anew: `python examples/write_card.py`.

The bundled checkpoint's goes into its folder, from the records of its training and evaluation in
`model_cards/novels/`; those of the published sizes, of which there are no weights here, into `model_cards/<size>/`.
"""

from pathlib import Path

from novels import REPOSITORY

from modeling_mesanet import bundled_checkpoint
from modeling_mesanet.configuration_mesanet import PRESETS
from modeling_mesanet.conversion.card import CARD, card_of_folder, card_of_preset, write_card

RECORDS = REPOSITORY / "model_cards"
BENCHMARKS = REPOSITORY / "kernels" / "benchmarks" / "results"


def cards() -> dict[Path, str]:
    """The text of every card, by its file."""
    novels = RECORDS / "novels"
    bundled = card_of_folder(
        None,
        about=novels / "about.yaml",
        training=novels / "training_log.json",
        evaluations=[
            novels / "evaluation.json",
            novels / "perplexity",
            novels / "compute_sweep",
            novels / "lm_eval" / "texts",
            novels / "lm_eval" / "tasks",
        ],
        certificate=certificate if (certificate := novels / "certificate.json").is_file() else None,
        benchmarks=[BENCHMARKS / "cpu_generation.json", *sorted(BENCHMARKS.glob("gpu_operators_*.json"))],
    )
    published = {RECORDS / size / CARD: card_of_preset(size, RECORDS / size / "about.yaml") for size in PRESETS}
    return {Path(bundled_checkpoint()) / CARD: bundled, **published}


def main() -> None:
    for file, text in cards().items():
        write_card(text, file)
        print(file)


if __name__ == "__main__":
    main()
