"""What names of files and folders say: pictures, splits, classes as running text."""

import re
from pathlib import Path

from errors import InputError, one_line

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
SPLITS = {word: split for split in ("train", "val", "test") for word in (split, f"{split}ing")}
SPLITS |= {"valid": "val", "validation": "val"}
PLAIN = {"images", "image", "jpegimages", "data"}  # folders whose names say nothing about the pictures in them


def files_below(folder: Path, *endings: str) -> list[Path]:
    """Files of the folder and its folders, in order, but no hidden ones: archives made on a Mac hold a ._a.jpg too."""
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in endings and f.name[0] != "." and f.is_file())


def folders_below(path: Path, source: Path) -> list[str]:
    """Names of the folders between source and path, the nearest first: where layouts write their splits."""
    return [folder.name for folder in path.parents if source in folder.parents]


def split_of(*names: str) -> str:
    """train, val or test, as the first of the names says that has one such word; "all" if none has."""
    for name in names:
        found = {SPLITS[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLITS}
        if len(found) == 1:
            return found.pop()
    return "all"


def folder_of(image: Path, source: Path) -> str:
    """The name of the nearest folder of a picture that is not just `images` or a split's."""
    for folder in (f for f in image.parents if f.name):
        if folder.name.lower() not in PLAIN and (folder == source or split_of(folder.name) == "all"):
            return folder.name
    raise InputError(f"{one_line(image)}: no folder's name says what is to be found, for {{folder}} of --query")


def words(name: str) -> str:
    """A class or folder name as running text: Heel_Spur -> heel spur, WBC stays."""
    return " ".join(w if w.isupper() else w.lower() for w in name.replace("_", " ").split())
