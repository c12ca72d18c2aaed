"""Greedy generation under a grammar, for any transformers image-text-to-text model with a key-value cache.

Four optimizations make it fast, and none changes an answer:
- tokens that the grammar forces go through the model together with the chosen token before them;
- tokens that are forced at the very start are read together with the prompt;
- rows that are finished leave the batch, with their keys and values;
- the text that every prompt begins with is read only once.

Rows of a batch advance by different numbers of tokens. Each step appends a block as wide as the longest of them,
padded on the left, so the last column holds the newest token of every row. The attention mask hides padding and
tokens that were taken back (see `Guide.amend`); positions count only visible tokens.

Models with multi-dimensional positions (Qwen-VL) are not supported. Hidden columns count towards a sliding window, so
a window reaches slightly less far in a batch.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerFast

from foodextract.models.quantization import decoding


@dataclass
class Answer:
    """The tokens of one row, without its end token. `finished` is False for a row that ran out of tokens.

    `logprobs` holds the natural logarithm of each token's probability among the tokens allowed in its place, or None
    where only one was.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    finished: bool = False


Wanted = Callable[[int, Answer], bool]  # whether to continue a row, by its number in the batch and its answer so far
ALWAYS: Wanted = lambda number, answer: True  # noqa: E731


@dataclass(frozen=True)
class Guide:
    """The compiled grammar of an answer, and a rule that no grammar expresses.

    `amend` gets the text of a row so far. It returns that text, or another one that the grammar allows, from which
    the row continues.
    """

    matcher: LLMatcher
    amend: Callable[[str], str]


@dataclass
class _Row:
    """The state of one row of a batch. The model has read the first `read` tokens of the answer."""

    number: int  # in the original batch
    matcher: LLMatcher | None
    answer: Answer = field(default_factory=Answer)
    read: int = 0

    def append_forced(self) -> None:
        """Append what the grammar forces. A matcher with an error counts as stopped before its end."""
        if self.matcher:
            forced = self.matcher.compute_ff_tokens()
            self.matcher.consume_tokens(forced)
            self.answer.tokens += forced
            self.answer.logprobs += [None] * len(forced)
            complete = self.matcher.is_stopped() and self.matcher.is_accepting()
            self.answer.finished = complete and not self.matcher.is_error()

    def continues(self, max_new_tokens: int) -> bool:
        stopped = self.answer.finished or (self.matcher is not None and self.matcher.is_stopped())
        return not stopped and len(self.answer.tokens) < max_new_tokens


