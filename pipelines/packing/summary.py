"""Describe to a person what `mae prepare` found."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from mae_core.data.image_files import ImageFile
from mae_core.data.label_maps import IGNORE
from pipelines.packing.shard import MAX_MASK_VALUES, MaskSummary

_SHOWN = 20


def found_lines(
    files: Sequence[ImageFile], classes: Sequence[str] | None, categories: Mapping[int, str]
) -> Iterator[str]:
    """Yield the number of images of each class, the files beside them, and unreadable files."""
    counts = Counter(file.label for file in files)
    if None in counts:
        yield f"{len(files)} images, no classes"
    elif classes is None:
        shown = _listed([f"{label} ({count})" for label, count in sorted(counts.items())])
        yield f"{len(files)} images of {len(counts)} numbered classes: {shown}"
    else:
        shown = _listed([f"{name} ({counts[i]})" for i, name in enumerate(classes)])
        yield f"{len(files)} images of {len(classes)} classes: {shown}"
        empty = [name for i, name in enumerate(classes) if not counts[i]]
        if empty:
            yield f"no image of {len(empty)} classes: {_listed(empty)}"
    beside = Counter(extension for file in files for extension, *_ in file.companions)
    boxed = sum(file.boxes is not None for file in files)
    parts = [f"{count} .{extension}" for extension, count in sorted(beside.items())]
    parts += [f"boxes of {boxed} images from annotations"] if boxed else []
    yield (
        f"beside them: {', '.join(parts)}"
        if parts
        else "no boxes, masks or other files beside them"
    )
    if categories:
        boxes = Counter(box["category_id"] for file in files for box in _boxes(file))
        parts = [f"{number} {name} ({boxes[number]})" for number, name in categories.items()]
        yield f"{sum(boxes.values())} boxes of {len(categories)} categories: {_listed(parts)}"
    problems = Counter(file.problem.partition(" (")[0] for file in files if file.problem)
    if problems:
        listed = ", ".join(f"{count} x {problem}" for problem, count in problems.most_common(5))
        yield f"{sum(problems.values())} can't be read: {listed}"


def mask_line(masks: MaskSummary) -> str | None:
    """Describe the values in the masks; None if there are no masks."""
    if not masks.num_masks:
        return None
    values = sorted(masks.values.items())
    most = " or more" if len(values) >= MAX_MASK_VALUES else ""
    shown = _listed([f"{value} (in {count})" for value, count in values])
    return f"{masks.num_masks} masks with {len(values)}{most} values: {shown or 'none'}"


def mask_warnings(masks: MaskSummary) -> Iterator[str]:
    """Describe the masks from which `mae segment` could not learn."""
    if masks.num_unreadable:
        yield (
            f"{masks.num_unreadable} masks can't be read as class numbers: they are in colour, or "
            "not PNG; `mae segment` will refuse them"
        )
    if masks.values and set(masks.values) <= {0, IGNORE}:
        held = " and ".join(map(str, sorted(masks.values)))
        yield (
            f"the masks only contain {held}. {IGNORE} marks pixels that do not count, so only "
            f"background is left to learn; write 1 instead of {IGNORE} for the object"
        )


def _boxes(file: ImageFile) -> list[dict[str, int]]:
    if file.boxes is None:
        return []
    boxes: list[dict[str, int]] = json.loads(file.boxes)["annotations"]
    return boxes


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
