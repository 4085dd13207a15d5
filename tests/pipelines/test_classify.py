"""What classify adds to a training process: labels, mixed targets, losses, learning rates."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mae_core.config import ModelConfig
from mae_core.data.label_budget import LabelBudget
from mae_core.model.classifier import Classifier
from mae_core.model.encoder import MaskedEncoder
from pipelines.classify import ClassifyTask, Prediction
from pipelines.config.arms import ArmKind
from pipelines.config.downstream import ClassifyConfig
from pipelines.config.loading import load_config
from pipelines.downstream.arms import Arm
from pipelines.downstream.task import Batch, Example, FitInput, TaskInfo

PLAIN = ("classify.mixup=0", "classify.cutmix=0", "classify.random_erase=0")


def make_task(*words: str, num_classes: int = 4) -> ClassifyTask:
    needed = ["init_from=c", "data.train=t", "data.val=v", "optim.global_batch_size=64"]
    config = load_config(ClassifyConfig, [], [*needed, "optim.micro_batch_size=64", *words], {})
    return ClassifyTask(config, TaskInfo(ModelConfig(), tuple("abcdefgh"[:num_classes]), "title"))


def make_arm(kind: ArmKind) -> Arm:
    return Arm(kind, LabelBudget(1.0), 0, 10, 1, 0)


def make_batch(targets: list[Any], weights: list[float]) -> Batch:
    images = torch.arange(len(targets) * 3 * 2 * 2.0).reshape(len(targets), 3, 2, 2)
    weight = torch.tensor(weights)
    images = images * weight[:, None, None, None]
    return Batch(images, targets, weight, 1, 0)


def test_fine_tuning_spreads_a_share_of_the_label_over_all_classes() -> None:
    task = make_task(*PLAIN, "classify.smoothing=0.2")
    batch = make_batch([np.asarray(1), np.asarray(3)], [1, 1])
    _, targets = task.augmented(batch, make_arm(ArmKind.FINETUNE))
    assert targets.tolist() == [
        pytest.approx([0.05, 0.85, 0.05, 0.05]),
        pytest.approx([0.05, 0.05, 0.05, 0.85]),
    ]


def test_the_linear_probe_takes_images_and_labels_as_they_are() -> None:
    task = make_task("classify.smoothing=0.2")
    batch = make_batch([np.asarray(1), np.asarray(3)], [1, 1])
    images, targets = task.augmented(batch, make_arm(ArmKind.LINEAR))
    assert torch.equal(images, batch.images)
    assert targets.tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]


def test_a_hole_has_no_class_also_where_it_is_mixed_in() -> None:
    words = ("classify.smoothing=0", "classify.random_erase=0", "classify.cutmix=0")
    task = make_task(*words, "classify.mixup=0.8")
    batch = make_batch([np.asarray(1), None], [1, 0])
    images, targets = task.augmented(batch, make_arm(ArmKind.SCRATCH))
    kept = float(targets[0, 1])
    assert 0 < kept < 1
    # The label is as strong as the image is; what is mixed in of the hole is black and of no class.
    assert torch.allclose(images[0], batch.images[0] * kept)
    assert targets.tolist() == [
        pytest.approx([0, kept, 0, 0]),
        pytest.approx([0, 1 - kept, 0, 0]),
    ]


def features_of(labels: list[Any], seed: int) -> list[Prediction]:
    """Two features that tell the first finding, or classes 0 and 1, and noise in the others."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(len(labels), 4)).astype(np.float32)
    values[:, 0] += [8.0 * np.ravel(label)[0] for label in labels]
    return [Prediction(row, np.asarray(x), (0, 0)) for row, x in zip(values, labels, strict=True)]


@pytest.mark.parametrize("kind", [ArmKind.LOGISTIC, ArmKind.UNTRAINED])
def test_frozen_features_are_read_by_logistic_regression(kind: ArmKind) -> None:
    words = ("classify.seeds=[5]", "classify.arms=[logistic,untrained]")  # no pictures of seed 0
    task, labels = make_task(*words, num_classes=2), [0, 1] * 20
    encoder = nn.Linear(1, 1)
    assert task.build_model(encoder, make_arm(kind)) is encoder
    found = task.evaluate(features_of(labels, 1), make_arm(kind), no_read, features_of(labels, 0))
    assert found.metrics["top1"] == 1.0