class Decoder:
    """A model that generates freely or under a `Guide`.

    `prefix` holds the tokens that prompts begin with. If all rows of a batch begin with them, their keys and values are
    computed once and reused, unless a parameter of the model requires a gradient: its weights may change.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerFast, prefix: Sequence[int] = ()) -> None:
        self.model, self.tokenizer, self.prefix = model, tokenizer, list(prefix)
        self.lltokenizer = from_tokenizer(tokenizer)
        self._prefix_cache: Any = None

    def guide(self, grammar: str, amend: Callable[[str], str]) -> Guide:
        """Compile a grammar in llguidance's variant of Lark. Raises ValueError."""
        if problem := LLMatcher.validate_grammar(grammar, self.lltokenizer):
            raise ValueError(f"llguidance refuses the grammar: {problem}")
        return Guide(LLMatcher(self.lltokenizer, grammar), amend)

    @torch.inference_mode()
    def generate(
        self,
        inputs: Mapping[str, torch.Tensor],
        max_new_tokens: int,
        guide: Guide | None = None,
        wanted: Wanted = ALWAYS,
    ) -> list[Answer]:
        """Generate one answer per prompt.

        `inputs` holds `input_ids` and `attention_mask` (B, S), padded on the left, and whatever else the model's
        forward takes. Before each step, `wanted` is called with the number (0 to B - 1) and the answer so far of
        every unfinished row; a row for which it returns False ends there.
        """
        inputs = dict(inputs)
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        rows = [_Row(number, guide.matcher.deep_copy() if guide else None) for number in range(len(ids))]
        for row in rows:
            row.append_forced()
        answers = [row.answer for row in rows]
        block, shown = _unread(rows, ids.device)  # the same in every row
        ids, mask = torch.cat([ids, block], -1), torch.cat([mask, shown], -1)
        token_types = [name for name in inputs if name.endswith("token_type_ids")]  # of images and text, in some models
        for name in token_types:
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(block)], -1)
        cache = None if token_types else self._cached_prefix(ids, mask)
        ids = ids if cache is None else ids[:, len(self.prefix) :]
        started = False
        while rows:
            with decoding(started):
                output = self._forward(ids, mask, cache, **inputs)
            inputs, cache, started = {}, output.past_key_values, True  # images are in the cache now
            for number, count in enumerate(self._advance(rows, output.logits[:, -1].float(), guide)):
                if count:  # tokens taken back
                    mask[number, mask[number].nonzero()[-count:]] = 0
            active = [
                place
                for place, row in enumerate(rows)
                if row.continues(max_new_tokens) and wanted(row.number, row.answer)
            ]
            if not active:
                break
            if len(active) < len(rows):
                keep = torch.tensor(active, device=mask.device)
                rows, mask = [rows[place] for place in active], mask[keep]
                cache.batch_select_indices(keep)
            ids, shown = _unread(rows, mask.device)
            mask = torch.cat([mask, shown], -1)
        return answers

    def text(self, answer: Answer) -> str:
        """Decode an answer without special tokens, and with every space as it was written."""
        text = self.tokenizer.decode(answer.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, text)

    def raw_text(self, answer: Answer) -> str:
        """Decode an answer with special tokens, as `Guide.amend` gets it."""
        return self.lltokenizer.decode_str(answer.tokens)

    def pieces(self, answer: Answer) -> list[tuple[bytes, float | None]]:
        """The bytes of each token with its log-probability."""
        tokens = (self.lltokenizer.decode_bytes([token]) for token in answer.tokens)
        return list(zip(tokens, answer.logprobs, strict=True))

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any = None, **inputs: torch.Tensor) -> Any:
        """Read a block of tokens (B, W) behind the cache. The mask (B, S) covers both."""
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        )

    def _cached_prefix(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        """A cache of the prefix for each row, or None unless every row begins with it, without padding before it."""
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            self._prefix_cache = None
            return None
        length = len(self.prefix)
        prefix = torch.tensor([self.prefix], device=ids.device)
        begins = 0 < length < ids.shape[1] and bool(mask[:, :length].all()) and bool((ids[:, :length] == prefix).all())
        if not begins:
            return None
        if self._prefix_cache is None:
            self._prefix_cache = self._forward(prefix, torch.ones_like(prefix)).past_key_values
        cache = copy.deepcopy(self._prefix_cache)
        cache.batch_repeat_interleave(len(ids))
        return cache

    def _advance(self, rows: list[_Row], logits: torch.Tensor, guide: Guide | None) -> list[int]:
        """Choose one token per row from its logits (R, V) and append what follows it.

        Returns how many tokens that the model has read each row takes back.
        """
        if guide:
            logits = logits.masked_fill(~self._allowed(rows, logits.shape[1]).to(logits.device), -torch.inf)
        chosen = logits.argmax(-1)
        logprobs = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0].tolist()
        configured = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
        for row, token, logprob in zip(rows, chosen.tolist(), logprobs, strict=True):
            if row.matcher is None and token in ends:
                row.answer.finished = True
            elif row.matcher is None or row.matcher.consume_token(token):
                row.answer.tokens.append(token)
                row.answer.logprobs.append(logprob)
                row.append_forced()
        return [self._amend(row, guide) if guide else 0 for row in rows]

    def _allowed(self, rows: list[_Row], vocabulary: int) -> torch.Tensor:
        """The tokens that the grammar allows next: (R, V) bool. The model may have more tokens than the tokenizer."""
        packed = np.stack([np.frombuffer(row.matcher.compute_bitmask(), np.uint8) for row in rows if row.matcher])
        bits = np.unpackbits(packed, axis=1, bitorder="little", count=min(vocabulary, self.lltokenizer.vocab_size))
        return torch.nn.functional.pad(torch.from_numpy(bits).bool(), (0, vocabulary - bits.shape[1]))

    def _amend(self, row: _Row, guide: Guide) -> int:
        text, answer = self.raw_text(row.answer), row.answer
        if not row.matcher or (better := guide.amend(text)) == text:
            return 0
        tokens = self.lltokenizer.tokenize_str(better)
        pairs = enumerate(zip(tokens, answer.tokens, strict=False))
        same = next((number for number, (new, old) in pairs if new != old), min(len(tokens), len(answer.tokens)))
        answer.tokens[same:] = tokens[same:]
        answer.logprobs[same:] = [None] * len(tokens[same:])
        row.matcher.reset()
        row.matcher.consume_tokens(tokens)
        row.append_forced()
        taken_back, row.read = max(0, row.read - same), min(row.read, same)
        return taken_back


def _unread(rows: list[_Row], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that the model has not read yet, padded on the left, and a mask of them: both (R, W)."""
    blocks = [torch.tensor(row.answer.tokens[row.read :], dtype=torch.long) for row in rows]
    for row in rows:
        row.read = len(row.answer.tokens)
    padded = torch.nn.utils.rnn.pad_sequence
    ids = padded(blocks, batch_first=True, padding_side="left")
    shown = padded([torch.ones_like(block) for block in blocks], batch_first=True, padding_side="left")
    return ids.to(device), shown.to(device)
