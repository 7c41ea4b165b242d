"""Records in the layouts of LLaVA-Video-178K and ms-swift -> conversations.

LLaVA-Video-178K: {"video": PATH or [FRAME, ...], or "image" / "images": ..., "conversations":
  [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}]}
ms-swift: {"images": [PATH, ...], "videos": [PATH or [FRAME, ...], ...], "messages":
  [{"role": "user", "content": "<image>..."}, {"role": "assistant", "content": "..."}]}
  or, in place of the messages, "query", "response", "history" and "system"
"""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Sequence

from videonsa_jax.data import chat
from videonsa_jax.data.chat import Message
from videonsa_jax.data.errors import BadSample
from videonsa_jax.data.references import image_reference, video_reference
from videonsa_jax.data.tokenizer import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from videonsa_jax.data.visuals import Reference

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "system": "system",
}
TAG = re.compile("<image>|<video>")
PLACEHOLDERS = (VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
# Of ms-swift: what changes a sample and is not built here.
UNREAD_FIELDS = ("objects", "tools", "audio", "audios", "chat_template_kwargs")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One record, its files not yet opened."""

    name: str  # file and line, for messages
    messages: tuple[Message, ...]  # with chat.IMAGE and chat.VIDEO where visuals belong
    visuals: tuple[Reference, ...]  # in the order of the text


def parse_record(record: object, name: str, root: pathlib.Path) -> Conversation:
    """One record of either layout.

    Args:
      record: parsed JSON.
      name: of the record, for messages.
      root: where relative paths start.

    Raises:
      BadSample: a part is missing, of the wrong type or not supported, or the tags in the user
        turns are not one per image and video of the record.
    """
    if not isinstance(record, dict):
        raise BadSample(name, f"a record must be a JSON object, not {type(record).__name__}")
    is_llava = "conversations" in record
    parts = {"image": [], "video": []}  # given in the turns themselves
    messages = [_message(turn, is_llava, parts, name) for turn in _turns(record, name)]
    images = parts["image"] or _as_list(record.get("image")) + _as_list(record.get("images"))
    videos = parts["video"] or _video_entries(record, is_llava)
    if is_llava:
        if len(images) > 1 and not videos and len(_tags(messages)) == 1:
            images, videos = [], [images]  # one tag: the frames of one video
    else:
        _check_swift(record, parts, name)
        messages = _as_swift(messages, images, videos, name)
    return _conversation(
        messages,
        [image_reference(entry, name, root) for entry in images],
        [video_reference(entry, record.get("fps"), name, root) for entry in videos],
        name,
    )


def _turns(record: dict, name: str) -> list:
    """The turns as the record writes them, its system prompt in front."""
    key = next((key for key in ("conversations", "messages") if key in record), None)
    if key is None and "query" not in record:
        raise BadSample(name, 'has neither "conversations" nor "messages", nor a "query"')
    turns = _queries(record, name) if key is None else record[key]
    if not isinstance(turns, list) or not turns:
        raise BadSample(name, "the conversation must be a list of at least one turn")
    system = record.get("system", record.get("system_prompt"))
    if system is None or (isinstance(turns[0], dict) and _role(turns[0]) == "system"):
        return turns
    return [{"role": "system", "content": system}, *turns]


def _queries(record: dict, name: str) -> list[dict]:
    history = record.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise BadSample(name, '"history" must be a list of [query, response]')
    return [
        {"role": role, "content": text}
        for pair in [*history, (record["query"], record.get("response"))]
        for role, text in zip(("user", "assistant"), pair, strict=True)
        if text is not None
    ]


def _role(turn: dict) -> object:
    return turn["from"] if "from" in turn else turn.get("role")


def _message(turn: object, is_llava: bool, parts: dict[str, list], name: str) -> Message:
    """One turn; visuals that its content lists are added to `parts`."""
    key = "value" if is_llava else "content"
    content = None
    if isinstance(turn, dict):
        content = turn.get("value") if "value" in turn else turn.get("content")
    if not isinstance(content, str | list):
        raise BadSample(name, f'each turn must be an object with a text "{key}"')
    role = _role(turn)
    if not isinstance(role, str) or role not in ROLES:
        key = "from" if is_llava else "role"
        raise BadSample(name, f'"{key}": {role!r} is not one of {", ".join(ROLES)}')
    role = ROLES[role]
    text = content if isinstance(content, str) else _joined(content, role, parts, name)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadSample(name, f"a {role} turn is no Unicode text: it has half a character")
    for token in PLACEHOLDERS:
        if token in text:
            raise BadSample(
                name,
                f"a {role} turn spells {token}, Qwen's own mark of a visual; write <image> or "
                f"<video> in a user turn",
            )
    return Message(role, text, role != "assistant" or _bears_loss(turn, name))


def _joined(content: list, role: str, parts: dict[str, list], name: str) -> str:
    """ms-swift's list of {"type": "text" / "image" / "video", ...} as text with tags."""
    text = ""
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        value = part.get(kind) if isinstance(kind, str) else None
        kind = str(kind).removesuffix("_url")
        if kind == "text" and isinstance(value, str):
            text += value
        elif kind in parts and role == "user":
            text += f"<{kind}>"
            if value:
                parts[kind].append(value.get("url", value) if isinstance(value, dict) else value)
        else:
            raise BadSample(name, f"a part of type {kind!r} is not read in {role} turns")
    return text


def _bears_loss(turn: dict, name: str) -> bool:
    loss, scale = turn.get("loss"), turn.get("loss_scale")
    if loss is not None and not isinstance(loss, bool):
        raise BadSample(name, f'"loss": {loss!r} must be true or false')
    if scale not in (None, 0, 1):
        raise BadSample(name, f'"loss_scale": {scale!r}: turns are not weighted; write 0 or 1')
    return loss is not False and scale != 0


def _video_entries(record: dict, is_llava: bool) -> list:
    """In LLaVA's layout a list under "video" is one video; in ms-swift's it is one of videos."""
    single = record.get("video")
    videos = [single] if is_llava and single is not None else _as_list(single)
    return videos + _as_list(record.get("videos"))


def _check_swift(record: dict, parts: dict[str, list], name: str) -> None:
    """Refuses what would change the sample if it were passed over."""
    for field in UNREAD_FIELDS:
        value = record.get(field)
        if any(value.values()) if isinstance(value, dict) else value:
            raise BadSample(name, f'"{field}" of ms-swift is not read; leave the field out')
    for kind in parts:
        if parts[kind] and (record.get(kind) or record.get(f"{kind}s")):
            raise BadSample(name, f"has {kind}s both in its turns and in a field of the record")


def _as_swift(messages: list[Message], images: list, videos: list, name: str) -> list[Message]:
    """As ms-swift reads them: turns of one role in a row are one, missing tags stand before the
    first user turn's text, videos first, and an answer to nothing answers an empty turn.
    """
    by_role_and_loss = itertools.groupby(messages, lambda m: (m.role, m.bears_loss))
    messages = [
        Message(role, "".join(m.text for m in group), bears_loss=bears_loss)
        for (role, bears_loss), group in by_role_and_loss
    ]
    for before, after in itertools.pairwise(messages):
        if before.role == after.role:
            raise BadSample(name, f"{before.role} turns in a row differ in their loss")
    tags = _tags(messages)
    on_images = tags.count("<image>") if images else 0
    missing = "<video>" * (len(videos) - (len(tags) - on_images))
    missing += "<image>" * (len(images) - on_images)
    users = [i for i, message in enumerate(messages) if message.role == "user"]
    if missing and not users:
        raise BadSample(name, "has no user turn, where its images and videos belong")
    if missing:
        first = messages[users[0]]
        messages[users[0]] = dataclasses.replace(first, text=missing + first.text)
    start = 1 if messages[0].role == "system" else 0
    if len(messages) > start and messages[start].role == "assistant":
        messages.insert(start, Message("user", ""))
    return messages


def _conversation(
    messages: Sequence[Message], images: list, videos: list, name: str
) -> Conversation:
    """Puts a placeholder for each tag; `<image>` stands for a video where there is no image."""
    tags = _tags(messages)
    on_images = [tag == "<image>" and bool(images) for tag in tags]
    if on_images.count(True) != len(images) or on_images.count(False) != len(videos):
        raise BadSample(
            name,
            f"the user turns have {tags.count('<image>')} <image> and {tags.count('<video>')} "
            f"<video> tags for {len(images)} images and {len(videos)} videos",
        )
    left = {True: iter(images), False: iter(videos)}
    visuals = tuple(next(left[on_image]) for on_image in on_images)
    placeholders = (chat.VIDEO if visual.is_video else chat.IMAGE for visual in visuals)
    filled = tuple(
        dataclasses.replace(m, text=TAG.sub(lambda _: next(placeholders), m.text))
        if m.role == "user"
        else m
        for m in messages
    )
    return Conversation(name, filled, visuals)


def _tags(messages: Sequence[Message]) -> list[str]:
    return [tag for m in messages if m.role == "user" for tag in TAG.findall(m.text)]


def _as_list(value: object) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
