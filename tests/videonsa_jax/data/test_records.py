"""Records of both layouts, and what a broken one says."""

import pathlib

import pytest

from videonsa_jax.data.chat import IMAGE, VIDEO, Message
from videonsa_jax.data.errors import BadSample
from videonsa_jax.data.records import parse_record
from videonsa_jax.data.visuals import FrameFiles, ImageFile, VideoFile

ROOT = pathlib.Path("videos")
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
A, B = ImageFile("videos/a.png"), ImageFile("videos/b.png")
V, W = VideoFile("videos/v.mp4"), VideoFile("videos/w.mp4")


def llava(**fields) -> dict:
    return {"id": "1", "conversations": TURNS, **fields}


def swift(*contents: object, **fields) -> dict:
    """User and assistant by turns; a single content is answered."""
    contents = (*contents, "Red.") if len(contents) == 1 else contents
    turns = zip(("user", "assistant") * len(contents), contents, strict=False)
    return {"messages": [{"role": role, "content": text} for role, text in turns], **fields}


def parse(record: object):
    return parse_record(record, "d.jsonl:7", ROOT)


def texts(record: object) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in parse(record).messages]


def test_llava_video():
    conversation = parse(llava(video="a/b.mp4"))
    assert conversation.visuals == (VideoFile("videos/a/b.mp4"),)
    assert conversation.messages == (
        Message("user", f"{VIDEO}\nWhat?"),
        Message("assistant", "Red."),
    )


@pytest.mark.parametrize("field", ["video", "image", "images"])
def test_llava_frames_of_one_video(field):
    conversation = parse(llava(**{field: ["0.jpg", {"path": "1.jpg", "bytes": None}]}, fps=2))
    assert conversation.visuals == (FrameFiles(("videos/0.jpg", "videos/1.jpg"), 2.0),)
    assert VIDEO in conversation.messages[0].text


@pytest.mark.parametrize("missing", [None, []])
def test_empty_fields_are_no_visuals(missing):
    assert parse(llava(video="v.mp4", image=missing, images=missing)).visuals == (V,)
    assert parse(swift("What?", images=missing, videos=missing, audios=missing)).visuals == ()


@pytest.mark.parametrize("fps", ["30", None, 0, 29.97])
def test_rate_of_a_video_file_is_its_own(fps):
    assert parse(llava(video="v.mp4", fps=fps)).visuals == (V,)


def test_several_turns_and_a_system_turn():
    turns = [{"from": "system", "value": "Be brief."}, *TURNS, {"from": "human", "value": "Sure?"}]
    messages = parse({"video": "b.mp4", "conversations": turns}).messages
    assert [m.role for m in messages] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize("field", ["image", "images"])
def test_swift_images_are_one_tag_each(field):
    conversation = parse(swift("<image><image>What?", **{field: ["a.png", {"path": "b.png"}]}))
    assert conversation.visuals == (A, B)
    assert conversation.messages[0].text == f"{IMAGE}{IMAGE}What?"


def test_swift_videos_and_images_in_the_order_of_the_text(tmp_path):
    for name in ("10.png", "9.png"):
        (tmp_path / name).touch()
    record = swift("<video>?<image>!<video>", images=["a.png"], videos=["v.mp4", str(tmp_path)])
    frames = FrameFiles((f"{tmp_path}/9.png", f"{tmp_path}/10.png"), None)
    assert parse(record).visuals == (V, A, frames)


@pytest.mark.parametrize("field", ["video", "videos"])
def test_a_list_is_several_videos_in_swift_and_one_of_frames_within_it(field):
    record = swift("<video><video>?", **{field: ["v.mp4", ["a.png", "b.png"]]})
    assert parse(record).visuals == (V, FrameFiles(("videos/a.png", "videos/b.png"), None))


@pytest.mark.parametrize(
    ("record", "first_user_text", "visuals"),
    [
        (swift("What?", videos=["v.mp4"]), f"{VIDEO}What?", (V,)),
        (swift("What?", images=["a.png", "b.png"]), f"{IMAGE}{IMAGE}What?", (A, B)),
        (
            swift("What?", images=["a.png", "b.png"], videos=["v.mp4", "w.mp4"]),
            f"{VIDEO}{VIDEO}{IMAGE}{IMAGE}What?",
            (V, W, A, B),
        ),
        (
            swift("Is <video> so?", images=["a.png"], videos=["v.mp4"]),
            f"{IMAGE}Is {VIDEO} so?",
            (A, V),
        ),
        (swift("So <image>?", images=["a.png", "b.png"]), f"{IMAGE}So {IMAGE}?", (A, B)),
        (
            swift("What?", "Red.", "And <image>?", "Blue.", images=["a.png", "b.png"]),
            f"{IMAGE}What?",
            (A, B),
        ),
        (swift("Which?", "Use <video>.", videos=["v.mp4"]), f"{VIDEO}Which?", (V,)),
    ],
)
def test_missing_tags_of_swift_stand_before_the_first_user_turn(record, first_user_text, visuals):
    system = {"role": "system", "content": "Be brief."}
    for turns in (record["messages"], [system, *record["messages"]]):
        conversation = parse({**record, "messages": turns})
        users = [m.text for m in conversation.messages if m.role == "user"]
        assert users[0] == first_user_text
        assert conversation.visuals == visuals


