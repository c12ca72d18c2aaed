import copy
import json

import pytest
import torch
from hypothesis import given, settings
from llguidance import LLMatcher
from PIL import Image
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SmolVLMForConditionalGeneration

from foodextract import schema
from foodextract.data import scenes
from foodextract.inference.decoding import Decoder, Guide
from foodextract.inference.extractor import MAX_NEW_TOKENS, Extractor
from foodextract.inference.grammar import Dialect
from foodextract.models import loading
from foodextract.schema import FoodRecord
from odd_images import odd_images
from test_schema import GOOD, NOTHING, records

JSON, BEHIND_SPACE = Dialect(), Dialect(" ")


@pytest.fixture(scope="module")
def base():
    return Extractor.from_pretrained(loading.TINY_BASE, "cpu")


@pytest.fixture(scope="module")
def random_weights(base):
    torch.manual_seed(1)
    return Extractor(SmolVLMForConditionalGeneration(base.model.config).eval(), base.processor)


@pytest.fixture(scope="module")
def images():
    return [scene.image for scene in scenes.draw_scenes(77, "test", 8)] + list(odd_images(8))


@pytest.fixture(scope="module")
def accepts(tuned):
    decoder, guide = tuned._decoder, tuned._guide(BEHIND_SPACE)

    def accepts(text):
        matcher = guide.matcher.deep_copy()
        tokens = decoder.lltokenizer.tokenize_str(" " + text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting() and matcher.is_stopped()

    return accepts


def test_grammar_accepts_every_canonical_text(accepts):
    @settings(max_examples=60, deadline=None)
    @given(records(exclude_categories=["Cs", "Cc"], exclude_characters='"\\[]{}:_'))
    def check(record):
        assert accepts(record.to_json())

    check()
    for letter in ("\x80", "é", "\u2028", "\ud7ff", "\ue000", "\uffff", "🥨", "\U0010ffff", "/", "|", "'", "<", "~"):
        assert accepts(
            FoodRecord(is_food=1, image_title=letter * schema.MAX_TITLE, food_items=[letter], drink_items=[]).to_json()
        ), letter


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace(", ", ","),
        GOOD + " ",
        GOOD.replace('"is_food": 1', '"is_food": 0'),
        NOTHING.replace(": 0", ": 2"),
        NOTHING.replace('""', '"x"'),
        GOOD.replace("beer and", "b\u00e9er"),
        GOOD.replace("beer and", "\\u00E9"),
        GOOD.replace("beer and", "\\u0041"),
        GOOD.replace("beer and", "\\u000a"),
        GOOD.replace("beer and", "\\/"),
        GOOD.replace("beer and", "\\ud83e"),
        GOOD.replace("beer and", "\\udd68"),
        GOOD.replace("beer and", "\t"),
        GOOD.replace("beer and", "x" * schema.MAX_TITLE),
        GOOD.replace('["beer"]', '[""]'),
        GOOD.replace('["beer"]', json.dumps(["x" * (schema.MAX_ITEM + 1)])),
        GOOD.replace('["beer"]', json.dumps([str(n) for n in range(schema.MAX_ITEMS + 1)])),
    ],
)
def test_grammar_rejects_everything_else(accepts, text):
    assert not accepts(text)
    with pytest.raises(schema.AnswerError):
        FoodRecord.parse(text)


def test_list_ends_before_its_first_repeat():
    begun = '{"is_food": 1, "image_title": "\\"food_items\\": [\\"a\\", \\"a\\"]", "food_items": ["a", "a b", "b"'
    for fine in ("", " {", begun, begun + ', "a', begun + '], "drink_items": ["a", "b"]}', GOOD, NOTHING):
        assert JSON.without_repeats(fine) == fine
    assert JSON.without_repeats(begun + ', "a b"') == begun + '], "drink_items":'
    assert JSON.without_repeats(begun + ', "a b", "') == begun + '], "drink_items":'
    assert JSON.without_repeats(begun + '], "drink_items": ["\\\\", "\\\\"') == begun + '], "drink_items": ["\\\\"]}'


def test_incomplete_answer_is_read_up_to_its_last_complete_value():
    text = '{"is_food": 1, "image_title": "a, \\"b\\"", "food_items": ["c", "d]"], "drink_items": ["e"]}'
    assert JSON.read(text).to_json() == text
    whole = FoodRecord.parse(text)
    for length in range(len(text)):
        cut = JSON.read(text[:length])
        assert cut.is_food == (length > text.index("1"))
        assert cut.image_title in ("", whole.image_title)
        for field in ("food_items", "drink_items"):
            assert getattr(cut, field) == getattr(whole, field)[: len(getattr(cut, field))]
    assert JSON.read(text[:-3]).food_items == ["c", "d]"]