def test_nearest_neighbours_vote_among_as_many_images_as_there_are() -> None:
    task = make_task("classify.seeds=[5]", "classify.arms=[knn]", "classify.k=20", num_classes=2)
    training = [
        Prediction(np.float32(x), np.asarray(y), (0, 0)) for x, y in (([1, 0], 0), ([0, 1], 1))
    ]
    test = [Prediction(np.float32([3, 1]), np.asarray(0), (0, 0))]
    found = task.evaluate(test, make_arm(ArmKind.KNN), no_read, training)
    assert found.metrics == {"top1": 1.0}


def test_findings_are_read_from_frozen_features() -> None:
    words = ("classify.seeds=[5]", "classify.arms=[logistic]", "classify.labels=many")
    task, labels = make_task(*words, num_classes=2), [[0, 0], [1, 0], [0, 1], [1, 1]] * 10
    training, test = features_of(labels, 0), features_of(labels, 1)
    found = task.evaluate(test, make_arm(ArmKind.LOGISTIC), no_read, training)
    assert found.metrics["auroc/a"] == 1.0
    assert found.metrics["auroc/b"] < 0.8  # nothing in the features tells it


def no_read(place: tuple[int, int]) -> Any:
    raise AssertionError("nothing is drawn")


@pytest.mark.parametrize(
    ("labels", "text", "label"), [("one", b"2", 2), ("many", b'{"ill": ["0", "2"]}', [1, 0, 1])]
)
def test_a_label_is_a_class_or_the_findings_that_there_are(
    labels: str, text: bytes, label: object
) -> None:
    words = ("classify.labels=many", "classify.label_key=ill", "classify.arms=[finetune]")
    task = make_task(*(words if labels == "many" else ()), num_classes=3)
    task.info = task.info._replace(names=("0", "1", "2"))
    sample: Any = SimpleNamespace(where="w", target=text, folder="f")
    assert task._label(sample).tolist() == label


@pytest.mark.parametrize(
    ("kind", "trained"), [(ArmKind.FINETUNE, [False, True]), (ArmKind.SCRATCH, [True, True])]
)
def test_only_fine_tuning_leaves_the_first_blocks_as_they_are(
    kind: ArmKind, trained: list[bool]
) -> None:
    task = make_task("classify.trainable_blocks=1")
    size: Any = {"img_size": (8, 8), "patch_size": 4, "in_chans": 3}
    encoder = MaskedEncoder(**size, embed_dim=16, depth=2, num_heads=2)
    task.build_model(encoder, make_arm(kind))
    blocks = [next(block.parameters()).requires_grad for block in encoder.blocks]
    assert blocks == trained


