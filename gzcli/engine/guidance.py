"""The guidance scale of samples, chosen for each run at the end of its training (`sample.guidance: auto`).
For each of several scales, a few hundred samples with few steps are compared with validation images, or with
training images if there are too few of those. No test image is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from gzcli.core.sections import TrainSection
from gzcli.data.packs.pack import Pack
from gzcli.engine import checkpoint, sampler
from gzcli.engine.log import Log
from gzcli.engine.trained import Trained, load_trained
from gzcli.metrics.features import LENET, NetFeatures, has_lenet, lenet
from gzcli.metrics.frechet import frechet_distance
from gzcli.metrics.interval import subset
from gzcli.metrics.networks import published_judges
from gzcli.metrics.quality.neighbours import prdc
from gzcli.models.nn import spread_labels
from gzcli.store import files
from gzcli.store.run_folder import Run

AUTO = "auto"
GUIDANCE_SCALES = (
    1.0,
    1.15,
    1.3,
    1.5,
    2.0,
    3.0,
)  # tried in this order, until one is worse than the previous one
MAX_SAMPLES = 200  # maximum number of samples for each scale
MIN_SAMPLES = 50  # samples after a short training
STEP_SHARE, MIN_SAMPLER_STEPS = 0.6, 5  # fraction of the recipe's steps, and the minimum
# Training images for each sample of a scale, so that the choice takes about a tenth of the training. A
# training image costs three network calls. At six steps of two calls, a sample of each scale costs 72.
IMAGE_COST = 240
MAX_VALIDATION_IMAGES = 2_000  # validation images, at most
MIN_REAL_IMAGES = 500  # images for comparison; training images supplement too few validation images
TRAINING_MULTIPLE = (
    10  # least images of a training of few, as a multiple of those of the judge that it would train
)
JUDGE_ERROR = 0.01  # added to the share of wrong classes: the judge itself errs


@dataclass(frozen=True)
class Figures:
    """The metrics of the samples at one scale. `agreement` is the share of samples that the judge classifies
    as their label; None without labels."""

    guidance: float
    fd: float
    recall: float
    agreement: float | None = None

    def score(self, accuracy: float) -> float:
        """Lower is better. At first, guidance lowers the share of misclassified samples; it always lowers
        recall. `fd` reflects both, but wrong classes too weakly, because a wrong digit still has the features
        of a digit. Misclassified samples count only beyond the judge's own error rate on real images."""
        errors = 1.0 if self.agreement is None else (1 - min(self.agreement, accuracy) + JUDGE_ERROR) ** 0.5
        return self.fd * errors / max(self.recall, JUDGE_ERROR)

    def __str__(self) -> str:
        agreement = "" if self.agreement is None else f", {self.agreement:.2f} of the right class"
        return f"{self.guidance:g} (fd {self.fd:.3g}, recall {self.recall:.2f}{agreement})"


def is_wanted(trained: Trained) -> bool:
    """Whether the recipe requests this choice, and the model can be guided."""
    model: Any = trained.model
    can = getattr(model, "labelled", False) and model.label_dropout and not trained.info.multilabel
    return trained.part.sample.get("guidance") == AUTO and bool(can) and trained.space is None


def samples_of(train: TrainSection) -> int:
    """The samples of each scale for a training; 0 if half of the fewest would already take too long."""
    n = int(train.steps * train.batch_size / IMAGE_COST)
    return min(MAX_SAMPLES, max(MIN_SAMPLES, n)) if 2 * n >= MIN_SAMPLES else 0


def choice_seconds(trained: Trained, train: TrainSection, each: float) -> float:
    """The most seconds that the choice takes after a training, if a sample takes `each`."""
    return len(GUIDANCE_SCALES) * STEP_SHARE * samples_of(train) * each if is_wanted(trained) else 0.0


def reference(pack: Pack) -> tuple[np.ndarray, str]:
    """The images that samples are compared with, and their description. Training images favour no scale,
    because all scales sample the same model."""
    real, training = pack.images("val")[:MAX_VALIDATION_IMAGES], pack.images("train")
    rows = subset(len(training), max(0, MIN_REAL_IMAGES - len(real)))
    if not len(rows):
        return real[:], "validation images"
    both = np.concatenate([real[:], training[rows]])
    return both, f"{len(real)} validation and {len(rows)} training images"


def affords_judge(train: TrainSection, pack: Pack) -> bool:
    """Whether a training is long enough to train the judge of its set, which few colour images do without
    until then."""
    if has_lenet(pack) or not published_judges(pack.meta):
        return True
    judge = LENET.sized(len(pack.images("train")))
    return train.steps * train.batch_size >= TRAINING_MULTIPLE * judge.steps * judge.batch


def choose(trained: Trained, real: np.ndarray, net: NetFeatures) -> list[Figures]:
    """The metrics of each scale that was tried, in order."""
    of_real, labels, n = net.features(real), None, samples_of(trained.part.train)
    if trained.model.conditional:
        labels = spread_labels(None, n, trained.info, torch.device("cpu"))
    options: dict[str, Any] = dict(trained.part.sample)
    if steps := options.get("steps"):
        options["steps"] = min(steps, max(MIN_SAMPLER_STEPS, round(STEP_SHARE * steps)))
    tried: list[Figures] = []
    scores: list[float] = []
    while len(tried) < len(GUIDANCE_SCALES) and (len(tried) < 2 or scores[-1] <= scores[-2]):
        options["guidance"] = scale = GUIDANCE_SCALES[len(tried)]
        fake = net.features(sampler.draw(trained, n, labels=labels, options=options))
        agreement = None
        if labels is not None and not net.rotations:
            agreement = float(np.mean(net.logits_of(fake).argmax(1) == labels.numpy()))
        recall = prdc(fake, of_real)["recall"]
        tried.append(Figures(scale, float(frechet_distance(of_real, fake)), recall, agreement))
        scores.append(tried[-1].score(net.accuracy))
    return tried


def write(run: Run, pack: Pack, device: torch.device, log: Log) -> float | None:
    """Chooses the guidance of a run, and writes it into the weights file and the status. Returns None if
    there is nothing to choose, if the training is too short to choose, or if the judge has not learned its
    classes. Only rank 0 calls it."""
    trained = load_trained(run, device, "finished")
    if not is_wanted(trained):
        return None
    if not samples_of(trained.part.train):
        log.info(f"guidance {trained.guidance:g} is kept: the training is too short to choose it")
        return None
    if not affords_judge(trained.part.train, pack):
        log.info(f"guidance {trained.guidance:g} is kept: the training is too short to train a judge for it")
        return None
    net = lenet(pack, device=device, say=log.info)
    if not net.alive:
        log.info(f"guidance {trained.guidance:g} is kept: {net.is_dead('lenet')}")
        return None
    real, of = reference(pack)
    tried = choose(trained, real, net)
    best = min(tried, key=lambda one: one.score(net.accuracy))
    log.info(f"guidance {best}, chosen from {', '.join(f'{one.guidance:g}' for one in tried)} by {of}")
    saved = checkpoint.read_weights(run.model_file)
    sample = {**saved.part.sample, "guidance": best.guidance}
    with files.replacing(run.model_file) as part:
        checkpoint.save_weights(part, replace(saved, part=replace(saved.part, sample=sample)))
    run.update(guidance=asdict(best))
    return best.guidance
