"""TN3K, thyroid nodules in ultrasound (Gong et al., 2021 and 2022) -> JSONL, official splits.

    python -m prepare.tn3k --source tn3k --overlay sheet.png

    tn3k/trainval-image/0000.jpg ...   tn3k/trainval-mask/0000.jpg ...   tn3k/tn3k-trainval-fold0.json ... fold4.json
    tn3k/test-image/0000.jpg ...       tn3k/test-mask/0000.jpg ...

A fold file holds {"train": [...], "val": [...]}: INDICES into the trainval pictures sorted by number, not names. The
masks are JPEGs; boxes.mask_box says what that takes.
"""

import errors
from errors import InputError, cause_of, read_json
from prepare import common, layout
from prepare.common import Entry


def numbered(folder) -> list:
    """The pictures of a folder in the order of their numbers."""
    try:
        files = sorted(layout.files_below(folder, *layout.PICTURES), key=lambda f: int(f.stem))
    except ValueError as error:
        raise InputError(f"{folder}: pictures are named by number, such as 0000.jpg ({cause_of(error)})") from error
    if not files:
        raise InputError(f"{folder}: no pictures are there; --source must be the folder that holds it")
    return files


def fold_splits(path, count: int) -> list[str]:
    """The split of each of count pictures."""
    fold = read_json(path)
    splits = [""] * count
    for name in ("train", "val"):
        indices = fold.get(name) if isinstance(fold, dict) else None
        if not isinstance(indices, list) or not all(type(i) is int and 0 <= i < count for i in indices):
            raise InputError(f"{path}: field {name!r} must list indices of {count} pictures, 0 to {count - 1}")
        for i in indices:
            if splits[i]:
                raise InputError(f"{path}: picture {i} is in it twice")
            splits[i] = name
    if "" in splits:
        raise InputError(f"{path}: picture {splits.index('')} is in neither train nor val; are all pictures unpacked?")
    return splits


def read(args, report) -> list[Entry]:
    entries = []
    for part in ("trainval", "test"):
        files = numbered(args.source / f"{part}-image")
        path = args.source / f"tn3k-trainval-fold{args.fold}.json"
        splits = fold_splits(path, len(files)) if part == "trainval" else ["test"] * len(files)
        masks = args.source / f"{part}-mask"
        for file, split in zip(files, splits, strict=True):
            where = f"{part}-image/{file.name}"
            entries.append(Entry(file, where, "thyroid nodule", mask=masks / file.name, split=split))
    return entries


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("tn3k", __doc__, query="the thyroid nodule", masks=True)
    parser.add_argument("--fold", type=int, choices=range(5), default=0, help="which official fold parts train and val")
    parser.set_defaults(dataset="tn3k")
    common.convert(parser.parse_args(argv), read)


if __name__ == "__main__":
    errors.run(main)
