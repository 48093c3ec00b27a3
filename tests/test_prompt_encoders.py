from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import HIDDEN

from cond_pdiff.conditions.task_prompt import TaskPrompt
from cond_pdiff.errors import ConditionError, HubError
from cond_pdiff.hub import MINILM, Backbone
from cond_pdiff.models.prompt_encoders import ClipConditionEncoder, PromptReport, SentenceConditionEncoder, prompt_text
from cond_pdiff.models.sentence_backbone import SentenceBackbone

KIND = [("the good film", "positive"), ("the bad meal", "negative")]
PROMPTS = [
    TaskPrompt("Is the film good?", KIND),
    TaskPrompt("Which animal is it?", [(("the cat", "the kitten"), "cat"), (("the puppy", "the dog"), "dog")]),
    TaskPrompt("Кот или собака? 🐈", labels=["cat", "dog"]),
    TaskPrompt("Is the room dull?"),
]


# --- sentence encoder --------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(tiny_backbone: Backbone) -> SentenceConditionEncoder:
    return SentenceConditionEncoder(tiny_backbone.to_json(), HIDDEN, max_tokens=32)


def parts(embeddings: torch.Tensor) -> torch.Tensor:
    """Description, labels and examples of each condition, shape `(batch, 3, embedding_dim)`."""
    return embeddings.unflatten(1, (3, -1))


def test_shape_and_a_report_for_each(encoder: SentenceConditionEncoder) -> None:
    embeddings, reports = encoder.encode(PROMPTS)
    assert embeddings.shape == (len(PROMPTS), encoder.condition_dim) == (len(PROMPTS), 3 * HIDDEN)
    assert embeddings.dtype == torch.float32
    assert reports[0] == PromptReport(tokens=8, token_limit=32)
    assert reports[0].to_json() == {"tokens": 8, "token_limit": 32, "examples_dropped": 0, "texts_cut": 0}
    assert torch.pdist(embeddings).min() > 1e-2


def test_missing_parts_are_zeros_and_the_others_have_length_one(encoder: SentenceConditionEncoder) -> None:
    for center in (0.0, 0.1):
        encoder.center.fill_(center)
        norms = parts(encoder.encode(PROMPTS)[0]).norm(dim=2)
        expected = torch.tensor([[1.0, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]])
        torch.testing.assert_close(norms, expected, atol=1e-5, rtol=0)
        assert not norms[expected == 0].any()


def test_parts_are_the_means_of_their_texts(encoder: SentenceConditionEncoder, sentence_backbone: SentenceBackbone) -> None:
    description, labels, examples = parts(encoder.encode(PROMPTS[:1])[0])[0]
    for part, texts in ((description, ["Is the film good?"]), (labels, ["positive", "negative"]), (examples, [text for text, _ in KIND])):
        mean = sentence_backbone.embed(texts).mean(0)
        torch.testing.assert_close(part, mean / mean.norm(), atol=1e-5, rtol=0)


def test_a_batch_is_as_single_calls(encoder: SentenceConditionEncoder) -> None:
    together, reports = encoder.encode(PROMPTS)
    for prompt, embedding, report in zip(PROMPTS, together, reports, strict=True):
        alone, (own,) = encoder.encode([prompt])
        torch.testing.assert_close(alone[0], embedding, atol=1e-5, rtol=0)
        assert own == report


def test_the_center_is_the_mean_and_is_taken_away(encoder: SentenceConditionEncoder) -> None:
    before = parts(encoder.encode(PROMPTS[:2])[0])
    encoder.fit_center(PROMPTS[:2])
    torch.testing.assert_close(encoder.center, before.mean(0))
    after = parts(encoder.encode(PROMPTS[:2])[0])
    torch.testing.assert_close(after[0], -after[1], atol=1e-4, rtol=0)  # two unit vectors lie opposite around their mean


def test_a_plain_string_is_a_description(encoder: SentenceConditionEncoder) -> None:
    assert torch.equal(encoder.encode(["Is the room dull?"])[0], encoder.encode(PROMPTS[3:])[0])


def test_the_longest_description_fits_and_one_more_token_is_refused(encoder: SentenceConditionEncoder) -> None:
    (report,) = encoder.encode(["the " * 30])[1]
    assert report == PromptReport(32, 32)
    with pytest.raises(ConditionError, match="description has 33 tokens; the condition encoder reads 32: shorten it"):
        encoder.encode([PROMPTS[0], "the " * 31])


def test_long_examples_are_counted(encoder: SentenceConditionEncoder) -> None:
    texts = TaskPrompt("Is it?", [("the " * 30, "cat"), ("the " * 31, "cat"), ("the dog", "dog")])
    pairs = TaskPrompt("Is it?", [(("the " * 40, "the cat"), "cat"), (("the", "dog"), "dog")])
    reports = encoder.encode([texts, pairs])[1]
    assert reports == [PromptReport(33, 32, texts_cut=1), PromptReport(45, 32, texts_cut=1)]


def test_what_is_cut_is_the_end(encoder: SentenceConditionEncoder) -> None:
    first, second = (TaskPrompt("Is it?", [("the " * 40 + end, "cat"), ("a", "dog")]) for end in ("good", "bad"))
    assert torch.equal(*(encoder.encode([prompt])[0] for prompt in (first, second)))


