r"""Pictures and the class of each -> records of the task label, or grade: labels-train.jsonl ...

    python -m prepare.labels --source HAM10000 --csv HAM10000/HAM10000_metadata.csv --image image_id --label dx \
        --group lesion_id --names names.json --val 0.1 --test 0.1
    python -m prepare.labels --source ISIC2018 --csv ISIC2018/*GroundTruth.csv --image image --one-hot
    python -m prepare.labels --source chest --folders
    python -m prepare.labels --source MURA-v1.1 --pattern '(?P<group>patient[0-9]+)/.*_(?P<label>positive|negative)/'

Where the class stands: in the column --label of a table, or in columns of which one is 1 (--one-hot); in the name of a
picture's folder (--folders); in its path (--pattern, a regular expression with a group named label).

A table names pictures with or without their ending and their folders; each is looked for below --source. The split is
what the column --split says, else the table's name, else the nearest folder with such a word. --group, a column or a
group of the pattern, keeps pictures of one lesion or patient in one split.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import errors
from errors import InputError, named, one_line
from prepare import choices, common, layout, masks, table
from prepare.common import Entry

DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|"}


def pictures(args) -> list[Path]:
    """Those below --source, or what --images lets through."""
    if args.images:
        return list(masks.matches(args.source, args.images, "--images").values())
    if found := layout.files_below(args.source, *layout.PICTURES):
        return found
    raise InputError(f"--source {args.source}: holds no picture ({', '.join(layout.PICTURES)})")


def finder(files: list[Path], source: Path, report) -> Callable[[str], Path]:
    """A function: what a table calls a picture -> its file. A name may lack its ending, and have more folders in front
    than there are, or fewer."""
    known = defaultdict(list)  # name, with and without its ending -> files
    for file in files:
        known[file.name].append(file)
        known[file.stem].append(file)

    def find(name: str) -> Path:
        asked = PurePosixPath(name.replace("\\", "/"))
        found = [f for f in known.get(asked.name, []) if ends_alike(asked, PurePosixPath(f.relative_to(source)))]
        found = [f for f in found if f.name == asked.name] or found
        if not found:
            raise InputError(f"the picture {one_line(name)} is not there; unpack all archives")
        if len(found) > 1:
            if len(common.equal_files(found)) != 1 or len(common.equal_files(found)[0]) != len(found):
                shown = " and ".join(one_line(f.relative_to(source)) for f in found[:2])
                raise InputError(f"{one_line(name)} may be {shown}; choose by --images, such as 'images/*.jpg'")
            report.note("not used, a second file of that name", found[1])
        return found[0]

    return find


def ends_alike(asked: PurePosixPath, there: PurePosixPath) -> bool:
    """Whether the folders of one path are the last ones of the other's."""
    a, b = (path.parent.parts[::-1] for path in (asked, there))
    return all(x == y for x, y in zip(a, b, strict=False))


def split_said(text: str) -> str:
    if text.lower() not in layout.SPLITS:
        raise InputError(f"{text!r:.90} is no split; there are {', '.join(layout.SPLITS)}")
    return layout.SPLITS[text.lower()]


def hot(row: dict[str, str], columns: list[str]) -> str:
    """The one column that is 1."""
    for column in columns:
        if not re.fullmatch(r"[01](\.0*)?", row[column]):
            raise InputError(f"column {column!r:.90} must be 0 or 1, not {row[column]!r:.90}")
    ones = [column for column in columns if row[column][0] == "1"]
    if len(ones) != 1:
        which = f"{len(ones)} of its columns are 1 ({', '.join(ones)[:90]})" if ones else "none of its columns is 1"
        raise InputError(f"{which}, but a picture has one class")
    return ones[0]


