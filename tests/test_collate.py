import pytest
import torch

from foodextract import prompts
from foodextract.data.dataset import as_conversations, record_of
from foodextract.inference.decoding import Decoder
from foodextract.schema import FoodRecord
from foodextract.training.collate import IGNORED, Collator, audit


@pytest.fixture(scope="module")
def batch(rows, processor):
    conversations = as_conversations(rows["train"])
    return Collator(processor)([conversations[number] for number in range(8)])


def test_labels_are_the_answer_and_eos_exactly(batch, rows, processor):
    for number in range(8):
        kept = batch["labels"][number] != IGNORED
        text = processor.tokenizer.decode(batch["input_ids"][number][kept])
        assert text == " " + record_of(rows["train"][number]).to_json() + "<end_of_utterance>"
        assert torch.equal(batch["labels"][number][kept], batch["input_ids"][number][kept])
        positions = kept.nonzero().flatten()
        assert torch.equal(positions, torch.arange(positions[0], positions[-1] + 1))  # in one piece …
        assert positions[-1] == batch["attention_mask"][number].sum() - 1  # … and nothing behind it


def test_no_image_token_and_no_padding_is_trained_on(batch, processor):
    labels, tokenizer = batch["labels"], processor.tokenizer
    for token in ("<image>", "<fake_token_around_image>", "<global-img>", tokenizer.pad_token):
        assert (batch["input_ids"] == tokenizer.convert_tokens_to_ids(token)).any()
        assert not (labels == tokenizer.convert_tokens_to_ids(token)).any()
    assert ((batch["attention_mask"] == 0) <= (labels == IGNORED)).all()


def test_prompt_in_training_is_the_prompt_at_inference_byte_for_byte(batch, rows, tuned, monkeypatch):
    """Law 2: what the extractor feeds the model is what stands before the labels, tokens and pixels alike."""
    fed = {}
    monkeypatch.setattr(Decoder, "generate", lambda self, inputs, *_: fed.update(inputs) or [])
    tuned.generate_texts([rows["train"][0]["image"]])
    length = (batch["labels"][0] == IGNORED).logical_and(batch["attention_mask"][0] == 1).sum()
    assert torch.equal(fed["input_ids"][0], batch["input_ids"][0][:length])
    assert torch.equal(fed["pixel_values"][0], batch["pixel_values"][0])


def test_the_prompt_shows_valid_canonical_json():
    shown = [line for line in prompts.SYSTEM.splitlines() if line.startswith("{")]
    assert len(shown) == 2
    assert [FoodRecord.parse(line).is_food for line in shown] == [1, 0]


def test_audit_tells_answer_from_context(batch, processor):
    tokens = audit(processor, batch, row=0)
    answer = "".join(text for text, seen in tokens if seen)
    assert answer.endswith("<end_of_utterance>")
    assert FoodRecord.parse(answer.removesuffix("<end_of_utterance>").removeprefix(" "))
    assert all("image" not in text or text == "image" for text, seen in tokens if seen)


def test_a_template_without_eos_is_refused(rows, processor):
    row = as_conversations(rows["train"])[0]
    with pytest.raises(ValueError, match="labels would be wrong"):
        Collator(processor).answer_text(row, "another prompt")
