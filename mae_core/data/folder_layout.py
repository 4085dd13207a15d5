"""Recognise folder layouts by their names: hidden files, data set splits, images beside masks.

Data sets are often kept as train/cat/1.jpg, or as images/1.png and masks/1.png. Read as class
folders, such a layout loses the classes, mixes validation images into training, or trains on masks
as if they were pictures. Names are compared without case, digits and punctuation: `Train_2017` is
`train`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath

from mae_core.data.samples import DataError

_SPLIT = re.compile(
    r"(?:images?|imgs?|data|set|stage)*"
    r"(train(?:ing|val)?|trn|val(?:id|idation)?|dev|eval(?:uation)?|test(?:ing)?|tst|holdout)"
    r"(?:images?|imgs?|data|set|split|jpe?g|png|photos|pictures|[ab])*"
)
_SPLIT_KINDS = {"tr": "train", "va": "val", "de": "val", "ev": "val", "ho": "val"}  # others: test
_IMAGES = re.compile(
    r"images?|imgs?|jpe?gimages|pngimages|pictures?|pics|photos?|frames|rgb|inputs?|originals?|raw|"
    r"leftimgbit|images(?:tr|ts)"
)
_MASKS = re.compile(
    r"masks?|labels?|annot(?:ation)?s?|annotated|seg(?:mentation)?s?|segmentation(?:class|object)"
    r"(?:aug|raw)?|gt|groundtruths?|gt(?:fine|coarse)|trimaps|targets?|labelmaps|maskspng|"
    r"labels(?:tr|ts)|(?:st|nd)?manual"
)
_WRAPPERS = re.compile(rf"{_IMAGES.pattern}|{_MASKS.pattern}|data|datasets?")
_MASK_STEM = re.compile(
    r"(.+?)[-_. ](?:masks?|seg|segmentation|labels?|gt|groundtruth)(?:[-_ ]?\d+)?", re.IGNORECASE
)
_LITTER_FOLDERS = frozenset(
    {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
)
_LITTER_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini"})


def is_hidden_folder(name: str) -> bool:
    """Return whether a folder is hidden, or left behind by an operating system."""
    return name.startswith(".") or name.lower() in _LITTER_FOLDERS


def is_hidden_file(name: str) -> bool:
    """Return whether a file is hidden, or left behind by an operating system."""
    return name.startswith(".") or name.lower() in _LITTER_FILES


def check_layout(root: Path, images: Sequence[PurePath]) -> None:
    """Refuse folders that are known to mean something other than classes.

    Args:
        root: The folder whose subfolders would be the classes.
        images: Paths of all images, relative to `root`.

    Raises:
        DataError: Names the folders and what to pass instead.
    """
    inside = _subfolders(images)
    top = inside.get(PurePath(), [])
    _refuse_masks_beside_images(root, images)
    if not top:
        return
    for parent, names in inside.items():
        kinds = {_split_kind(name) for name in names} - {None}
        splits = [name for name in names if _split_kind(name) is not None]
        if len(kinds) > 1 or (parent == PurePath() and len(splits) == len(names)):
            raise DataError(_splits_text(root, parent, splits, inside))
        words = [_word(name) for name in names]
        is_pair = any(map(_IMAGES.fullmatch, words)) and any(map(_MASKS.fullmatch, words))
        if is_pair or (parent == PurePath() and all(map(_WRAPPERS.fullmatch, words))):
            raise DataError(_wrappers_text(root, parent, names))
    if len(top) == 1 and not any(len(image.parts) == 2 for image in images):
        (only,) = top
        below = inside[PurePath(only)]
        if len(below) > 1:
            raise DataError(
                f"source={root}: all images lie in folders in {only} ({_listed(below)}), so that "
                f"{only} would be the only class; if these are the classes: mae prepare "
                f"{root / only} OUT"
            )


def layout_warnings(images: Sequence[PurePath]) -> list[str]:
    """Describe names that may be a mistake but are packed as they are."""
    found = []
    same_name: dict[str, list[str]] = defaultdict(list)
    for image in images:
        same_name[image.with_suffix("").as_posix().casefold()].append(image.as_posix())
    twins = [names for names in same_name.values() if len(names) > 1]
    if twins:
        found.append(
            f"{len(twins)} names belong to several images, such as {' and '.join(twins[0][:3])}: "
            "each is packed under its own key; if one is a mask, name it NAME.seg.png"
        )
    classes = sorted({image.parts[0] for image in images if len(image.parts) > 1})
    alike = Counter(name.strip().casefold() for name in classes)
    doubles = [name for name in classes if alike[name.strip().casefold()] > 1]
    if doubles:
        found.append(f"classes that differ only in case or spaces: {_listed(doubles)}")
    if len(classes) == 1:
        found.append(f"all images have the class {classes[0]}, the name of their folder")
    deep = Counter("/".join(image.parts[:2]) for image in images if len(image.parts) > 2)
    if deep:
        shown = ", ".join(f"{name} ({count})" for name, count in sorted(deep.items())[:3])
        more = f" and {len(deep) - 3} more" if len(deep) > 3 else ""
        found.append(
            f"the top folder is the class, so images in deeper folders belong to it: {shown}{more}"
        )
    return found


def _subfolders(images: Iterable[PurePath]) -> dict[PurePath, list[str]]:
    """Map each folder to the sorted names of its subfolders with images."""
    folders: dict[PurePath, set[str]] = defaultdict(set)
    for parent in {image.parent for image in images}:
        for depth, name in enumerate(parent.parts):
            folders[PurePath(*parent.parts[:depth])].add(name)
    return {parent: sorted(names) for parent, names in sorted(folders.items())}


def _word(name: str) -> str:
    return re.sub(r"[\W\d_]", "", name.lower())


def _split_kind(name: str) -> str | None:
    match = _SPLIT.fullmatch(_word(name))
    return None if match is None else _SPLIT_KINDS.get(match[1][:2], "test")


def _splits_text(
    root: Path, parent: PurePath, splits: Sequence[str], inside: Mapping[PurePath, list[str]]
) -> str:
    if parent != PurePath():
        return (
            f"source={root}: {parent} holds {_listed(splits)}, which look like splits of a data "
            "set: training and validation would be mixed; give a list file for each split"
        )
    ordered = sorted(splits, key=lambda name: _split_kind(name) != "train")
    commands = []
    for number, name in enumerate(ordered[:3]):
        below = inside.get(PurePath(name), [])
        place = root / name
        if len(below) == 1 and _IMAGES.fullmatch(_word(below[0])):
            place /= below[0]
        numbers = f" classes=OUT/{ordered[0]}" if number and len(below) > 1 else ""
        commands.append(f"mae prepare {place} OUT/{name}{numbers}")
    return (
        f"source={root}: {_listed(ordered)} look like splits of a data set, not classes; pack each "
        f"by itself: {'; '.join(commands)}. If they are classes, give a list file"
    )


def _wrappers_text(root: Path, parent: PurePath, names: Sequence[str]) -> str:
    folder = root / parent
    images = next((name for name in names if _IMAGES.fullmatch(_word(name))), names[0])
    advice = f"pack the folder inside: mae prepare {folder / images} OUT"
    if len(names) > 1:
        advice = (
            "put each mask beside its image as NAME.seg.png (an image is NAME.jpg, say), and pack "
            f"the images alone: mae prepare {folder / images} OUT"
        )
    verb = "are not classes" if len(names) > 1 else "is not a class"
    return (
        f"source={root}: {_listed([(parent / name).as_posix() for name in names])} {verb}; "
        f"{advice}. If this is intended, give a list file"
    )


def _refuse_masks_beside_images(root: Path, images: Sequence[PurePath]) -> None:
    """Refuse a_mask.png beside a.jpg: the mask would be trained on as a picture."""
    stems = {image.with_suffix("") for image in images}
    masks = []
    for image in images:
        match = _MASK_STEM.fullmatch(image.stem)
        if match is not None and image.parent / match[1] in stems:
            masks.append((image, match[1]))
    if masks:
        image, stem = masks[0]
        raise DataError(
            f"source={root}: {len(masks)} images look like masks of others, such as {image}; name "
            f"each mask as its image with .seg.png ({stem}.seg.png), or move the masks away. If "
            "they are images, give a list file"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
