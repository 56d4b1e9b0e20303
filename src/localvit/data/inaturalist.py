"""iNaturalist 2018 and 2019 as the competition's files lay them out, labeled at any level of the taxonomy."""

import json
from pathlib import Path

from localvit.data.images import DataError, FileImages

INAT_CATEGORIES = ("name", "kingdom", "phylum", "class", "order", "supercategory", "family", "genus")


def inaturalist(root: Path, split: str, year: int, category: str) -> FileImages:
    """Images of `split` ("train" or "val"), their class being their `category` of the taxonomy.

    Reads `<split><year>.json`, `train<year>.json` and, where categories are described outside them (2018),
    `categories.json`. Classes are counted in the order in which the training annotations first mention them, as the
    published program does.

    Raises DataError when a file is missing or a category is not described.
    """
    if category not in INAT_CATEGORIES:
        raise DataError(f"--inat-category {category}: choose one of {', '.join(INAT_CATEGORIES)}")
    train = _read(root / f"train{year}.json")
    wanted = train if split == "train" else _read(root / f"{split}{year}.json")
    described = root / "categories.json"
    categories = _read(described) if described.exists() else train.get("categories", [])
    taxon_of = {entry["id"]: str(entry[category]) for entry in categories if category in entry}

    def taxon(annotation: dict) -> str:
        try:
            return taxon_of[annotation["category_id"]]
        except KeyError:
            raise DataError(
                f"{described if described.exists() else root / f'train{year}.json'} gives no {category!r} for "
                f"category {annotation['category_id']}"
            ) from None

    class_names = list(dict.fromkeys(taxon(annotation) for annotation in train["annotations"]))
    label_of = {name: label for label, name in enumerate(class_names)}
    file_of = {image["id"]: _existing(root, image["file_name"]) for image in wanted["images"]}
    unknown = {taxon(annotation) for annotation in wanted["annotations"]} - set(label_of)
    if unknown:
        raise DataError(f"{split}{year}.json has classes that train{year}.json lacks: {', '.join(sorted(unknown)[:5])}")
    samples = [(file_of[entry["image_id"]], label_of[taxon(entry)]) for entry in wanted["annotations"]]
    return FileImages(root, samples, class_names)


def _read(path: Path) -> dict:
    if not path.exists():
        raise DataError(f"no {path}; the data path of iNaturalist is the folder with its .json files")
    return json.loads(path.read_text())


def _existing(root: Path, file_name: str) -> str:
    """The path as listed, or without its taxon folder (train_val2018/Aves/123/x.jpg), as some copies are laid out."""
    parts = Path(file_name).parts
    if len(parts) == 4 and not (root / file_name).exists():
        return Path(parts[0], *parts[2:]).as_posix()
    return file_name