@pytest.mark.parametrize("answer", ["Use the <video> element.", "<image>", "<image><video><image>"])
@pytest.mark.parametrize("make", [llava, swift])
def test_tags_in_answers_and_system_prompts_are_text(make, answer):
    turns = [
        {"role": "system", "content": "Never write <image>."},
        {"role": "user", "content": "<video>\nWhich element?"},
        {"role": "assistant", "content": answer},
    ]
    key = "conversations" if make is llava else "messages"
    conversation = parse({"videos": ["v.mp4"], key: turns})
    assert conversation.visuals == (V,)
    assert [m.text for m in conversation.messages] == [
        "Never write <image>.",
        f"{VIDEO}\nWhich element?",
        answer,
    ]


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", VIDEO])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_qwens_own_marks_cannot_pass_for_a_visual(token, place):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<video>What?"},
        {"role": "assistant", "content": "Red."},
    ]
    turns[place]["content"] += token
    with pytest.raises(BadSample, match=r"turn spells <\|.*\|>, Qwen's own mark of a visual"):
        parse({"messages": turns, "videos": ["v.mp4"]})


def test_loss_is_left_out_where_the_record_says_so():
    record = swift("a", "b", "c", "d", "e", "f")
    for turn, fields in zip(
        record["messages"],
        [{"loss": False}, {"loss": False}, {}, {"loss": True}, {"loss": None}, {"loss_scale": 0}],
        strict=True,
    ):
        turn.update(fields)
    answers = [m.bears_loss for m in parse(record).messages if m.role == "assistant"]
    assert answers == [False, True, False]


def test_swift_joins_turns_of_one_role():
    record = swift("x", "y")
    record["messages"] += [{"role": "assistant", "content": "z"}, {"role": "user", "content": "?"}]
    assert texts(record) == [("user", "x"), ("assistant", "yz"), ("user", "?")]


def test_swift_puts_an_empty_turn_before_an_answer_to_nothing():
    assert texts({"messages": [{"role": "assistant", "content": "I love music"}]}) == [
        ("user", ""),
        ("assistant", "I love music"),
    ]


@pytest.mark.parametrize("history", [None, [], [["q1", "r1"], ["q2", None]]])
@pytest.mark.parametrize("system", ["system", "system_prompt"])
def test_swift_query_and_response(system, history):
    record = {"query": "?", "response": "r", "history": history, "images": ["a.png"], system: "S"}
    assert parse(record).visuals == (A,)
    if history:
        turns = [("user", f"{IMAGE}q1"), ("assistant", "r1"), ("user", "q2?"), ("assistant", "r")]
    else:
        turns = [("user", f"{IMAGE}?"), ("assistant", "r")]
    assert texts(record) == [("system", "S"), *turns]


@pytest.mark.parametrize("record", [swift("<image>?", images=["a.png"]), llava(video="v.mp4")])
def test_system_field_stands_in_front_unless_there_is_a_system_turn(record):
    assert texts({**record, "system": "S"})[0] == ("system", "S")
    key = "messages" if "messages" in record else "conversations"
    turns = [{"role": "system", "content": "own"}, *record[key]]
    assert [t for t in texts({**record, key: turns, "system": "S"}) if t[0] == "system"] == [
        ("system", "own")
    ]


def test_keys_and_roles_of_either_layout_are_read_in_both():
    turns = [{"role": "user", "content": "<image>?"}, {"from": "bot", "value": "Red."}]
    for key in ("conversations", "messages"):
        assert texts({key: turns, "image": "a.png"}) == [
            ("user", f"{IMAGE}?"),
            ("assistant", "Red."),
        ]


