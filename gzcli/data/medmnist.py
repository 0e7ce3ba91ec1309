"""The flat sets of MedMNIST v2, which come in four sizes. Metadata only; checksums are its package's."""

from __future__ import annotations

from dataclasses import replace

from gzcli.data.sets.specs import DataFile, DataSpec, listed

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
_BLOOD = listed(
    "basophil; eosinophil; erythroblast; immature granulocytes(myelocytes, metamyelocytes and "
    "promyelocytes); lymphocyte; monocyte; neutrophil; platelet"
)
_DERMA = listed(
    "actinic keratoses and intraepithelial carcinoma; basal cell carcinoma; benign keratosis-like lesions; "
    "dermatofibroma; melanoma; melanocytic nevi; vascular lesions"
)
_ORGANS = listed(
    "bladder; femur-left; femur-right; heart; kidney-left; kidney-right; liver; lung-left; lung-right; "
    "pancreas; spleen"
)
_PATH = listed(
    "adipose; background; debris; lymphocytes; mucus; smooth muscle; normal colon mucosa; "
    "cancer-associated stroma; colorectal adenocarcinoma epithelium"
)


def _set(
    name: str,
    title: str,
    classes: tuple[str, ...],
    counts: tuple[int, int, int],
    *rows: tuple[int, str],
    channels: int = 1,
    licence: str = "CC BY 4.0",
) -> DataSpec:
    """A set of images.

    counts: images of train, val and test.
    rows: (about how many bytes, md5) of the file of each size, 28 first.
    channels: 1 (grey) or 3 (RGB).
    licence: the publisher's terms.
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
        channels=channels,
        size=first[0],
        n_train=train,
        n_val=val,
        n_test=test,
        licence=licence,
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
    _set(
        "bloodmnist",
        "blood cells",
        _BLOOD,
        (11_959, 1_712, 3_421),
        (35_461_855, "7053d0359d879ad8a5505303e11de1dc"),
        (170_000_000, "2b94928a2ae4916078ca51e05b6b800b"),
        (600_000_000, "adace1e0ed228fccda1f39692059dd4c"),
        (1_700_000_000, "b718ff6835fcbdb22ba9eacccd7b2601"),
        channels=3,
    ),
    _set(
        "breastmnist",
        "ultrasound of the breast",
        ("malignant", "normal, benign"),
        (546, 78, 156),
        (559_580, "750601b1f35ba3300ea97c75c52ff8f6"),
        (2_600_000, "742edef2a1fd1524b2efff4bd7ba9364"),
        (9_500_000, "363e4b3f8d712e9b5de15470a2aaadf1"),
        (27_000_000, "b56378a6eefa9fed602bb16d192d4c8b"),
    ),
    _set(
        "dermamnist",
        "pigmented lesions of the skin",
        _DERMA,
        (7_007, 1_003, 2_005),
        (19_725_078, "0744692d530f8e62ec473284d019b0c7"),
        (93_000_000, "b70a2f5635c6199aeaa28c31d7202e1f"),
        (330_000_000, "2defd784463fa5243564e855ed717de1"),
        (930_000_000, "8974907d8e169bef5f5b96bc506ae45d"),
        channels=3,
        licence="CC BY-NC 4.0",
    ),
    _set(
        "organamnist",
        "organs in axial slices of computed tomographies",
        _ORGANS,
        (34_561, 6_491, 17_778),
        (38_247_903, "68e3f8846a6bd62f0c9bf841c0d9eacc"),
        (180_000_000, "2dcccc29b88e6da5a01161ef20cda288"),
        (650_000_000, "eeae80d0a227a8d099027e1b3cfd3b60"),
        (1_800_000_000, "50747347e05c87dd3aaf92c49f9f3170"),
    ),
    _set(
        "organcmnist",
        "organs in coronal slices of computed tomographies",
        _ORGANS,
        (12_975, 2_392, 8_216),
        (15_527_535, "b9ceb9546e10131b32923c5bbeaea2b1"),
        (73_000_000, "3ce34a8724ea6f548e6db4744d03b6a9"),
        (260_000_000, "773c1f009daa3fe5d9a2a201b2a7ed94"),
        (740_000_000, "050f5e875dc056f6768abf94ec9995d1"),
    ),
    _set(
        "organsmnist",
        "organs in sagittal slices of computed tomographies",
        _ORGANS,
        (13_932, 2_452, 8_827),
        (16_528_536, "9ab87b696fb54e2a387ebe992d6ed5f1"),
        (78_000_000, "53a6d115339d874c25e309a994ff46d3"),
        (280_000_000, "ded0c5fa01a95dc4978b956f613e9b8e"),
        (780_000_000, "b354719e553fbbb2513d5533f52a4cb1"),
    ),
    _set(
        "pathmnist",
        "tissue of colorectal cancer, stained",
        _PATH,
        (89_996, 10_004, 7_180),
        (205_615_438, "a8b06965200029087d5bd730944a56c1"),
        (970_000_000, "55aa9c1e0525abe5a6b9d8343a507616"),
        (3_500_000_000, "ac42d08fb904d92c244187169d1fd1d9"),
        (9_700_000_000, "2c51a510bcdc9cf8ddb2af93af1eadec"),
        channels=3,
    ),
    _set(
        "retinamnist",
        "fundus photographs, graded by diabetic retinopathy",
        tuple("01234"),
        (1_080, 120, 400),
        (3_291_041, "bd4c0672f1bba3e3a89f0e4e876791e4"),
        (15_000_000, "afda852cc34dcda56f86ad2b2457dbcc"),
        (56_000_000, "e48e916a24454daf90583d4e6efb1a18"),
        (160_000_000, "eae7e3b6f3fcbda4ae613ebdcbe35348"),
        channels=3,
    ),
)