class Logits(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


def test_the_loss_divides_by_the_nominal_batch_and_a_hole_adds_nothing() -> None:
    task = make_task(*PLAIN, "classify.smoothing=0", num_classes=2)
    model = Logits(torch.tensor([[0.0, 0.0], [9.0, -9.0]]))
    loss = task.loss(model, make_batch([np.asarray(0), None], [1, 0]), make_arm(ArmKind.FINETUNE))
    assert loss.loss.item() == pytest.approx(0.34657359)  # ln 2, over two images
    assert loss.num_samples.item() == 1


def test_findings_are_each_decided_apart() -> None:
    task = make_task(*PLAIN, "classify.labels=many", "classify.arms=[finetune]", num_classes=2)
    model = Logits(torch.tensor([[0.0, 2.0]]))
    batch = make_batch([np.asarray([1, 1])], [1])
    loss = task.loss(model, batch, make_arm(ArmKind.FINETUNE))
    # The mean of ln 2 and ln(1 + e^-2).
    assert loss.loss.item() == pytest.approx((0.69314718 + 0.12692801) / 2)


def test_a_hole_among_findings_adds_nothing_though_it_has_logits() -> None:
    task = make_task(*PLAIN, "classify.labels=many", "classify.arms=[finetune]", num_classes=2)
    model = Logits(torch.tensor([[0.0, 0.0], [9.0, 9.0]]))
    batch = make_batch([np.asarray([1, 0]), None], [1, 0])
    loss = task.loss(model, batch, make_arm(ArmKind.FINETUNE))
    assert loss.loss.item() == pytest.approx(0.34657359)  # ln 2, over two images
    assert loss.num_samples.item() == 1


@pytest.mark.parametrize(("kind", "rate"), [(ArmKind.LINEAR, 0.025), (ArmKind.FINETUNE, 0.00125)])
def test_the_learning_rate_is_scaled_from_the_kinds_own_base(kind: ArmKind, rate: float) -> None:
    task = make_task("classify.linear_base_lr=0.1")
    assert task.peak_learning_rate(make_arm(kind), 0.005) == pytest.approx(rate)


def test_only_an_arm_that_trains_the_encoder_is_changed_by_rand_augment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipelines.classify.training_view", lambda *_: np.zeros((2, 2, 3)))
    monkeypatch.setattr(
        "pipelines.classify.rand_augment", lambda pixels, *_, magnitude: pixels + magnitude
    )
    sample: Any = SimpleNamespace(image=b"", epoch=0, key="k", where="w", target=b"1", folder="f")
    task = make_task("classify.rand_augment=5")
    shades = {
        kind: task.training_example(sample, make_arm(kind)).pixels.max()
        for kind in (ArmKind.LINEAR, ArmKind.FINETUNE, ArmKind.SCRATCH)
    }
    assert list(shades.values()) == [0, 5, 5]


def make_classifier(task: ClassifyTask, arm: Arm) -> Classifier:
    torch.manual_seed(0)
    size: Any = {"img_size": (8, 8), "patch_size": 4, "in_chans": 3}
    encoder = MaskedEncoder(**size, embed_dim=16, depth=1, num_heads=2)
    return cast(Classifier, task.build_model(encoder, arm))


def shades(labels: list[Any]) -> Tensor:
    """Images that tell the first finding, or the class, by their left half."""
    images = torch.randn(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(4))
    images[..., :4] += torch.tensor([float(np.ravel(x)[0]) for x in labels])[:, None, None, None]
    return images


@pytest.mark.parametrize("kind", [ArmKind.FINETUNE, ArmKind.SCRATCH, ArmKind.ATTENTIVE])
def test_a_fine_tuned_head_starts_as_a_logistic_regression(kind: ArmKind) -> None:
    task, labels = make_task(num_classes=2), [0, 1] * 40
    model = make_classifier(task, make_arm(kind)).eval()
    images, start = shades(labels), task.start(make_arm(kind))
    assert start is not None
    assert (start.num_images, start.of_arm) == (5000, True)
    examples = [Example(np.zeros(0, np.uint8), np.asarray(label)) for label in labels]
    with torch.no_grad():
        start.fit(model, start.inputs(model, images, examples))
        found = model(images)
    assert (found.argmax(dim=1) == torch.tensor(labels)).float().mean() > 0.9
    assert model.features(images).std(dim=0, correction=0).mean().item() == pytest.approx(1.0)


def test_a_head_for_findings_starts_as_one_regression_each() -> None:
    words = ("classify.labels=many", "classify.arms=[finetune]")
    task, labels = make_task(*words, num_classes=2), [[0, 0], [1, 0], [0, 1], [1, 1]] * 20
    model = make_classifier(task, make_arm(ArmKind.FINETUNE)).eval()
    start = task.start(make_arm(ArmKind.FINETUNE))
    assert start is not None
    examples = [Example(np.zeros(0, np.uint8), np.asarray(label)) for label in labels]
    images = shades(labels)
    with torch.no_grad():
        start.fit(model, start.inputs(model, images, examples))
        is_found = model(images)[:, 0] > 0
    assert (is_found == torch.tensor(labels)[:, 0].bool()).float().mean() > 0.9


def test_a_feature_that_hardly_varies_is_not_blown_up() -> None:
    task, labels = make_task(num_classes=2), [0, 1] * 10
    model = make_classifier(task, make_arm(ArmKind.FINETUNE))
    inputs = [
        FitInput(np.tile(np.float32([1, -1]), 8) * np.float32(2 * label - 1), np.asarray(label))
        for label in labels
    ]
    for number, image in enumerate(inputs):
        image.values[3] = 5 + 1e-6 * number
    start = task.start(make_arm(ArmKind.FINETUNE))
    assert start is not None
    with torch.no_grad():
        start.fit(model, inputs)
    assert model.fc_norm.weight[3] == 1
    assert (model.head.weight[:, 3] == 0).all()


def test_the_head_starts_near_zero_where_that_is_asked_for_or_the_encoder_is_frozen() -> None:
    assert make_task("classify.head_start=zero").start(make_arm(ArmKind.FINETUNE)) is None
    assert make_task().start(make_arm(ArmKind.LINEAR)) is None


AUGMENTED = ("classify.mixup=0.8", "classify.cutmix=1.0", "classify.random_erase=0.5")


def whole_batch(labels: list[Any], weights: list[float], step: int = 3) -> Batch:
    images = shades([0 if label is None else label for label in labels])
    weight = torch.tensor(weights)
    return Batch(images * weight[:, None, None, None], labels, weight, step, 0)


def split(batch: Batch, size: int) -> list[Batch]:
    return [
        Batch(
            batch.images[i : i + size],
            batch.targets[i : i + size],
            batch.weights[i : i + size],
            batch.step,
            batch.first + i,
        )
        for i in range(0, len(batch.images), size)
    ]


def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches() -> None:
    task, arm = make_task(*AUGMENTED, "classify.smoothing=0.1"), make_arm(ArmKind.SCRATCH)
    labels = [np.asarray(x) for x in (0, 1, 2, 3, 0, 1, 2, 3)]
    batch = whole_batch([*labels[:7], None], [1] * 7 + [0])
    found = []
    for size in (8, 4, 2):
        model = make_classifier(task, arm)
        nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
        parts = [task.loss(model, part, arm) for part in split(batch, size)]
        loss = torch.stack([part.loss for part in parts]).mean()
        loss.backward()
        found.append((loss.item(), [p.grad for p in model.parameters() if p.grad is not None]))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        assert all(
            torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, found[0][1], strict=True)
        )


