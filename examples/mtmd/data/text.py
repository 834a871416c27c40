"""Texts as tokens, and what stands before a text in its video."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mtmd.data.fold import Fold


def tokenize(
    raw_text: Sequence[str], tokenizer: Any, max_length: int, *, before: Sequence[str] | None = None
) -> np.ndarray:
    """Turn texts into what `Fold.text_bert` holds, with a tokenizer of transformers.

    Longer texts are cut to `max_length` tokens; L is the length of the longest. A text without any
    letter or sign has no tokens at all, not even the marks of begin and end: it counts as missing.

    Args:
        raw_text: The texts.
        tokenizer: Of transformers.
        max_length: Most tokens of a text, with its context.
        before: What stands before each text. As much of its end as there is room for goes first, and the text is
            segment 1 behind it.

    Returns:
        Token ids, attention mask and segment ids, shape `(n, 3, L)` int64. Without `before` segment ids
        are 0 for a tokenizer that has none.
    """
    encoded = tokenizer(
        list(raw_text),
        padding=True,
        padding_side="right",
        truncation=True,
        max_length=max_length,
        return_attention_mask=True,
        return_tensors="np",
    )
    ids = encoded["input_ids"]
    segments = encoded.get("token_type_ids", np.zeros_like(ids))
    tokens = np.stack([ids, encoded["attention_mask"], segments], axis=1).astype(np.int64)
    if before is not None:
        tokens = _behind(tokens, before, tokenizer, max_length)
    tokens[[not text.strip() for text in raw_text]] = 0
    return tokens


def _behind(tokens: np.ndarray, before: Sequence[str], tokenizer: Any, max_length: int) -> np.ndarray:
    """The tokens of texts behind those of what stands before them: begin, before, end, text, end."""
    rows = []
    for own, context in zip(tokens, before, strict=True):
        ids = own[0, : int(own[1].sum())]
        room = max_length - len(ids)
        earlier = tokenizer(context, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        earlier = earlier[-(room - 1) :] if room > 1 else []
        first = [ids[0], *earlier, ids[-1]] if earlier else ids[:1]
        kinds = np.repeat([0, 1], [len(first), len(ids) - 1]) if earlier else np.zeros(len(ids), np.int64)
        rows.append(np.stack([np.concatenate([first, ids[1:]]), np.ones_like(kinds), kinds]))
    longest = max(row.shape[1] for row in rows)
    padding = np.array([tokenizer.pad_token_id or 0, 0, 0])[:, None]
    return np.stack([np.concatenate([row, padding.repeat(longest - row.shape[1], axis=1)], axis=1) for row in rows])


def texts_before(fold: Fold, count: int) -> list[str]:
    """Of each sample the texts before it in its video, at most `count`, joined.

    MMSA's ids are VIDEO$_$CLIP, clips numbered in their order. A clip that is not in the fold is passed over, and an id
    of another form is a video of its own.
    """
    videos: dict[str, list[tuple[int, int]]] = {}
    for row, name in enumerate(fold.ids):
        video, _, clip = name.rpartition("$_$")
        if video and clip.isdecimal():
            videos.setdefault(video, []).append((int(clip), row))
    before = [""] * len(fold)
    for clips in videos.values():
        rows = [row for _, row in sorted(clips)]
        for place, row in enumerate(rows):
            before[row] = " ".join(fold.raw_text[earlier] for earlier in rows[max(0, place - count) : place])
    return before
