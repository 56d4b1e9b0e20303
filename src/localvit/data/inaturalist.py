"""iNaturalist 2018 and 2019, in the file layout of the competition, labeled at any level of the taxonomy."""

import json
from pathlib import Path

from localvit.data.images import DataError, FileImages

INAT_CATEGORIES = ("name", "kingdom", "phylum", "class", "order", "supercategory", "family", "genus")


def inaturalist(root: Path, split: str, year: int, category: str) -> FileImages:
    """Open one split of iNaturalist.

    Reads `<split><year>.json`, `train<year>.json` and, if it exists (2018), `categories.json`. Classes are numbered in
    the order in which they first appear in the training annotations, as in the published program.

    Args:
        root: Folder with the .json files.
        split: "train" or "val".
        year: 2018 or 2019.
        category: Level of the taxonomy that provides the labels; one of `INAT_CATEGORIES`.

    Raises:
        DataError: A file, or something in it, is missing or damaged, or `category` is unknown.
    """
    if category not in INAT_CATEGORIES:
        raise DataError(f"--inat-category {category}: choose one of {', '.join(INAT_CATEGORIES)}")
    try:
        return _labeled_images(root, split, year, category)
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"the .json files in {root} are not those of iNaturalist {year}, or incomplete ({type(error).__name__}: "
            f"{error})"
        ) from error


def _labeled_images(root: Path, split: str, year: int, category: str) -> FileImages:
    train = _read(root / f"train{year}.json")
    annotated = train if split == "train" else _read(root / f"{split}{year}.json")
    described = root / "categories.json"
    categories = _read(described) if described.exists() else train.get("categories", [])
    taxon_of = {entry["id"]: str(entry[category]) for entry in categories if category in entry}

    def taxon(annotation: dict) -> str:
        try:
            return taxon_of[annotation["category_id"]]
        except KeyError:
            raise DataError(
                f"{described if described.exists() else root / f'train{year}.json'} has no {category!r} for "
                f"category {annotation['category_id']}"
            ) from None

    class_names = list(dict.fromkeys(taxon(annotation) for annotation in train["annotations"]))
    label_of = {name: label for label, name in enumerate(class_names)}
    file_of = {image["id"]: _existing(root, image["file_name"]) for image in annotated["images"]}
    unknown = {taxon(annotation) for annotation in annotated["annotations"]} - set(label_of)
    if unknown:
        raise DataError(f"{split}{year}.json has classes that train{year}.json lacks: {', '.join(sorted(unknown)[:5])}")
    samples = [(file_of[entry["image_id"]], label_of[taxon(entry)]) for entry in annotated["annotations"]]
    return FileImages(root, samples, class_names)


def _read(path: Path) -> dict:
    if not path.exists():
        raise DataError(f"no {path}; --data-path must be the folder with iNaturalist's .json files")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not a JSON file: {error}") from error


def _existing(root: Path, file_name: str) -> str:
    """The listed path, or, as in some copies, without its taxon folder: train_val2018/Aves/123/x.jpg without Aves/."""
    parts = Path(file_name).parts
    if len(parts) == 4 and not (root / file_name).exists():
        return Path(parts[0], *parts[2:]).as_posix()
    return file_name
