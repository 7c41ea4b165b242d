"""The chat format equals Qwen's template; answers, and only answers, carry loss."""

import jinja2
import numpy as np
import pytest

from videonsa_jax.config.schema import PRESETS
from videonsa_jax.data import chat
from videonsa_jax.data.chat import Message
from videonsa_jax.data.sample import Visual

CFG = PRESETS["tiny"].vision
# Qwen2.5-VL-Instruct's chat template, less its branches for numbered pictures.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = [{"type": "video"}, {"type": "text", "text": "\nWhat?"}]
CONVERSATIONS = {
    "one_turn": ([Message("user", f"{chat.VIDEO}\nWhat?")], [("user", QUESTION)]),
    "several_turns": (
        [
            Message("user", f"{chat.VIDEO}\nWhat?"),
            Message("assistant", "Red."),
            Message("user", "Sure?"),
            Message("assistant", "Yes."),
        ],
        [("user", QUESTION), ("assistant", "Red."), ("user", "Sure?"), ("assistant", "Yes.")],
    ),
    "own_system_and_image": (
        [Message("system", "Be brief."), Message("user", chat.IMAGE + "Hm?")],
        [("system", "Be brief."), ("user", [{"type": "image"}, {"type": "text", "text": "Hm?"}])],
    ),
}


def visual(t: int, h: int, w: int, *, is_video: bool = True) -> Visual:
    return Visual(np.zeros((t * h * w, CFG.patch_elements), np.float32), (t, h, w), is_video)


@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize(("messages", "contents"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_text_is_what_qwens_template_writes(messages, contents, generation_prompt):
    want = jinja2.Template(TEMPLATE, keep_trailing_newline=True).render(
        messages=[{"role": role, "content": content} for role, content in contents],
        add_generation_prompt=generation_prompt,
    )
    assert chat.render(messages, generation_prompt=generation_prompt) == want


def test_tokens_are_those_of_the_rendered_text(tokenizer):
    messages, _ = CONVERSATIONS["several_turns"]
    tokens, _ = chat.tokenize(messages, tokenizer)
    assert tokens.tolist() == tokenizer.encode(chat.render(messages))


def test_loss_is_on_answers_and_their_end_token_only(tokenizer):
    messages, _ = CONVERSATIONS["several_turns"]
    tokens, weights = chat.tokenize(messages, tokenizer)
    assert tokenizer.decode(tokens[weights == 1]) == "Red.<|im_end|>Yes.<|im_end|>"
    assert set(weights.tolist()) == {0.0, 1.0}


def test_answer_that_bears_no_loss_is_read_but_not_learnt(tokenizer):
    messages, _ = CONVERSATIONS["several_turns"]
    all_tokens, _ = chat.tokenize(messages, tokenizer)
    messages = [*messages[:1], Message("assistant", "Red.", bears_loss=False), *messages[2:]]
    tokens, weights = chat.tokenize(messages, tokenizer)
    assert tokens.tolist() == all_tokens.tolist()
    assert tokenizer.decode(tokens[weights == 1]) == "Yes.<|im_end|>"


def test_generation_prompt_and_answer_make_the_training_sequence(tokenizer):
    asked = [Message("user", "What?")]
    prompt, _ = chat.tokenize(asked, tokenizer, generation_prompt=True)
    whole, weights = chat.tokenize([*asked, Message("assistant", " \n\nRed.")], tokenizer)
    assert whole[: len(prompt)].tolist() == prompt.tolist()
    assert np.flatnonzero(weights)[0] == len(prompt)


def test_each_placeholder_becomes_one_per_merged_token(tokenizer):
    messages = [Message("user", f"{chat.VIDEO}{chat.IMAGE}What?"), Message("assistant", "Red.")]
    visuals = [visual(3, 4, 6), visual(1, 2, 4, is_video=False)]
    sample = chat.to_sample(messages, visuals, tokenizer, CFG)
    assert (sample.tokens == tokenizer.video_pad).sum() == 3 * 2 * 3
    assert (sample.tokens == tokenizer.image_pad).sum() == 1 * 1 * 2
    assert len(sample.loss_weights) == len(sample.tokens)
    assert tokenizer.decode(sample.tokens[sample.loss_weights == 1]) == "Red.<|im_end|>"


@pytest.mark.parametrize(
    ("text", "given", "reason"),
    [
        (chat.VIDEO * 2, 1, "placeholders for 2 videos, but the sample comes with 1 video"),
        ("What?", 1, "placeholders for no visual, but the sample comes with 1 video"),
        (chat.IMAGE, 1, "placeholders for 1 image, but the sample comes with 1 video"),
    ],
)
def test_placeholders_that_do_not_match_are_rejected(tokenizer, text, given, reason):
    with pytest.raises(ValueError, match=reason):
        chat.to_sample([Message("user", text)], [visual(1, 2, 2)] * given, tokenizer, CFG)


def test_unknown_role_is_rejected():
    with pytest.raises(ValueError, match="role='robot' is not one of system, user, assistant"):
        Message("robot", "beep")
