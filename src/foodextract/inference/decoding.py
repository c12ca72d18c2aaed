"""Greedy generation that a grammar keeps on its way, for any transformers image-text-to-text model with a key-value cache.

Four things make it fast without changing an answer. Tokens that the grammar forces are appended to the token the model chose and go
through the model in the same forward. Rows of a batch that are done leave it, keys and values included. What the grammar forces at the
very beginning is read together with the prompt. And what every prompt begins with is read once, for all that are ever asked.

The rows of a batch advance by different numbers of tokens, so every step appends a block as wide as the longest of them, padded on the
left: the newest token of every row stands in the last column. The attention mask hides the padding, and positions count only what it shows.
Tokens are taken back (see `Decoder.amend`) by hiding their columns too.

Not for models whose positions have more than one dimension (Qwen-VL). In a sliding window the hidden columns count too, so a window
reaches a little less far in a batch.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class GrammarError(ValueError):
    """A grammar that llguidance refuses."""


@dataclass
class Answer:
    """What one row wrote, without its end token; `finished` is False when it ran out of tokens.

    `logprobs` has the natural logarithm of each token's probability among the tokens that were allowed in its place, None where it was
    the only one.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    finished: bool = False


@dataclass
class _Row:
    """The state of one row: its answer, how many of the answer's tokens the model has read, and where it is in the grammar."""

    number: int  # in the batch that was asked
    matcher: LLMatcher | None
    answer: Answer = field(default_factory=Answer)
    read: int = 0

    def follow(self) -> None:
        """Append what the grammar forces. A matcher that has met an error counts as stopped, short of its end."""
        if self.matcher:
            forced = self.matcher.compute_ff_tokens()
            self.matcher.consume_tokens(forced)
            self.answer.tokens += forced
            self.answer.logprobs += [None] * len(forced)
            self.answer.finished = (
                self.matcher.is_stopped() and self.matcher.is_accepting() and not self.matcher.is_error()
            )

    def goes_on(self, max_new_tokens: int) -> bool:
        stopped = self.answer.finished or (self.matcher is not None and self.matcher.is_stopped())
        return not stopped and len(self.answer.tokens) < max_new_tokens