def of_tables(args, report) -> tuple[list[Entry], list[str]]:
    """The entries of --csv, and the classes in the order of their columns if they have some."""
    files = pictures(args)
    find, entries, order = finder(files, args.source, report), [], []
    others = [column for column in (args.group, args.split) if column]
    wanted = [name.strip() for name in args.one_hot.split(",")] if args.one_hot else []
    labels = [args.label] if args.label else wanted
    for path in args.csv:
        rows = table.rows(path, [args.image, *others, *labels], report, DELIMITERS.get(args.delimiter, args.delimiter))
        if not rows:
            raise InputError(f"{path}: has no line below the first, which names the columns")
        columns = wanted or [column for column in rows[0][1] if column not in (args.image, *others)]
        for where, row in rows:
            try:
                with named(where):
                    if empty := [column for column in (args.image, *others, *labels) if not row[column]]:
                        raise InputError(f"column {empty[0]!r:.90} is empty")
                    file = find(row[args.image])
                    label = row[args.label] if args.label else hot(row, columns)
                    below = path.stem, *layout.folders_below(file, args.source)
                    split = split_said(row[args.split]) if args.split else layout.split_of(*below)
            except InputError as error:
                report.bad.add(where, error)
                continue
            entries.append(Entry(file, where, label, split=split, group=row.get(args.group, "")))
        order += [] if args.label else [column for column in columns if column not in order]
    used = {entry.image for entry in entries}
    for file in files:
        if file not in used:
            report.note("not used, no line of a table names the picture", file)
    return entries, order


def of_folders(args, report) -> tuple[list[Entry], list[str]]:
    entries = []
    for file in pictures(args):
        folders, plain = layout.folders_below(file, args.source), layout.PLAIN | layout.SPLITS.keys()
        label = next((name for name in folders if name.lower() not in plain), "")
        if not label:
            report.bad.add(str(file), InputError(f"{file}: lies in no folder of a class below {args.source}"))
            continue
        split = layout.split_of(*(name for name in folders if name != label))
        entries.append(Entry(file, str(file), label if args.names else layout.words(label), split=split))
    return entries, []


def of_paths(args, report) -> tuple[list[Entry], list[str]]:
    try:
        pattern = re.compile(args.pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"--pattern {one_line(args.pattern)}: is no regular expression ({error})") from error
    if "label" not in pattern.groupindex:
        raise InputError(f"--pattern {one_line(args.pattern)}: needs a group (?P<label>...), the class")
    entries = []
    for file in pictures(args):
        found = pattern.search(file.relative_to(args.source).as_posix())
        if not found or not found["label"]:
            report.note("left out, --pattern does not fit its path", file)
            continue
        group = found.groupdict().get("group") or ""
        split = layout.split_of(*layout.folders_below(file, args.source))
        entries.append(Entry(file, str(file), found["label"], split=split, group=group))
    if not entries:
        raise InputError(f"--pattern {one_line(args.pattern)}: fits no path of a picture below {args.source}")
    return entries, []


def read(args, report) -> list[Entry]:
    reader = of_tables if args.csv else of_folders if args.folders else of_paths
    entries, order = reader(args, report)
    return choices.settle(entries, args, report, order)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("labels", __doc__, query=None, boxes=False)
    choices.flags(parser)
    places = parser.add_mutually_exclusive_group(required=True)
    places.add_argument("--csv", type=Path, nargs="+", metavar="FILE", help="tables whose lines name picture and class")
    places.add_argument("--folders", action="store_true", help="a folder for each class")
    places.add_argument("--pattern", help="regular expression, found in a picture's path below --source")
    flag = parser.add_argument
    flag("--images", help="of the pictures, those that fit a pattern with one *, such as 'images/*.jpg'")
    flag("--image", metavar="COLUMN", help="of the tables: what names the picture")
    flag("--label", metavar="COLUMN", help="of the tables: its class")
    flag(
        "--one-hot", nargs="?", const="", metavar="A,B,C", help="columns of 0 and 1, a class each; default: all others"
    )
    flag("--group", metavar="COLUMN", help="of the tables: lesion or patient, kept in one split")
    flag("--split", metavar="COLUMN", help="of the tables: train, val or test")
    flag("--delimiter", default="", metavar="MARK", help=f"of the tables: {', '.join(DELIMITERS)}; default: what fits")
    args = parser.parse_args(argv)
    columns = {"--image": args.image, "--label": args.label, "--group": args.group, "--split": args.split}
    if args.csv:
        if not args.image or bool(args.label) == (args.one_hot is not None):
            parser.error("--csv needs --image, and --label or --one-hot: which columns hold the picture and its class")
        if len(DELIMITERS.get(args.delimiter, args.delimiter)) > 1:
            parser.error(f"--delimiter must be one character, or one of {', '.join(DELIMITERS)}")
    elif given := [name for name, value in (columns | {"--one-hot": args.one_hot}).items() if value is not None]:
        parser.error(f"{given[0]} speaks of columns, so it goes with --csv")
    common.convert(args, read, choices.record_of, (choices.KIND,))


if __name__ == "__main__":
    errors.run(main)
