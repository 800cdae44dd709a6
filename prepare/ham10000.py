"""HAM10000, pigmented skin lesions (Tschandl et al., 2018; masks 2020) -> JSONL, split by lesion.

    python -m prepare.ham10000 --source HAM10000 --overlay sheet.png

Pictures (ISIC_....jpg), masks (ISIC_..._segmentation.png) and the metadata (HAM10000_metadata.csv, .tab or without an
ending) may lie in any folders below --source, so the archives of Dataverse and the copies on Kaggle are both read as
they unpack. The metadata is needed: 10,015 pictures show 7,470 lesions, and its lesion_id says which pictures show the
same one. The set has no official split; ours is by lesion, --val and --test give the shares.
"""

import errors
from errors import InputError, one_line
from prepare import common, layout, table
from prepare.common import Entry

DIAGNOSES = {  # column dx, for {class} in --query
    "akiec": "actinic keratosis",
    "bcc": "basal cell carcinoma",
    "bkl": "benign keratosis",
    "df": "dermatofibroma",
    "mel": "melanoma",
    "nv": "melanocytic nevus",
    "vasc": "vascular lesion",
}
MASK = "_segmentation"


def metadata(source, report) -> list[tuple[str, dict]]:
    """(file and line, row) of the one metadata file."""
    files = [f for f in sorted(source.rglob("HAM10000_metadata*")) if f.is_file()]
    if len(files) != 1:
        found = ", ".join(map(str, files[:3])) or "none"
        raise InputError(f"{source}: one HAM10000_metadata.csv is needed for its lesion_id, found {found}")
    return table.rows(files[0], ["lesion_id", "image_id", "dx"], report)


def by_name(files: list, report) -> dict:
    """Stem -> file. Kaggle's archive holds the pictures twice, under names of folders that differ in case only."""
    found = {}
    for file in files:
        if file.stem in found:
            report.note("not used, a second file of that name", file)
        found.setdefault(file.stem, file)
    return found


def read(args, report) -> list[Entry]:
    rows = metadata(args.source, report)
    pictures = by_name(layout.files_below(args.source, ".jpg"), report)
    masks = by_name([f for f in layout.files_below(args.source, ".png") if f.stem.endswith(MASK)], report)
    entries = []
    for where, row in rows:
        name, lesion, dx = (row[column] for column in ("image_id", "lesion_id", "dx"))
        picture, mask = pictures.get(name), masks.get(name + MASK)
        needed = {f"{name}.jpg": picture, f"{name}{MASK}.png": mask, "a lesion_id": lesion}
        if lacking := [what for what, there in needed.items() if not there]:
            report.bad.add(where, InputError(f"{where}: {one_line(lacking[0])} is not there; unpack all archives"))
            continue
        entries.append(Entry(picture, where, DIAGNOSES.get(dx, dx), mask=mask, group=lesion))
    for name in sorted(pictures.keys() - {row["image_id"] for _, row in rows}):
        report.note("not used, the metadata does not name the picture", pictures[name])
    return entries


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("ham10000", __doc__, query="the skin lesion", masks=True)
    parser.set_defaults(dataset="ham10000", val=0.1, test=0.1)
    common.convert(parser.parse_args(argv), read)


if __name__ == "__main__":
    errors.run(main)
