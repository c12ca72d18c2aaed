"""The confidence of a constrained answer, from the probabilities of its tokens."""

from dataclasses import dataclass
from itertools import accumulate
from math import exp

from foodextract.inference.grammar import Dialect
from foodextract.schema import FIELDS


@dataclass(frozen=True)
class Confidence:
    """How sure the model was; not calibrated.

    `is_food` is the probability of the chosen value, among 0 and 1. The lists hold, for each item, the mean natural
    logarithm of the probabilities of its tokens, up to the closing quotation mark, among the tokens that the grammar
    allowed (0 is certain).
    """

    is_food: float
    food_items: list[float]
    drink_items: list[float]


def confidence_of(pieces: list[tuple[bytes, float | None]], dialect: Dialect) -> Confidence:
    """Compute the confidence of an answer from the bytes and the log-probability of each token (`Decoder.pieces`)."""
    text = b"".join(piece for piece, _ in pieces).decode(errors="replace")  # the last character may be incomplete
    byte_of = list(accumulate((len(character.encode()) for character in text), initial=0))  # by character
    token_of = [number for number, (piece, _) in enumerate(pieces) for _ in piece]  # by byte

    def mean(start: int, end: int) -> float:
        tokens = sorted(set(token_of[byte_of[start] : byte_of[end]]))
        logprobs = [logprob for token in tokens if (logprob := pieces[token][1]) is not None]
        return sum(logprobs) / len(logprobs) if logprobs else 0.0

    spans = dialect.spans(text)
    is_food = exp(mean(*spans["is_food"][0])) if spans["is_food"] else 1.0  # an answer may be cut off before it
    return Confidence(is_food, *([mean(start + 1, end) for start, end in spans[name]] for name in FIELDS))