def test_each_pair_and_each_step_is_mixed_by_draws_of_its_own() -> None:
    task, arm = (
        make_task(*AUGMENTED, "classify.cutmix=0", "classify.smoothing=0"),
        make_arm(ArmKind.FINETUNE),
    )
    labels = [np.asarray(x) for x in (0, 1, 0, 1)]
    batches = [whole_batch(labels, [1] * 4, step) for step in (3, 4, 3)]
    (first, other_step, again) = (task.augmented(batch, arm)[1] for batch in batches)
    assert torch.equal(first, again)
    assert not torch.equal(first[:2], first[2:])
    assert not torch.equal(first, other_step)
    other_seed = task.augmented(batches[0], arm._replace(seed=1))[1]
    assert not torch.equal(first, other_seed)


def test_each_image_is_erased_by_draws_of_its_own() -> None:
    words = ("classify.mixup=0", "classify.cutmix=0", "classify.random_erase=1")
    task, arm = make_task(*words), make_arm(ArmKind.FINETUNE)
    batch = Batch(torch.ones(2, 3, 8, 8), [np.asarray(0)] * 2, torch.ones(2), 3, 0)
    images, _ = task.augmented(batch, arm)
    is_erased = (images != 1).any(dim=1)
    assert is_erased.flatten(1).any(dim=1).all()
    assert not torch.equal(is_erased[0], is_erased[1])


def test_arms_of_a_seed_are_augmented_alike() -> None:
    task = make_task(*AUGMENTED)
    batch = whole_batch([np.asarray(x) for x in (0, 1, 2, 3)], [1] * 4)
    pairs = [task.augmented(batch, make_arm(k)) for k in (ArmKind.FINETUNE, ArmKind.SCRATCH)]
    assert torch.equal(pairs[0][0], pairs[1][0])
    assert torch.equal(pairs[0][1], pairs[1][1])


def test_an_attentive_probe_shows_where_it_looks() -> None:
    task, arm = make_task(num_classes=2), make_arm(ArmKind.ATTENTIVE)
    model = make_classifier(task, arm).eval()
    labels = [0, 1, 0, 1]
    places = [(0, 0), (0, 7), (0, 8), (1, 0)]  # of each shard, the first eight of the first
    pixels = np.zeros((8, 8, 3), np.uint8)
    examples = [Example(pixels, np.asarray(x), y) for x, y in zip(labels, places, strict=True)]
    with torch.no_grad():
        predictions = task.predict(model, shades(labels), examples)
    assert [p.attention is not None for p in predictions] == [True, True, False, False]
    asked: list[tuple[int, int]] = []

    def read(place: tuple[int, int]) -> Example:
        asked.append(place)
        return Example(pixels, np.asarray(0), place)

    found = task.evaluate(predictions, arm._replace(seed=5), read, [])
    assert set(found.pictures) == {"attention"}
    assert asked == [(0, 0), (0, 7)]