@pytest.mark.parametrize("name", ["tuned", "base", "random_weights"])
def test_answer_is_a_record_for_any_weights_and_image(name, request):
    extractor = request.getfixturevalue(name)
    results = list(extractor.extract_many(odd_images(24, seed=3), batch_size=24))
    assert [type(result) for result in results] == [FoodRecord] * 24


def test_free_answer_equals_generate(base, images):
    inputs = base.prepare(images)
    written = base.model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    texts = base.processor.tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert base.generate_texts(images) == [text.removeprefix(" ") for text in texts]
    assert len(set(map(len, texts))) > 3  # they end at different steps


def test_grammar_changes_no_valid_answer(tuned, images):
    plain = Extractor(tuned.model, tuned.processor)  # without training data, so that titles stay
    free, strict = plain.generate_texts(images), plain.generate_texts(images, constrained=True)
    allowed = [number for number, text in enumerate(free) if valid(text)]
    assert len(allowed) >= len(images) // 2
    assert [free[number] for number in allowed] == [strict[number] for number in allowed]


def valid(text):
    try:
        return bool(FoodRecord.parse(text))
    except schema.AnswerError:
        return False


@pytest.mark.parametrize("name", ["tuned", "base", "random_weights"])
def test_batch_answer_is_single_answer(name, request, images):
    extractor = request.getfixturevalue(name)
    some = images[::3]
    assert extractor.generate_texts(some, constrained=True) == [
        extractor.generate_texts([image], constrained=True)[0] for image in some
    ]


@torch.inference_mode()
def replay(model, guide, inputs, answers, rows):
    """Each token is the best allowed one, and as probable, when one forward without cache or batch reads the whole
    answer at once.
    """
    for number in rows:
        answer = answers[number]
        one = {key: value[number : number + 1][:, : value.shape[1]] for key, value in inputs.items()}
        shown = one.pop("attention_mask").bool()[0]
        ids = torch.cat([one.pop("input_ids")[0][shown], torch.tensor(answer.tokens)])[None]
        logits = model(input_ids=ids, **one, use_cache=False).logits[0, -len(answer.tokens) - 1 : -1]
        matcher = guide.matcher.deep_copy()
        for token, logprob, row in zip(answer.tokens, answer.logprobs, logits, strict=True):
            if logprob is not None:
                allowed = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
                bits = (allowed[:, None] >> torch.arange(8)).bitwise_and(1).bool().flatten()[: len(row)]
                masked = row.masked_fill(~bits, -torch.inf).log_softmax(-1)
                assert masked[token] >= masked.max() - 1e-4
                assert float(masked[token]) == pytest.approx(logprob, abs=1e-3)
            assert matcher.consume_token(token)


@pytest.mark.parametrize("name", ["tuned", "random_weights"])
def test_cache_padding_and_forced_tokens_change_no_answer(name, request, images):
    extractor = request.getfixturevalue(name)
    inputs = extractor.prepare(images)
    guide = extractor._guide(BEHIND_SPACE)
    answers = extractor._decoder.generate(inputs, 120, guide)
    replay(extractor.model, guide, inputs, answers, rows=(0, 3, 9, 15))
    assert any(logprob is None for answer in answers for logprob in answer.logprobs)


