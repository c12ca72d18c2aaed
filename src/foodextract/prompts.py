"""The one system message, the one user prompt, and the conversation they form around a picture.

Training, evaluation, command line, Space and server all build their prompt here, so that the model is asked in the words it was
trained on, byte for byte.
"""

from foodextract.schema import FoodRecord

_EXAMPLE = FoodRecord(is_food=1, image_title="beer and pretzel", food_items=["pretzel"], drink_items=["beer"])
_NOTHING = FoodRecord(is_food=0, image_title="", food_items=[], drink_items=[])

SYSTEM = "You find food and drink in pictures and answer with one line of JSON, nothing else."
USER = f"""Is any food or drink visible in this picture? Give it a short title and list the food items and the drink items you can see, \
for example:
{_EXAMPLE.to_json()}
If there is neither, answer:
{_NOTHING.to_json()}"""


def conversation() -> list[dict]:
    """The messages before the answer, with one image placeholder, in the format of `apply_chat_template`."""
    return [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": USER}]},
    ]


def answer(record: FoodRecord) -> list[dict]:
    """The assistant's turn that training aims at."""
    return [{"role": "assistant", "content": [{"type": "text", "text": record.to_json()}]}]