@dataclass(frozen=True)
class Decoder:
    """A model that writes what a grammar allows; without a grammar, whatever it likes.

    `amend` is for rules that no grammar expresses. It gets what a row has written so far and returns it, or the text that should
    stand there instead, which the grammar must allow and which the row then goes on from.

    `prefix` are tokens of text that prompts begin with. Where all of a batch do, their keys and values are taken from the first time,
    unless the model is one that trains (a parameter asks for a gradient): its weights may be others now.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    lltokenizer: LLTokenizer
    matcher: LLMatcher | None
    amend: Callable[[str], str] | None = None
    prefix: tuple[int, ...] = ()
    _read: list[Any] = field(default_factory=list, repr=False, compare=False)  # the prefix's cache, once it is there

    @classmethod
    def build(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        grammar: str | None = None,
        amend: Callable[[str], str] | None = None,
        prefix: Sequence[int] = (),
    ) -> Self:
        """Compile `grammar` (llguidance's variety of Lark) for a fast tokenizer. Raises GrammarError."""
        free = cls(model, tokenizer, from_tokenizer(tokenizer), None, amend, tuple(prefix))
        return free if grammar is None else free.under(grammar, amend)

    def under(self, grammar: str, amend: Callable[[str], str] | None = None) -> Self:
        """The same model under a grammar. Both share what is read of the prefix. Raises GrammarError."""
        if fault := LLMatcher.validate_grammar(grammar, self.lltokenizer):
            raise GrammarError(f"llguidance refuses the grammar: {fault}")
        return replace(self, matcher=LLMatcher(self.lltokenizer, grammar), amend=amend)

    @torch.inference_mode()
    def generate(
        self,
        inputs: Mapping[str, torch.Tensor],
        max_new_tokens: int,
        wanted: Callable[[int], bool] = lambda number: True,
    ) -> list[Answer]:
        """Answer a batch of B prompts of up to S tokens, padded on the left: `input_ids` and `attention_mask` (B, S), and whatever
        else the model's forward takes.

        Before every step `wanted` is asked about each row, 0 to B - 1, that is still being written; one that nobody waits for any more
        leaves the batch as it is.
        """
        inputs = dict(inputs)
        rows = [_Row(number, self.matcher and self.matcher.deep_copy()) for number in range(len(inputs["input_ids"]))]
        for row in rows:
            row.follow()
        answers = [row.answer for row in rows]
        ids, mask, cache = inputs.pop("input_ids"), inputs.pop("attention_mask"), None
        block, shown = self._block(rows)  # the same in every row
        ids, mask = torch.cat([ids, block], -1), torch.cat([mask, shown], -1)
        for name in [name for name in inputs if name.endswith("token_type_ids")]:  # of images and text, in some models
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(block)], -1)
        if self._begins(ids, mask) and not any(name.endswith("token_type_ids") for name in inputs):
            ids, cache = ids[:, len(self.prefix) :], self._after_prefix(len(rows))
        while rows:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **inputs,
            )
            inputs, cache = {}, output.past_key_values  # images are in the cache now
            taken_back = self._advance(rows, output.logits[:, -1].float())
            for number, count in enumerate(taken_back):
                if count:
                    mask[number, mask[number].nonzero()[-count:]] = 0
            active = [place for place, row in enumerate(rows) if row.goes_on(max_new_tokens) and wanted(row.number)]
            if len(active) < len(rows):
                if not active:
                    break
                keep = torch.tensor(active, device=mask.device)
                rows, mask = [rows[place] for place in active], mask[keep]
                cache.batch_select_indices(keep)
            ids, shown = self._block(rows)
            mask = torch.cat([mask, shown], -1)
        return answers

    def text(self, answer: Answer) -> str:
        """What the tokens say, without special ones, and with every space where it was written."""
        return self.tokenizer.decode(answer.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def written(self, tokens: Sequence[int]) -> str:
        """What the tokens say, special ones too, as `amend` gets it."""
        return self.lltokenizer.decode_str(list(tokens))

    def pieces(self, answer: Answer) -> list[tuple[bytes, float | None]]:
        """The bytes of each token with its log-probability."""
        return [
            (self.lltokenizer.decode_bytes([token]), p) for token, p in zip(answer.tokens, answer.logprobs, strict=True)
        ]

    def _begins(self, ids: torch.Tensor, mask: torch.Tensor) -> bool:
        """Do all rows begin with the prefix, without padding before it, and are the weights what they were?"""
        length = len(self.prefix)
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            self._read.clear()
            return False
        return (
            0 < length < ids.shape[1]
            and bool(mask[:, :length].all())
            and all(row == list(self.prefix) for row in ids[:, :length].tolist())
        )

    def _after_prefix(self, rows: int) -> Any:
        """A cache that holds the prefix in so many rows."""
        if not self._read:
            ids = torch.tensor([self.prefix], device=self.model.device)
            places = torch.arange(ids.shape[1], device=ids.device)[None]
            read = self.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=places,
                use_cache=True,
                logits_to_keep=1,
            )
            self._read.append(read.past_key_values)
        cache = copy.deepcopy(self._read[0])
        cache.batch_repeat_interleave(rows)
        return cache

    @property
    def _end_tokens(self) -> set[int]:
        configured = self.model.generation_config.eos_token_id
        return {self.tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}

    def _advance(self, rows: list[_Row], logits: torch.Tensor) -> list[int]:
        """Choose one token a row from its logits (R, V) and follow it up; how many tokens each row takes back that the model has read."""
        if self.matcher:
            logits = logits.masked_fill(~self._allowed(rows, logits.shape[1]).to(logits.device), -torch.inf)
        chosen = logits.argmax(-1)
        logprobs = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0].tolist()
        ends, taken_back = self._end_tokens, []
        for row, token, logprob in zip(rows, chosen.tolist(), logprobs, strict=True):
            if row.matcher is None and token in ends:
                row.answer.finished = True
            elif row.matcher is None or row.matcher.consume_token(token):
                row.answer.tokens.append(token)
                row.answer.logprobs.append(logprob)
                row.follow()
            taken_back.append(self._amend(row))
        return taken_back

    def _allowed(self, rows: list[_Row], vocabulary: int) -> torch.Tensor:
        """Which tokens the grammar allows next: (R, V) bool. The model may have more token ids than the tokenizer."""
        packed = np.stack([np.frombuffer(row.matcher.compute_bitmask(), np.uint8) for row in rows])
        bits = np.unpackbits(packed, axis=1, bitorder="little", count=min(vocabulary, self.lltokenizer.vocab_size))
        return torch.nn.functional.pad(torch.from_numpy(bits).bool(), (0, vocabulary - bits.shape[1]))

    def _amend(self, row: _Row) -> int:
        if self.amend is None or (better := self.amend(text := self.written(row.answer.tokens))) == text:
            return 0
        tokens = self.lltokenizer.tokenize_str(better)
        pairs = enumerate(zip(tokens, row.answer.tokens, strict=False))
        same = next((number for number, (new, old) in pairs if new != old), min(len(tokens), len(row.answer.tokens)))
        row.answer.tokens[same:] = tokens[same:]
        row.answer.logprobs[same:] = [None] * len(tokens[same:])
        row.matcher.reset()
        row.matcher.consume_tokens(tokens)
        row.follow()
        taken_back, row.read = max(0, row.read - same), min(row.read, same)
        return taken_back

    def _block(self, rows: list[_Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that the model has not read yet, padded on the left, and which of them to show: both (R, W)."""
        blocks = [torch.tensor(row.answer.tokens[row.read :], dtype=torch.long) for row in rows]
        for row in rows:
            row.read = len(row.answer.tokens)
        padded = torch.nn.utils.rnn.pad_sequence
        ids = padded(blocks, batch_first=True, padding_side="left")
        shown = padded([torch.ones_like(block) for block in blocks], batch_first=True, padding_side="left")
        return ids.to(self.model.device), shown.to(self.model.device)
