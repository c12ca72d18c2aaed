"""The system message, the user prompt, and the conversation that they form around an image.

Training, evaluation, command line, Space and server build their prompt here, byte for byte the same. All constant
text stands before the image: a small model loses sight of what is a hundred tokens back, and a shared prefix can be
cached.
"""

from typing import Any

from foodextract.schema import FoodRecord

_EXAMPLE = FoodRecord(is_food=1, image_title="beer and pretzel", food_items=["pretzel"], drink_items=["beer"])
NOTHING = FoodRecord(is_food=0, image_title="", food_items=[], drink_items=[])

SYSTEM = f"""You find food and drink in pictures and answer with one line of JSON, nothing else: is any food or drink \
visible, a short title, the food items and the drink items you can see, for example:
{_EXAMPLE.to_json()}
If there is neither, answer:
{NOTHING.to_json()}"""
USER = "What food and drink can you see?"


def conversation() -> list[dict[str, Any]]:
    """The messages before the answer, with one image placeholder, for `apply_chat_template`."""
    return [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": USER}]},
    ]


def answer(record: FoodRecord, target: str = "json") -> list[dict[str, Any]]:
    """The assistant's turn to train on: canonical JSON, or with "repr" a Python dict, for comparison only."""
    text = {"json": record.to_json(), "repr": repr(record.model_dump())}[target]
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
