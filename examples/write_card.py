# SPDX-License-Identifier: Apache-2.0
"""Writes the bundled checkpoint's card from its records: `python examples/write_card.py`.

Every figure on the card comes from `model_cards/novels/training_log.json` (written by train_novels.py) and
`model_cards/novels/evaluation.json` (written by evaluate_novels.py); the words from `model_cards/template.md`.
"""

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from novels import REPOSITORY, UsageError, fingerprint, replacing

from modeling_mesanet import MesaNetConfig, bundled_checkpoint
from modeling_mesanet.cache_mesanet import state_bytes

CARDS = REPOSITORY / "model_cards"

SUMMARY = (
    "A small MesaNet trained on English novels, bundled with the package modeling_mesanet so that everything can be "
    "tried offline and on a CPU. It is there for tests, demonstrations and measurements of the architecture."
)
LIMITS = (
    "It writes in the manner of novels published between about 1840 and 1922, with their views of people and of the "
    "world. It knows no facts, follows no instructions, and loses the thread after a sentence or two. English only. "
    "It went over its 62 novels many times and fits them far better than unseen text. Not for any use in which what "
    "it says matters."
)


def build_card(records: Path, checkpoint: Path) -> str:
    """The card's text.

    Args:
        records: folder with training_log.json and evaluation.json.
        checkpoint: folder of the model; its weights must be the evaluated ones.

    Raises:
        UsageError: the evaluation is of other weights.
    """
    training = json.loads((records / "training_log.json").read_text(encoding="utf-8"))
    evaluation = json.loads((records / "evaluation.json").read_text(encoding="utf-8"))
    if evaluation["checkpoint"]["sha256"] != fingerprint(checkpoint / "model.safetensors"):
        raise UsageError(
            f"{records}/evaluation.json is of other weights than {checkpoint}: run evaluate_novels.py again."
        )
    config = MesaNetConfig.from_pretrained(checkpoint)
    valid = evaluation["novels_valid"]
    book_name = Path(evaluation["book"]["file"]).stem
    metadata = ModelCardData(
        model_name="MesaNet novels",
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mesanet", "recurrent", "linear-attention"],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=valid["file"],
                metric_type="bits_per_byte",
                metric_value=round(valid["bits_per_byte"], 4),
            )
        ],
    )
    return ModelCard.from_template(
        metadata,
        template_str=(CARDS / "template.md").read_text(encoding="utf-8"),
        title=metadata.model_name,
        summary=SUMMARY,
        limits=LIMITS,
        path=bundled_checkpoint.__name__,
        records=records.name,
        training=training,
        recipe=training["recipe"],
        data=training["data"],
        run=training["runs"][0],
        valid=valid,
        book=evaluation["book"],
        book_title=book_name.replace("_", " ").title(),
        state_bytes=state_bytes(config),
    ).content


def main() -> None:
    checkpoint = Path(bundled_checkpoint())
    with replacing(checkpoint / "README.md") as temporary:
        temporary.write_text(build_card(CARDS / "novels", checkpoint).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
