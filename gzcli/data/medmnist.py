"""The sets of MedMNIST v2, which come in four sizes. Metadata only; checksums are those of its package."""

from __future__ import annotations

from dataclasses import replace

from gzcli.data.specs import DataFile, DataSpec, listed

SIDES = (28, 64, 128, 224)  # pixels
_CITATION = "Yang et al. 2023, MedMNIST v2, Scientific Data 10:41"
_CHEST = listed(
    "atelectasis; cardiomegaly; effusion; infiltration; mass; nodule; pneumonia; pneumothorax; "
    "consolidation; edema; emphysema; fibrosis; pleural; hernia"
)
_OCT = listed("choroidal neovascularization; diabetic macular edema; drusen; normal")
_TISSUE = listed(
    "Collecting Duct, Connecting Tubule; Distal Convoluted Tubule; Glomerular endothelial cells; "
    "Interstitial endothelial cells; Leukocytes; Podocytes; Proximal Tubule Segments; Thick Ascending "
    "Limb"
)


def _set(
    name: str, title: str, classes: tuple[str, ...], counts: tuple[int, int, int], *rows: tuple[int, str]
) -> DataSpec:
    """A set of grey images.

    counts: images of train, val and test.
    rows: (about how many bytes, md5) of the file of each size, 28 first.
    """
    sized = []
    for side, (about, md5) in zip(SIDES, rows, strict=True):
        file = f"{name}.npz" if side == 28 else f"{name}_{side}.npz"
        urls = (f"https://zenodo.org/records/10519652/files/{file}?download=1",)
        sized.append((side, (DataFile(file, urls, about, md5=md5, exact=False),)))
    first, *larger = sized
    train, val, test = counts
    return DataSpec(
        name,
        f"{title} (MedMNIST)",
        classes,
        channels=1,
        size=first[0],
        n_train=train,
        n_val=val,
        n_test=test,
        licence="CC BY 4.0",
        citation=_CITATION,
        files=first[1],
        larger=tuple(larger),
    )


MEDMNIST = (
    replace(
        _set(
            "chestmnist",
            "chest X-rays with fourteen findings, any number of which can hold",
            _CHEST,
            (78_468, 11_219, 22_433),
            (82_802_576, "02c8a6516a18b556561a56cbdd36c4a8"),
            (390_000_000, "9de6cd0b934ebb5b7426cfba5efbae16"),
            (1_400_000_000, "db107e5590b27930b62dbaf558aebee3"),
            (3_900_000_000, "45bd33e6f06c3e8cdb481c74a89152aa"),
        ),
        multilabel=True,
    ),
    _set(
        "octmnist",
        "retinal tomographies",
        _OCT,
        (97_477, 10_832, 1_000),
        (54_938_180, "c68d92d5b585d8d81f7112f81e2d0842"),
        (250_000_000, "e229e9440236b774d9f0dfef9d07bdaf"),
        (900_000_000, "0a97e76651ace45c5d943ee3f65b63ae"),
        (2_500_000_000, "abc493b6d529d5de7569faaef2773ba3"),
    ),
    _set(
        "pneumoniamnist",
        "chest X-rays of children, with and without pneumonia",
        ("normal", "pneumonia"),
        (4_708, 524, 624),
        (4_170_669, "28209eda62fecd6e6a2d98b1501bb15f"),
        (20_000_000, "8f4eceb4ccffa70c672198ea285246c6"),
        (72_000_000, "05b46931834c231683c68f40c47b2971"),
        (206_000_000, "d6a3c71de1b945ea11211b03746c1fe1"),
    ),
    _set(
        "tissuemnist",
        "cells of the kidney's cortex",
        _TISSUE,
        (165_466, 23_640, 47_280),
        (124_962_739, "ebe78ee8b05294063de985d821c1c34b"),
        (480_000_000, "123ece2eba09d0aa5d698fda57103344"),
        (1_500_000_000, "61b955355d7425a89687b06cca3ce0c2"),
        (3_500_000_000, "b077128c4a949f0a4eb01517f9037b9c"),
    ),
)