def test_content_as_a_list_of_parts():
    content = [
        {"type": "video", "video": "v.mp4"},
        {"type": "text", "text": " or "},
        {"type": "image_url", "image_url": {"url": "file:///d/a.png"}},
        {"type": "image", "image": {"path": "b.png", "bytes": None}},
        {"type": "text", "text": "?"},
    ]
    conversation = parse(swift(content, [{"type": "text", "text": "The first."}]))
    assert conversation.visuals == (V, ImageFile("/d/a.png"), B)
    assert conversation.messages[0].text == f"{VIDEO} or {IMAGE}{IMAGE}?"
    assert conversation.messages[1].text == "The first."


def test_parts_without_files_stand_for_those_of_the_record():
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    assert texts(swift(content, images=["a.png"]))[0] == ("user", f"{IMAGE}?")


@pytest.mark.parametrize(
    "fields",
    [
        {"objects": {"ref": [], "bbox": []}, "tools": None, "chat_template_kwargs": {}},
        {"label": 1, "channel": "x", "rejected_response": "Blue."},
    ],
)
def test_fields_that_change_nothing_are_passed_over(fields):
    assert texts(swift("What?", **fields)) == [("user", "What?"), ("assistant", "Red.")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([1, 2], "a record must be a JSON object, not list"),
        ({"video": "a.mp4"}, 'has neither "conversations" nor "messages", nor a "query"'),
        (llava(conversations=[]), "must be a list of at least one turn"),
        (llava(conversations="<image>"), "must be a list of at least one turn"),
        (llava(conversations=[{"from": "gpt"}]), 'an object with a text "value"'),
        (llava(conversations=["What?"]), 'an object with a text "value"'),
        (llava(conversations=[{"from": "cat", "value": "?"}]), "\"from\": 'cat' is not one of"),
        (llava(conversations=[{"from": ["gpt"], "value": "?"}]), "\"from\": ['gpt'] is not one of"),
        (llava(), "1 <image> and 0 <video> tags for 0 images and 0 videos"),
        (llava(videos=["a.mp4", "b.mp4"]), "1 <image> and 0 <video> tags for 0 images and 2"),
        (llava(conversations=TURNS[1:], video="a"), "0 <image> and 0 <video> tags for 0 images"),
        (swift("<image>" * 3, images=["a.png"]), "3 <image> and 0 <video> tags for 1 images"),
        (swift("half of \ud83d"), "a user turn is no Unicode text"),
        (swift("?", "half of \udc00"), "assistant turn is no Unicode text"),
        (llava(video=7), "7 is not the path of an image or video"),
        (llava(video=[]), "has zero frames"),
        (llava(video=["a.png"], fps=0), '"fps": 0 must be a number above 0'),
        (llava(video=["a.png"], fps=float("nan")), '"fps": nan must be a number above 0'),
        (llava(video=["a.png"], fps=10**400), "must be a number above 0, at most 10000"),
        (llava(video="https://x.org/a.mp4"), "nothing is fetched by https://"),
        (swift("?", system=7), 'an object with a text "content"'),
        ({"messages": [{"role": "tool", "content": "?"}]}, "\"role\": 'tool' is not one of"),
        (
            {"messages": [{"role": "assistant", "content": "<image>"}], "images": ["a.png"]},
            "has no user turn, where its images and videos belong",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "loss": "no"}]},
            "\"loss\": 'no' must",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "loss_scale": 0.5}]},
            '"loss_scale": 0.5: turns are not weighted',
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": "x", "loss": False},
                    {"role": "assistant", "content": "y"},
                ]
            },
            "assistant turns in a row differ in their loss",
        ),
        (swift("?", objects={"ref": [], "bbox": [[1, 2]]}), '"objects" of ms-swift is not read'),
        (swift("?", audios=["a.wav"]), '"audios" of ms-swift is not read'),
        (swift("?", tools="[]"), '"tools" of ms-swift is not read'),
        (swift("?", chat_template_kwargs={"fps": 1}), '"chat_template_kwargs" of ms-swift'),
        ({"query": "?", "history": "[]"}, '"history" must be a list of [query, response]'),
        ({"query": "?", "response": ["a", "b"]}, "a part of type 'None' is not read in"),
        (
            swift([{"type": "audio", "audio": "a.wav"}]),
            "a part of type 'audio' is not read in user turns",
        ),
        (
            swift("?", [{"type": "image", "image": "a.png"}]),
            "a part of type 'image' is not read in assistant turns",
        ),
        (
            swift([{"type": "image", "image": "a.png"}], images=["b.png"]),
            "has images both in its turns and in a field of the record",
        ),
    ],
)
def test_broken_record_is_one_clear_line(record, reason):
    with pytest.raises(BadSample) as error:
        parse(record)
    assert str(error.value).startswith("d.jsonl:7: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
