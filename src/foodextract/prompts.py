"""The one system message, the one user prompt, and the conversation they form around a picture.

Training, evaluation, command line, Space and server all build their prompt here, so that the model is asked in the words it was
trained on, byte for byte.

All that is the same for every picture stands before it, in the system message: the answer then follows the picture closely (a small model
loses sight of what is a hundred tokens away), and a server can keep the prefix in its cache.
"""

from foodextract.schema import FoodRecord

_EXAMPLE = FoodRecord(is_food=1, image_title="beer and pretzel", food_items=["pretzel"], drink_items=["beer"])
_NOTHING = FoodRecord(is_food=0, image_title="", food_items=[], drink_items=[])

SYSTEM = f"""You find food and drink in pictures and answer with one line of JSON, nothing else: is any food or drink visible, \
a short title, the food items and the drink items you can see, for example:
{_EXAMPLE.to_json()}
If there is neither, answer:
{_NOTHING.to_json()}"""
USER = "What food and drink can you see?"


def conversation() -> list[dict]:
    """The messages before the answer, with one image placeholder, in the format of `apply_chat_template`."""
    return [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": USER}]},
    ]


def answer(record: FoodRecord, target: str = "json") -> list[dict]:
    """The assistant's turn that training aims at: JSON, or "repr", the Python text of a dict, which is there to be measured against."""
    text = {"json": record.to_json(), "repr": repr(record.model_dump())}[target]
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