def test_forced_tokens_and_finished_rows_cost_no_forward(tuned, images):
    guide = tuned._guide(BEHIND_SPACE)
    tuned._decoder.generate(tuned.prepare(images[:1]), 1, guide)  # caches the prefix
    shapes = []
    hook = tuned.model.register_forward_pre_hook(
        lambda model, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        answers = tuned._decoder.generate(tuned.prepare(images), MAX_NEW_TOKENS, guide)
    finally:
        hook.remove()
    chosen = [sum(logprob is not None for logprob in answer.logprobs) for answer in answers]
    assert shapes[0][0] == len(images)
    assert [shape[0] for shape in shapes] == sorted((shape[0] for shape in shapes), reverse=True)
    assert shapes[-1][0] < len(images)
    assert max(chosen) <= len(shapes) < max(len(answer.tokens) for answer in answers)


def test_prefix_is_read_once_and_changes_no_answer(tuned, images):
    model = copy.deepcopy(tuned.model)
    prefix, guide = tuned._decoder.prefix, tuned._guide(BEHIND_SPACE)
    whole, spared = (Decoder(model, tuned.processor.tokenizer, tokens) for tokens in ([], prefix))
    inputs, shapes = tuned.prepare(images), []
    length = inputs["input_ids"].shape[1]
    assert len(prefix) > length / 3
    model.register_forward_pre_hook(
        lambda model, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )

    def answers(decoder):
        shapes.clear()
        return [answer.tokens for answer in decoder.generate(inputs, MAX_NEW_TOKENS, guide)]

    assert answers(spared) == answers(whole)
    first = shapes[0]
    assert answers(spared) == answers(whole)
    answers(spared)
    assert shapes[0] == (first[0], first[1] - len(prefix))
    model.requires_grad_(True)  # a step of training, by an optimizer that leaves no trace in the tensors' versions
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(model.parameters(), 0.01, fused=True).step()
    before = answers(whole)
    for trains in (True, False):
        model.requires_grad_(trains)
        assert answers(spared) == before
    assert shapes[0] == (1, len(prefix))  # read anew


def test_repeat_is_taken_back(tuned, images):
    """The model is made to write a list with a repeat; from there on its answer is the one it gives where the repeat
    never stood.
    """
    decoder = Decoder(tuned.model, tuned.processor.tokenizer)  # reads no prefix of its own, which is not dictated
    said = (
        '{"is_food": 1, "image_title": "pizza", "food_items": ["pizza", "salad", "pizza", "taco"], "drink_items": []}'
    )
    script = decoder.lltokenizer.tokenize_str(" " + said)
    inputs = tuned.prepare(images[:3])
    start = inputs["input_ids"].shape[1] - 1
    changed = []

    def amend(text):
        better = BEHIND_SPACE.without_repeats(text)
        changed.append(better != text)
        return better

    def dictate(model, args, kwargs, output):
        for row, place in enumerate(kwargs["position_ids"][:, -1].tolist()):
            if not any(changed):
                output.logits[row, -1, script[place - start]] += 1000
        return output

    hook = tuned.model.register_forward_hook(dictate, with_kwargs=True)
    guide = Guide(tuned._guide(BEHIND_SPACE).matcher, amend)
    try:
        answers = decoder.generate(inputs, MAX_NEW_TOKENS, guide)
    finally:
        hook.remove()
    assert sum(changed) == 3
    for number, answer in enumerate(answers):
        text = decoder.text(answer)
        assert text.startswith(
            ' {"is_food": 1, "image_title": "pizza", "food_items": ["pizza", "salad"], "drink_items": ['
        )
        assert valid(text.removeprefix(" ")) == answer.finished
        after = len(decoder.lltokenizer.tokenize_str(text[: text.index('"drink_items":') + 14]))
        answer.logprobs[:after] = [None] * after  # these were dictated
        replay(tuned.model, guide, inputs, answers, rows=[number])


def test_answer_that_runs_out_of_tokens_is_unfinished(tuned):
    food = next(scene.image for scene in scenes.draw_scenes(5, "test", 50) if tuned.extract(scene.image).is_food)
    [answer] = tuned._decoder.generate(tuned.prepare([food]), 12, tuned._guide(BEHIND_SPACE))
    assert answer.finished is False
    assert 12 <= len(answer.tokens) < 24


def test_architecture_with_sliding_windows_and_token_types(tuned):
    """Gemma 3 from random weights, no processor of ours: prompts of two lengths around one image each."""
    tokenizer = tuned.processor.tokenizer
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    windows = {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    heads = {"num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 16}
    ids = {"vocab_size": 1000, "pad_token_id": 2, "eos_token_id": tokenizer.eos_token_id}
    config = Gemma3Config(
        text_config=sizes | heads | windows | ids,
        vision_config=sizes | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 7},
        mm_tokens_per_image=4,
        image_token_index=990,
        boi_token_index=991,
        eoi_token_index=992,
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    decoder = Decoder(model, tokenizer)
    guide = decoder.guide(JSON.grammar(), JSON.without_repeats)
    prompts = [[1, 60, 991, 990, 990, 990, 990, 992, 61, 62], [2, 2, 1, 991, 990, 990, 990, 990, 992, 63]]
    ids = torch.tensor(prompts)
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 2).long(),
        "token_type_ids": (ids == 990).long(),
        "pixel_values": torch.rand(2, 3, 28, 28),
    }
    together = decoder.generate(inputs, 60, guide)
    apart = []
    for row in range(2):
        shown = inputs["attention_mask"][row].bool()
        one = {
            key: value[row : row + 1] if key == "pixel_values" else value[row : row + 1, shown]
            for key, value in inputs.items()
        }
        apart += decoder.generate(one, 60, guide)
    assert [answer.tokens for answer in together] == [answer.tokens for answer in apart]
    for answer in together:
        assert valid(JSON.read(decoder.text(answer)).to_json())


def test_broken_grammar_is_refused(tuned):
    with pytest.raises(ValueError, match="refuses the grammar"):
        tuned._decoder.guide("start: nowhere", str)


def test_llguidance_accepts_the_grammar_without_a_warning(tuned):
    failed, messages = LLMatcher.validate_grammar_with_warnings(BEHIND_SPACE.grammar(), tuned._decoder.lltokenizer)
    assert (failed, messages) == (False, [])


def test_blank_image_gets_a_record(tuned):
    assert isinstance(tuned.extract(Image.new("L", (5, 5))), FoodRecord)