def test_saved_encoder_is_bit_identical_small_and_without_backbone(encoder: SentenceConditionEncoder, tmp_path: Path) -> None:
    encoder.fit_center(PROMPTS[:2])
    before, _ = encoder.encode(PROMPTS)
    encoder.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size < 4 * 3 * HIDDEN + 200
    loaded = SentenceConditionEncoder.from_pretrained(tmp_path)
    assert loaded.config.backbone == encoder.config.backbone
    assert torch.equal(loaded.encode(PROMPTS)[0], before)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == 0


def test_a_backbone_of_other_bytes_is_refused_on_first_use(tiny_backbone: Backbone) -> None:
    encoder = SentenceConditionEncoder({**tiny_backbone.to_json(), "sha256": "0" * 64}, HIDDEN)
    with pytest.raises(HubError, match="expected 000000000000"):
        encoder.encode(PROMPTS)


def test_the_default_backbone_is_pinned() -> None:
    assert SentenceConditionEncoder().config.backbone == MINILM.to_json()
    assert None not in MINILM.to_json().values()


# --- CLIP --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip() -> ClipConditionEncoder:
    """ViT-B/32 with random weights; building it takes seconds."""
    encoder = ClipConditionEncoder(backbone=None)
    encoder.encode(["x"])
    return encoder


def test_clip_embeds_to_unit_length(clip: ClipConditionEncoder) -> None:
    embeddings, reports = clip.encode(PROMPTS)
    assert embeddings.shape == (len(PROMPTS), clip.condition_dim) == (len(PROMPTS), 512)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(PROMPTS)), atol=1e-5, rtol=0)
    assert torch.pdist(embeddings).min() > 1e-3
    torch.testing.assert_close(clip.encode(PROMPTS[1:2])[0][0], embeddings[1], atol=1e-5, rtol=0)
    assert all(report.token_limit == 77 and report.examples_dropped == report.texts_cut == 0 for report in reports)


def test_clip_reads_description_then_examples(clip: ClipConditionEncoder) -> None:
    assert prompt_text(PROMPTS[1], 2) == "Which animal is it? the cat / the kitten → cat the puppy / the dog → dog"
    assert prompt_text(PROMPTS[1], 1) == "Which animal is it? the cat / the kitten → cat"
    assert torch.equal(clip.encode([prompt_text(PROMPTS[1], 2)])[0], clip.encode(PROMPTS[1:2])[0])


@pytest.mark.parametrize("words", [1, 40, 75])
def test_clip_counts_every_token(clip: ClipConditionEncoder, words: int) -> None:
    assert clip.encode(["cat " * words])[1] == [PromptReport(words + 2, 77)]


@pytest.mark.parametrize("words", [76, 5000])
def test_clip_refuses_a_description_that_does_not_fit(clip: ClipConditionEncoder, words: int) -> None:
    with pytest.raises(ConditionError, match=f"description has {words + 2} tokens; CLIP reads 77: shorten it"):
        clip.encode([TaskPrompt("cat " * words, KIND)])


def test_clip_drops_whole_examples_last_first_and_reports_it(clip: ClipConditionEncoder) -> None:
    examples = [("cat " * 20, label) for label in ("good", "bad", "good", "bad")]  # 22 tokens each, with arrow and label
    prompt = TaskPrompt("Is it?", examples)
    embeddings, (report,) = clip.encode([prompt])
    assert report.examples_dropped == 1
    assert report.tokens == 5 + 3 * 22 <= 77 < 5 + 4 * 22
    assert torch.equal(embeddings, clip.encode([TaskPrompt("Is it?", examples[:3])])[0])
    assert not torch.equal(embeddings, clip.encode([TaskPrompt("Is it?", examples[:2])])[0])


def test_clip_counts_what_its_tokenizer_reads(clip: ClipConditionEncoder) -> None:
    """The report's count is the number of non-padding tokens that really reach the model: nothing was cut."""
    _, tokenizer = clip.backbone
    for text in ("Кот или собака? 🐈👩‍👩‍👧", "e\u0301 ﬁ &amp;amp; <b>", "don't   stop\n\nnow", "<start_of_text> cat <end_of_text>"):
        (report,) = clip.encode([text])[1]
        assert report.tokens == int((tokenizer([text]) != 0).sum())


def test_clip_saves_no_backbone_and_comes_back(clip: ClipConditionEncoder, tmp_path: Path) -> None:
    clip.save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1000
    loaded = ClipConditionEncoder.from_pretrained(tmp_path)
    assert loaded.config.backbone is None
    torch.manual_seed(7)  # random weights do not depend on the caller's seed, and leave it alone
    embeddings, _ = loaded.encode(PROMPTS)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(7))
    assert torch.equal(embeddings, clip.encode(PROMPTS)[0])


def test_clip_backbone_that_cannot_be_had_is_named() -> None:
    with pytest.raises(HubError, match="nobody/clip is not in the cache"):
        ClipConditionEncoder(backbone=Backbone("nobody/clip").to_json()).encode(["x"])
